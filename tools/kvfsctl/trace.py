"""`kvfsctl trace`: where the time of a decode step goes, through all layers."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, fail, print_json

MAX_SECONDS = 60.0
WARM_UP_STEPS = 1  # compiles kernels, and brings what fits into the drive's cache


def trace(
    drive: StoreArgument,
    sequence: Annotated[
        str | None,
        typer.Argument(metavar="[SEQUENCE]", help="Whose decode step; none: whatever a mount's users do."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the trace goes; ui.perfetto.dev opens it.")
    ] = Path("kvfs-trace.json"),
    seconds: Annotated[
        float, typer.Option(min=0.01, max=MAX_SECONDS, help="How long to look, without a sequence.")
    ] = 1.0,
    cold: Annotated[
        bool, typer.Option("--cold", help="No step before: with what compiling and an empty cache take.")
    ] = False,
    json_output: JsonOption = False,
):
    """Write a trace of all layers: host, NVMe queues, FTL, media, kernels.

    With SEQUENCE it is one decode step: attention of a random query over all its layers, which changes
    nothing. Of a mounted drive the trace has the server's side and this process's. Without SEQUENCE it is what
    the mount's server does for some seconds.
    """
    if sequence is None and not drive.is_dir():
        fail(f"{drive}: a drive that is not mounted does nothing by itself: name a sequence, ls shows them")
    with open_store(drive) as store:
        decoded = None if sequence is None else store.sequence(sequence)
        if decoded is not None and not cold:
            for _ in range(WARM_UP_STEPS):
                _decode_step(store, decoded)
        store.start_trace()
        try:
            if decoded is None:
                time.sleep(seconds)
            else:
                _decode_step(store, decoded)
        finally:
            found = store.stop_trace()
    try:
        output.write_text(json.dumps(found))
    except OSError as error:
        fail(f"{output}: {error.strerror}")
    spans = [event for event in found["traceEvents"] if event["ph"] in "Xb"]
    if json_output:
        print_json("trace", drive=str(drive), output=str(output), spans=len(spans), layers=_by_layer(spans))
    else:
        print(f"{output}: {len(spans)} spans; open it in ui.perfetto.dev")


def _decode_step(store, sequence) -> None:
    """One token's attention over every layer."""
    import numpy as np

    geometry = sequence.model.geometry
    shape = (1, 1, geometry.num_query_heads, geometry.head_dim)
    queries = np.random.default_rng(0).standard_normal(shape, np.float32)
    for layer in range(geometry.num_layers):
        store.attend(layer, queries, sequence)


def _by_layer(spans: list[dict]) -> dict[str, int]:
    layers: dict[str, int] = {}
    for span in spans:
        layers[span["cat"]] = layers.get(span["cat"], 0) + 1
    return layers
