"""`kvfsctl machine`: what a machine would give, by a model of it."""

import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.output import JsonOption, fail, print_json, print_table, progress_bar

app = typer.Typer(
    no_args_is_help=True, help="A model of machines: tokens/s, costs and limits of one that is not there."
)

MachineOption = Annotated[str, typer.Option("--machine", "-m", help="A name that ls shows, or a TOML file.")]
ModelOption = Annotated[str, typer.Option("--model", help="A name that ls shows, or a TOML file.")]
BatchOption = Annotated[int, typer.Option(help="Sequences that decode at once.")]
InputOption = Annotated[int, typer.Option("--input", help="Tokens of each prompt.")]
OutputOption = Annotated[int, typer.Option("--output", help="Tokens that each generates.")]
DrivesOption = Annotated[int | None, typer.Option(help="Drives; the machine's own if left out.")]
CompressionOption = Annotated[float, typer.Option(help="Of sparse attention.")]
PlotOption = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it; needs matplotlib.")]


@app.command("ls")
def list_all(json_output: JsonOption = False):
    """Show the machines, language models and systems that are known."""
    from machine_model import SYSTEMS, load_machine, load_model, machine_names, model_names

    machines = [load_machine(name) for name in machine_names()]
    models = [load_model(name) for name in model_names()]
    if json_output:
        print_json(
            "machine ls",
            machines=[{"name": one.name, "title": one.title, "num_drives": one.num_drives} for one in machines],
            models=[{"name": one.name, "title": one.title} for one in models],
            systems=[{"name": one.name, "words": one.words} for one in SYSTEMS.values()],
        )
        return
    print_table("machines", ["name", "what it is"], [[one.name, one.title] for one in machines], left=2)
    print_table("language models", ["name", "what it is"], [[one.name, one.title] for one in models], left=2)
    print_table("systems", ["name", "what it is"], [[one.name, one.words] for one in SYSTEMS.values()], left=2)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="MACHINE", help="A name that ls shows, or a TOML file.")],
    json_output: JsonOption = False,
):
    """Show every number of a machine, with its source."""
    from machine_model import load_machine, tables

    machine = load_machine(name)
    if json_output:
        numbers = [asdict(one) for one in machine.numbers()]
        print_json("machine show", name=machine.name, title=machine.title, numbers=numbers)
        return
    print_table(machine.title, *tables.numbers(machine.numbers()), left=4)


@app.command()
def run(
    machine: MachineOption,
    model: ModelOption,
    system: Annotated[str, typer.Option(help="A name that ls shows.")] = "kvfs-dense",
    batch: BatchOption = 1,
    input_tokens: InputOption = 1024,
    output_tokens: OutputOption = 1024,
    drives: DrivesOption = None,
    compression: CompressionOption = 8.0,
    years: Annotated[float, typer.Option(help="Over which the machine is paid off.")] = 3.0,
    load: Annotated[float, typer.Option(help="The share of the time that it works.")] = 0.5,
    usd_per_kwh: Annotated[float, typer.Option(help="Of power, cooling included.")] = 0.15,
    host_usd: Annotated[
        float | None, typer.Option(help="The host's price, where the machine has none.")
    ] = None,
    host_watts: Annotated[float | None, typer.Option(help="What the host draws, likewise.")] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Each number of the machine 20 % lower and higher.")
    ] = False,
    plot: PlotOption = None,
    json_output: JsonOption = False,
):
    """Show tokens/s, where the time goes, what is busy, what tokens cost, how long the flash lasts.

    --plot draws the sensitivity.
    """
    from machine_model import Workload, load_machine, load_model, simulate, tables
    from machine_model.economics import Use, economics
    from machine_model.sensitivity import STEP
    from machine_model.sensitivity import sensitivity as sensitivity_of

    where, what = load_machine(machine), load_model(model)
    for path, value in (("host.price_usd", host_usd), ("host.watts", host_watts)):
        where = where if value is None else where.with_value(path, value)
    work = Workload(batch, input_tokens, output_tokens, compression=compression)
    use = Use(years, load, usd_per_kwh)
    result = simulate(where, what, system, work, drives)
    if not result.fits:
        fail(f"{system} on {where.name}: {result.why_not}")
    costs = economics(where, result, use)
    moved = sensitivity_of(where, what, system, work, drives) if sensitivity or plot else None
    if plot is not None:
        with _drawing():
            from machine_model.plots import draw_sensitivity

            draw_sensitivity(moved, STEP, f"{what.title}: {system} on {where.name}", plot)
    if json_output:
        print_json(
            "machine run",
            result=result.as_dict(),
            economics=costs.as_dict(),
            sensitivity=moved and [one.as_dict() for one in moved],
        )
        return
    print_table(f"{what.title} on {where.title}", *tables.results([result]))
    print_table("decode", *tables.breakdown(result))
    print_table("", *tables.utilisation(result))
    print_table(f"at a load of {load:.0%}, paid off in {years:g} years", *tables.costs(costs))
    if moved is not None:
        print_table(f"each number {STEP:.0%} lower and higher", *tables.sensitivities(moved))


@app.command()
def sweep(
    machine: MachineOption,
    model: ModelOption,
    over: Annotated[str, typer.Option(help="batch, context, output or drives.")],
    values: Annotated[str, typer.Option(help="As 1,2,4,8; powers of two if left out.")] = "",
    systems: Annotated[str, typer.Option(help="As kvfs-dense,flexgen-ssd; all if left out.")] = "",
    batch: BatchOption = 1,
    input_tokens: InputOption = 1024,
    output_tokens: OutputOption = 1024,
    drives: DrivesOption = None,
    compression: CompressionOption = 8.0,
    plot: PlotOption = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write it all into one file; needs matplotlib.")
    ] = None,
    json_output: JsonOption = False,
):
    """Show systems beside each other over batch, context, output or drives."""
    from machine_model import SYSTEMS, Workload, load_machine, load_model, tables
    from machine_model import sweep as swept

    where, what = load_machine(machine), load_model(model)
    work = Workload(batch, input_tokens, output_tokens, compression=compression)
    chosen = [name.strip() for name in systems.split(",")] if systems else list(SYSTEMS)
    numbers = _values(over, values)
    with progress_bar("simulating") as progress:
        found = []
        for done, number in enumerate(numbers):
            found += swept(where, what, chosen, work, over, [number], drives)
            progress(done + 1, len(numbers))
    found.sort(key=lambda one: chosen.index(one.system))  # of each system its values in order
    title = f"{what.title} on {where.title}"
    if plot is not None:
        _draw(found, over, title, plot)
    if report is not None:
        _write_report(report, where, what, found, over, title)
    if json_output:
        print_json("machine sweep", over=over, results=[one.as_dict() for one in found])
        return
    print_table(title, *tables.results(found, over))


@app.command()
def fleet(
    machine: MachineOption,
    model: ModelOption,
    num_drives: Annotated[int, typer.Option("--drives", help="In all.")] = 10_000,
    drives_per_host: Annotated[str, typer.Option(help="As 4,8,16.")] = "4,8,16,32",
    gpus: Annotated[int | None, typer.Option(help="Of a host; the machine's own if left out.")] = None,
    systems: Annotated[str, typer.Option(help="As kvfs-dense,kvfs-sketch.")] = "kvfs-dense,kvfs-sketch",
    batch: BatchOption = 64,
    input_tokens: InputOption = 32_768,
    output_tokens: OutputOption = 1024,
    compression: CompressionOption = 8.0,
    json_output: JsonOption = False,
):
    """Show what thousands of drives on NVMe/TCP give, and what network and hosts have to bear."""
    from machine_model import Workload, load_machine, load_model, tables
    from machine_model.fleet import FAILURES_A_YEAR
    from machine_model.fleet import fleet as fleet_of

    where, what = load_machine(machine), load_model(model)
    where = where if gpus is None else where.with_value("gpu.count", gpus)
    work = Workload(batch, input_tokens, output_tokens, compression=compression)
    hosts = _numbers("drives-per-host", drives_per_host)
    found = [
        fleet_of(where, what, name.strip(), work, num_drives, count)
        for name in systems.split(",")
        for count in hosts
    ]
    if json_output:
        print_json("machine fleet", fleets=[one.as_dict() for one in found])
        return
    print_table(
        f"{num_drives:,} drives, {what.title}, {batch} x {input_tokens:,} tokens a host", *tables.fleet(found)
    )
    one = found[0]
    print(f"Room for {one.stored_tokens / 1e9:,.1f} billion tokens of K and V.")
    print(
        f"At {FAILURES_A_YEAR:.0%} failures a year, {one.failures_a_week:.1f} drives fail a week; what a full"
        f" one held takes a host {one.recompute_seconds / 60:,.0f} minutes of prefill."
    )


@app.command()
def papers(json_output: JsonOption = False):
    """Show the papers' figures beside the model's, with one set of numbers for each machine."""
    from machine_model import paper_figures, tables

    found = paper_figures()
    if json_output:
        print_json("machine papers", figures=[one.as_dict() for one in found])
        return
    print_table("papers", *tables.papers(found), left=2)


@app.command()
def calibrate(
    place: Annotated[Path, typer.Option(help="A folder on the disk to measure; needs 2 GiB.")] = Path("."),
    json_output: JsonOption = False,
):
    """Measure this machine's rates, predict tokens/s from them, and measure these, too. Takes two minutes."""
    from machine_model.calibration import calibrate as calibrated
    from machine_model.tables import percent, quantity

    found = calibrated(place)
    if json_output:
        print_json("machine calibrate", **found.as_dict())
        return
    print_table(
        "measured rates",
        ["drives", "disk", "kernels", "command from flash", "from the cache"],
        [
            [
                str(one.num_drives),
                *(quantity(rate, "B/s") for rate in (one.disk, one.kernels)),
                *(quantity(seconds, "s") for seconds in (one.cold_command, one.warm_command)),
            ]
            for one in found.rates
        ],
    )
    print_table(
        "tokens/s of the attention of 32 layers",
        ["K and V from", "drives", "context", "predicted", "measured", "error"],
        [
            [
                one.source,
                str(one.num_drives),
                f"{one.context:,}",
                f"{one.predicted:.3g}",
                f"{one.measured:.3g}",
                percent(one.error),
            ]
            for one in found.comparisons
        ],
    )


def _values(over: str, text: str) -> list[int]:
    powers = {"batch": range(9), "context": range(10, 21), "output": range(5, 13), "drives": range(7)}
    if over not in powers:
        raise typer.BadParameter(f"{over!r} is none of {', '.join(powers)}", param_hint="--over")
    return _numbers("values", text) if text else [1 << power for power in powers[over]]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no list of numbers, as 1,2,4", param_hint=f"--{option}"
        ) from None


@contextmanager
def _drawing():
    """One line where pictures cannot be made, or not be written."""
    try:
        yield
    except ImportError as error:
        fail(f"pictures need matplotlib: pip install matplotlib ({error})")
    except (OSError, ValueError) as error:  # a folder that is not there; an ending that is no picture's
        fail(f"nothing was drawn: {error}")


def _draw(found: list, over: str, title: str, path: Path) -> None:
    with _drawing():
        from machine_model.plots import draw_sweep

        draw_sweep(found, over, title, path)


def _write_report(path: Path, machine, model, found: list, over: str, title: str) -> None:
    """What is swept, each system's costs where it fits last, and the machine's numbers."""
    from machine_model import tables
    from machine_model.economics import economics
    from machine_model.report import Report

    written = Report(title)
    work = found[0].workload
    written.words(
        f"By kvfs's machine model: {model.title}, {work.batch} sequences, {work.input_tokens} +"
        f" {work.output_tokens} tokens where nothing else is said; swept over {over}."
    )
    with tempfile.TemporaryDirectory() as folder, _drawing():
        picture = Path(folder) / "sweep.png"
        _draw(found, over, title, picture)
        written.picture("Throughput", picture)
    written.table("Results", tables.results(found, over))
    for system in dict.fromkeys(one.system for one in found):
        fitting = [one for one in found if one.system == system and one.fits]
        if fitting:
            written.table(
                f"{system}: costs at the last that fits", tables.costs(economics(machine, fitting[-1]))
            )
    written.table("The machine's numbers", tables.numbers(machine.numbers()))
    try:
        written.write(path)
    except OSError as error:
        fail(f"nothing was written: {error}")
