"""`kvfsctl demo`: a real model generates text with its K/V on a drive and attention computed in the drive."""

import json
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfs_bench.figures import report
from kvfsctl.demo_document import MODEL_DIR, DemoError, check_prerequisites
from kvfsctl.demo_processes import Task, phase_runner
from kvfsctl.demo_report import Outcome
from kvfsctl.output import fail

# Enough flash for the demo many times over; the file is sparse.
_DRIVE_BYTES_MIN = 1 << 30


class StoredDtype(StrEnum):
    """Choices of --dtype."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT8_E4M3 = "float8_e4m3"
    INT8 = "int8"
    INT4 = "int4"


def demo(
    context: Annotated[int, typer.Option(min=64, help="Prompt length, tokens.")] = 4096,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    more_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after reopening the drive.")] = 64,
    dtype: Annotated[StoredDtype, typer.Option(help="Of the K/V on flash.")] = StoredDtype.FLOAT16,
    worker: Annotated[
        str | None, typer.Option(help="Attention worker of the drive.", show_default="numba")
    ] = None,
    drive: Annotated[
        Path | None, typer.Option(help="Make the drive here and keep it. [default: temporary]")
    ] = None,
    model: Annotated[
        Path, typer.Option(help="Directory of a Transformers model.", show_default="built in")
    ] = MODEL_DIR,
    plot: Annotated[
        Path | None, typer.Option(help="Measure several context lengths and draw them here (PNG).")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """Generate text with the KV cache on a drive and compare with Transformers in memory and with offloading.

    Formats a drive, prefills a real document (a module of Python's standard library that the built-in model was
    not trained on), and generates greedily, each layer's decode attention executed by the drive. Then the
    process ends; a new one opens the drive and continues the same sequence from flash, without prefill. Every
    phase is a process of its own and warms up (compiles its kernels) before anything is timed.

    Exit code: 0 when all tokens are identical to Transformers', 1 when one differs or the demo cannot run.
    """
    from kvfs.configuration import export, load

    export(load(), "fpga")  # the phases' processes have this one's environment
    try:
        outcome, points = _run(
            context, tokens, more_tokens, dtype.value, worker=worker, drive=drive, model=model, plot_path=plot
        )
    except DemoError as error:
        fail(f"demo: {error}")
    _print(outcome, points, plot, json_output)
    if not outcome.all_identical:
        fail(f"demo: the tokens differ from those of {outcome.comparison}")


def _run(context, tokens, more_tokens, dtype, *, worker, drive, model, plot_path):
    """All phases, one after the other; returns (Outcome, points of the plot)."""
    if drive is not None and drive.exists():
        raise DemoError(f"{drive} exists already: choose another path for --drive, or remove it")
    check_prerequisites(model)
    with tempfile.TemporaryDirectory(prefix="kvfs-demo-") as directory, phase_runner() as run:

        def task(phase, new_tokens, context_tokens=context, drive_path=None):
            return Task(
                phase=phase,
                model_dir=str(model),
                dtype=dtype,
                context_tokens=context_tokens,
                new_tokens=new_tokens,
                directory=directory,
                drive=str(drive_path or drive or Path(directory) / "demo.kvfs"),
                drive_bytes=_drive_bytes(model, context_tokens + new_tokens),
                open_options={"worker": worker} if worker else {},
            )

        plain = run("in-memory SDPA", task("in_memory", tokens + more_tokens))
        reference = plain
        if dtype != "float32":
            title = f"in-memory SDPA, K/V as in {dtype}"
            reference = run(title, task("in_memory_rounded", tokens + more_tokens))
        outcome = Outcome(
            dtype,
            context,
            tokens,
            more_tokens,
            plain,
            reference,
            kvfs=run("kvfs: format, prefill, generate", task("kvfs_generate", tokens)),
            continued=run("kvfs: reopen, continue", task("kvfs_continue", more_tokens)),
            offloading=run("offloading to a file", task("offloading", tokens)),
        )
        return outcome, _points(run, task, context, directory) if plot_path else {}


def _points(run, task, context, directory):
    from kvfsctl.demo_plot import NEW_TOKENS_PER_POINT, WAYS, contexts_around

    points = {}
    for length in contexts_around(context):
        for way, name in WAYS.items():
            drive = Path(directory) / f"plot-{length}.kvfs"
            title = f"plot: {length:,} tokens, {name}"
            points[way, length] = run(title, task(way, NEW_TOKENS_PER_POINT, length, drive))
            drive.unlink(missing_ok=True)
    return points


def _drive_bytes(model_dir, num_tokens):
    """Room for the sequence eight times over, so that the demo never waits for garbage collection."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    token_bytes = 2 * 4 * config["num_hidden_layers"] * kv_heads * head_dim
    return max(_DRIVE_BYTES_MIN, 8 * num_tokens * token_bytes)


def _print(outcome, points, plot_path, json_output):
    from kvfsctl import demo_plot, demo_report

    if plot_path:
        demo_plot.plot(points, plot_path)
    if json_output:
        all_figures = [*demo_report.figures(outcome), *demo_plot.point_figures(points)]
        typer.echo(json.dumps(report("demo", all_figures), indent=2))
        return
    console = Console()
    console.print(demo_report.table(outcome))
    for line in demo_report.summary(outcome):
        console.print(line, highlight=False, soft_wrap=True)
    if plot_path:
        console.print(f"plot: {plot_path}")
