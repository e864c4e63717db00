"""`kvfsctl warm-up`: compile ahead what a first answer would wait for."""

from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, print_json


def warm_up(
    drive: Annotated[
        Path | None,
        typer.Argument(metavar="[DRIVE|MOUNT]", help="For its models; without, for common ones."),
    ] = None,
    json_output: JsonOption = False,
):
    """Compile the kernels of attention for models' shapes. Once for a machine: they are kept on disk.

    Otherwise the first prompt of each shape waits for some seconds.
    """
    from kvfs.warm_up import COMMON_SHAPES, shapes_of, warm_up

    shapes = COMMON_SHAPES
    if drive is not None:
        with open_store(drive) as store:
            shapes = shapes_of(store)
    done = []

    def report(shape, seconds: float) -> None:
        done.append({**shape._asdict(), "seconds": seconds})
        if not json_output:
            heads = f"{shape.group_size} query heads a KV head"
            print(f"{shape.dtype}, head_dim {shape.head_dim}, {heads}: {seconds:.1f} s")

    warm_up(shapes, report)
    if json_output:
        print_json("warm-up", shapes=done)
