"""`kvfsctl bench`: the benchmarks of tools/bench, with rivals and physical limits in the same run."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfsctl.output import fail

app = typer.Typer(no_args_is_help=True, help="Measure kvfs against rivals and the machine's limits.")


@app.callback()
def _group() -> None:
    """Keeps `attention` a name of its own while it is the only benchmark."""


@app.command()
def attention(
    directory: Annotated[Path, typer.Option(help="Where the drive for the cold part is made.")] = Path("."),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a check that it runs, not a result.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """Dense decode attention from DRAM and from flash, appending, and accuracy.

    Needs torch for the rival; without fio the device's bandwidth is unknown and those figures have no limit.
    """
    from kvfs_bench import attention as bench
    from kvfs_bench.figures import print_report, report

    result = report("attention", bench.measure(directory, quick=quick))
    if json_output:
        print(json.dumps(result, indent=2))
    else:
        print_report(result)


@app.command()
def churn(
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for the curves of write amplification over fullness.")
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Seconds, small drives: a check that it runs, not a result.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """Write amplification: uniform overwrites against known values, and sequences that come and go.

    Simulated over flash that keeps no payload; the same on every machine. Takes some minutes. --plot needs
    matplotlib.
    """
    from kvfs_bench import churn as bench

    figures, lines = bench.measure(short)
    if plot is not None:
        bench.plot(lines, plot)
    _print("churn", figures, json_output)


@app.command()
def ftl(
    directory: Annotated[Path, typer.Option(help="Where the drive for the reads is made.")] = Path("."),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a check that it runs, not a result.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """What the flash translation layer costs: CPU per page, time per read, memory; and how evenly it wears."""
    from kvfs_bench import ftl_overhead as bench

    _print("ftl", bench.measure(directory, quick), json_output)


@app.command()
def nvme(
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds: a check that it runs, not a result.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """pyspdk and attention over SPDK, beside spdk_nvme_perf on the same target.

    Needs an installed SPDK with nvmf_tgt and spdk_nvme_perf in PATH; starts a target of its own.
    """
    from kvfs_bench import nvme as bench

    try:
        figures = bench.measure(quick)
    except bench.SpdkMissing as error:
        fail(f"bench nvme: {error}")
    _print("nvme", figures, json_output)


@app.command()
def drives(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a check that it runs, not a result.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """Decoding on sets of 1, 2 and 8 simulated drives whose flash is the limit. Takes half a minute."""
    from kvfs_bench import drives as bench

    _print("drives", bench.measure(quick), json_output, bench.settings(quick))


@app.command()
def mount(
    directory: Annotated[
        Path, typer.Option(help="Where drive and folder are made: the disk to measure.")
    ] = Path("."),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a check that it runs, not a result.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """The mount beside pyfuse3's bare passthrough and the disk; a store in another process beside one in this.

    Needs fio, and 8 GiB of disk. Takes some minutes.
    """
    from kvfs_bench import mount as bench

    status = Console(stderr=True).status("begins")
    with status:
        try:
            figures = bench.measure(directory, quick, lambda text: status.update(text))
        except RuntimeError as error:
            fail(error)
    _print("mount", figures, json_output)


@app.command()
def context(
    plot: Annotated[Path | None, typer.Option(help="PNG file for time over the length of the context.")] = None,
    directory: Annotated[Path, typer.Option(help="Where the drive is made.")] = Path("."),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a check that it runs, not a result.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """How attention's time and memory grow with the context, and its bandwidth with the batch.

    Needs torch for the rival, 6 GiB of disk and 16 of memory for the whole of it. --plot needs matplotlib.
    """
    from kvfs_bench import context as bench

    figures, times = bench.measure(directory, quick)
    if plot is not None:
        bench.plot(times, plot)
    _print("context", figures, json_output)


@app.command()
def writeback(
    plot: Annotated[Path | None, typer.Option(help="PNG file for both over the size of a spill.")] = None,
    directory: Annotated[Path, typer.Option(help="Where the drives are made.")] = Path("."),
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a check that it runs, not a result.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """Decoding with every size of spill, and cold reads of what it wrote, before and after compaction.

    Needs 2 GiB of disk; takes some minutes. --plot needs matplotlib.
    """
    from kvfs_bench import writeback as bench

    figures, curves = bench.measure(directory, quick)
    if plot is not None:
        bench.plot(curves, plot)
    _print("writeback", figures, json_output)


@app.command()
def decode(
    directory: Annotated[Path, typer.Option(help="Where the files are made: the disk to measure.")] = Path("."),
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for tokens/s over the size of the KV cache.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a check that it runs, not a result.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print figures for machines.")] = False,
):
    """Decoding with a KV cache four times as large as memory, against offloading it in other ways.

    Needs torch, and 9 GiB of disk. Every contender is held to the same memory by a control group where this
    user may make one. Takes some minutes; --plot needs matplotlib and doubles that.
    """
    from kvfs_bench import decode as bench

    status = Console(stderr=True).status("begins")
    with status:
        figures, settings = bench.measure(directory, quick, lambda text: status.update(text))
        if plot is not None:
            bench.plot(directory, plot, quick, lambda text: status.update(text))
    _print("decode", figures, json_output, settings)


def _print(bench: str, figures: list, json_output: bool, settings: dict[str, str] | None = None) -> None:
    """settings: how each contender was set up, in words."""
    from kvfs_bench.figures import print_report, report

    result = report(bench, figures)
    if settings is not None:
        result["settings"] = settings
    if json_output:
        print(json.dumps(result, indent=2))
    else:
        print_report(result)
        for name, text in (settings or {}).items():
            print(f"{name}: {text}")
