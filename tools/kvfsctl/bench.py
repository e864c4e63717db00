"""`kvfsctl bench`: the benchmarks of tools/bench, with rivals and physical limits in the same run."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.output import fail

app = typer.Typer(no_args_is_help=True, help="Measure kvfs against rivals and the machine's limits.")

DirectoryOption = Annotated[Path, typer.Option(help="Where the drive is made: the disk to measure.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Small sizes: a check that it runs, not a result.")]
FiguresOption = Annotated[bool, typer.Option("--json", help="Print figures for machines.")]


@app.command()
def attention(
    directory: Annotated[Path, typer.Option(help="Where the drive for the cold part is made.")] = Path("."),
    quick: QuickOption = False,
    json_output: FiguresOption = False,
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
    json_output: FiguresOption = False,
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
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """What the flash translation layer costs: CPU per page, time per read, memory; and how evenly it wears."""
    from kvfs_bench import ftl_overhead as bench

    _print("ftl", bench.measure(directory, quick), json_output)


@app.command()
def nvme(
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds: a check that it runs, not a result.")
    ] = False,
    json_output: FiguresOption = False,
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


@app.command("x-cache")
def x_cache(
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """Inputs of layers stored instead of keys and values, on a simulated drive and link. Needs transformers."""
    from kvfs_bench import x_cache as bench

    _print("x-cache", bench.measure(quick), json_output, bench.settings(quick))


@app.command()
def drives(
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """Decoding on sets of 1, 2 and 8 simulated drives whose flash is the limit. Takes half a minute."""
    from kvfs_bench import drives as bench

    _print("drives", bench.measure(quick), json_output, bench.settings(quick))


@app.command()
def mount(
    directory: Annotated[
        Path, typer.Option(help="Where drive and folder are made: the disk to measure.")
    ] = Path("."),
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """The mount beside pyfuse3's bare passthrough and the disk; a store in another process beside one in this.

    Needs fio, and 8 GiB of disk. Takes some minutes.
    """
    from rich.console import Console

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
    quick: QuickOption = False,
    json_output: FiguresOption = False,
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
    quick: QuickOption = False,
    json_output: FiguresOption = False,
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
def prefix(
    directory: DirectoryOption = Path("."),
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """How long it takes to find the longest stored prefix of 131,072 tokens among a million groups.

    Needs 3 GiB of disk; takes some minutes.
    """
    from kvfs_bench import prefix as bench

    _print("prefix", bench.measure(directory, quick), json_output)


@app.command()
def resume(
    directory: DirectoryOption = Path("."),
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """Time to the first token of 4,096 tokens that another process has stored, against computing them again.

    With the model and the document of `kvfsctl demo`; needs torch and transformers.
    """
    from kvfs_bench import resume as bench
    from kvfsctl.demo_document import MODEL_DIR, DemoError, check_prerequisites, document_ids, load_model

    try:
        check_prerequisites(MODEL_DIR)
        document = document_ids(load_model(MODEL_DIR)[1], bench.PROMPT_TOKENS + bench.WARM_UP_TOKENS)
        figures = bench.measure(directory, MODEL_DIR, document, quick)
    except (DemoError, RuntimeError) as error:
        fail(f"bench resume: {error}")
    _print("resume", figures, json_output)


@app.command()
def objects(
    directory: DirectoryOption = Path("."),
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """Keyed objects of 1 MiB against files of the same bytes and the disk; a cap against an ideal LRU.

    Needs 4 GiB of disk; takes a minute or two.
    """
    from kvfs_bench import objects as bench

    _print("objects", bench.measure(directory, quick), json_output)


@app.command()
def eviction(
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """Ten times a cap offered, in four patterns: is use ever above it, and hits beside an ideal LRU's."""
    from kvfs_bench import eviction as bench

    _print("eviction", bench.figures(quick), json_output)


@app.command()
def lmcache(
    directory: Annotated[
        Path, typer.Option(help="Where drive and files are made: the disk to measure.")
    ] = Path("."),
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """kvfs as LMCache's L2 storage beside LMCache's own, and restoring a prompt beside its local disk.

    Needs LMCache in this environment, and 2 GiB of disk; without fio the disk's limit is unknown.
    """
    from kvfs_bench import lmcache_l2, lmcache_restore

    try:
        figures = lmcache_l2.measure(directory, quick) + lmcache_restore.measure(directory, quick)
    except lmcache_l2.LMCacheMissing as error:
        fail(f"bench lmcache: {error}")
    _print("lmcache", figures, json_output)


@app.command()
def decode(
    directory: Annotated[Path, typer.Option(help="Where the files are made: the disk to measure.")] = Path("."),
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for tokens/s over the size of the KV cache.")
    ] = None,
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """Decoding with a KV cache four times as large as memory, against offloading it in other ways.

    Needs torch, and 9 GiB of disk. Every contender is held to the same memory by a control group where this
    user may make one. Takes some minutes; --plot needs matplotlib and doubles that.
    """
    from rich.console import Console

    from kvfs_bench import decode as bench

    status = Console(stderr=True).status("begins")
    with status:
        figures, settings = bench.measure(directory, quick, lambda text: status.update(text))
        if plot is not None:
            bench.plot(directory, plot, quick, lambda text: status.update(text))
    _print("decode", figures, json_output, settings)


@app.command()
def sparse(
    directory: DirectoryOption = Path("."),
    plot: Annotated[Path | None, typer.Option(help="PNG file for quality over bytes read.")] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Without a drive: what the methods promise; no speeds.")
    ] = False,
    speed: Annotated[bool, typer.Option(help="Also tokens/s.")] = True,
    resume: Annotated[
        Path | None, typer.Option(help="Folder that keeps what is measured: another run with it goes on there.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="With --resume: stop after so many.")] = None,
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """Sparse attention against dense: bytes read, quality on real text, needles in a haystack, tokens/s.

    With the demo's model and document, contexts of 8k to 32k. Needs torch and transformers, and 12 GiB of disk
    for the speeds; takes an hour, which --resume and --minutes cut up (exit code 75: there is more to do).
    --plot needs matplotlib; --json has the curves' points, too.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvfsctl.demo_document import MODEL_DIR, DemoError, check_prerequisites, document_ids, load_model

    if minutes is not None and resume is None:
        fail("bench sparse: --minutes needs --resume, or what is measured is lost")
    try:
        check_prerequisites(MODEL_DIR)
        from kvfs_bench import sparse as bench

        num_tokens = (bench.QUICK if quick else bench.FULL).document_tokens
        document = document_ids(load_model(MODEL_DIR)[1], num_tokens)
    except DemoError as error:
        fail(f"bench sparse: {error}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("begins")
        try:
            figures, raw, settings = bench.measure(
                directory, MODEL_DIR, document, quick, simulated, speed, resume, minutes,
                lambda done, of, text: bar.update(task, completed=done, total=of, description=text),
            )  # fmt: skip
        except ValueError as error:
            fail(f"bench sparse: {error}")
        except bench.OutOfTime:
            bar.stop()
            typer.echo("bench sparse: there is more to do; run it again", err=True)
            raise typer.Exit(os.EX_TEMPFAIL) from None
    if plot is not None:
        bench.plot(raw, plot)
    _print("sparse", figures, json_output, settings, raw)


@app.command()
def vllm(
    directory: DirectoryOption = Path("."),
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """vLLM on the CPU with kvfs's connector and without: overhead when nothing is found, time to first token.

    Needs vLLM (pip install 'kvfs[vllm]') and 2 GiB of disk; takes a minute or two.
    """
    from kvfs_bench import vllm_connector as bench

    try:
        figures = bench.measure(directory, Path(__file__).parent / "demo_model", quick)
    except RuntimeError as error:
        fail(f"bench vllm: {error}")
    _print("vllm", figures, json_output)


@app.command("many-sequences")
def many_sequences(
    sequences: Annotated[int, typer.Option(min=10_000, help="How many.")] = 1_000_000,
    directory: DirectoryOption = Path("."),
    drive: Annotated[
        Path | None, typer.Option(help="Keep the drive in this file, or measure one kept before.")
    ] = None,
    json_output: FiguresOption = False,
):
    """Very many sequences: a page of a listing, df and an eviction, in time and memory.

    A million need 1 GiB of disk and some minutes, most of them to be made.
    """
    from kvfs_bench import many_sequences as bench

    _print("many-sequences", bench.measure(directory, sequences, drive), json_output)


@app.command()
def telemetry(
    directory: Annotated[Path, typer.Option(help="Where the drive is made.")] = Path("."),
    quick: QuickOption = False,
    json_output: FiguresOption = False,
):
    """What metrics and a trace cost attention, in turns with attention that nothing is recorded of."""
    from kvfs_bench import telemetry as bench

    _print("telemetry", bench.measure(directory, quick), json_output)


def _print(
    bench: str,
    figures: list,
    json_output: bool,
    settings: dict[str, str] | None = None,
    raw: dict | None = None,
) -> None:
    """settings: how each contender was set up, in words; raw: what figures sum up, for machines only."""
    from kvfs_bench.figures import print_report, report

    result = report(bench, figures)
    if settings is not None:
        result["settings"] = settings
    if json_output:
        print(json.dumps(result if raw is None else result | {"raw": raw}, indent=2))
    else:
        print_report(result)
        for name, text in (settings or {}).items():
            print(f"{name}: {text}")
