"""make sim: run seeds of the simulator, on all CPUs, until they are done or one fails.

.venv/bin/python -m tests.crash.simulate 1000:2000 --crash-points 100
"""

import argparse
import gc
import itertools
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .cap_workload import CapSimulation
from .fault_schedule import FAULTS
from .ftl_simulator import FtlSimulation
from .object_workload import ObjectSimulation
from .prefix_workload import PrefixSimulation
from .report import Report, SimulationFailed
from .sealing_workload import SealingSimulation
from .set_cap_workload import SetCapSimulation
from .set_object_workload import SetObjectSimulation
from .set_prefix_workload import SetPrefixSimulation
from .set_simulator import SetSimulation
from .simulator import Simulation
from .zoned_simulator import ZonedSimulation

SIMULATIONS = {
    "store": Simulation,
    "prefix": PrefixSimulation,
    "sealing": SealingSimulation,
    "caps": CapSimulation,
    "objects": ObjectSimulation,
    "ftl": FtlSimulation,
    "zoned": ZonedSimulation,
    "set": SetSimulation,
    "set-prefix": SetPrefixSimulation,
    "set-objects": SetObjectSimulation,
    "set-caps": SetCapSimulation,
}


def parse_seeds(text: str) -> range:
    """Seeds of "7" or "1000:2000" (the second is not included)."""
    first, colon, stop = text.partition(":")
    return range(int(first), int(stop) if colon else int(first) + 1)


def run_seed(mode: str, seed: int, crash_points: int, faults: list[str]) -> Report | tuple[int, str]:
    """The report of a run, or the seed and what went wrong."""
    started = time.process_time()
    try:
        report = SIMULATIONS[mode](seed, faults).run(crash_points)
        report.cpu_seconds = time.process_time() - started
        gc.collect()  # a store and its drive are a cycle of few and large objects
        return report
    except SimulationFailed as failure:
        cause = "".join(traceback.format_exception(failure.__cause__)[-12:])
        return seed, "\n".join([*failure.done, cause, str(failure)])


def _command(seed: int, options: argparse.Namespace) -> str:
    """What runs one seed again."""
    faults = "".join(f" --fault {fault}" for fault in options.fault)
    return (
        f".venv/bin/python -m tests.crash.simulate {seed} --mode {options.mode}"
        f" --crash-points {options.crash_points}{faults} --jobs 1"
    )


def _outcomes(options: argparse.Namespace) -> Iterator[Report | tuple[int, str]]:
    """Of all seeds, as they end; one job needs no process of its own."""
    arguments = [(options.mode, seed, options.crash_points, options.fault) for seed in options.seeds]
    if options.jobs == 1:
        yield from itertools.starmap(run_seed, arguments)
        return
    with ProcessPoolExecutor(options.jobs) as pool:
        try:
            for run in as_completed([pool.submit(run_seed, *each) for each in arguments]):
                yield run.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__)
    parser.add_argument("seeds", type=parse_seeds, help="one seed, or first:stop")
    parser.add_argument("--mode", choices=SIMULATIONS, default="store")
    parser.add_argument("--crash-points", type=int, default=100, help="power cuts per seed")
    parser.add_argument("--stop-at", type=int, default=5, help="failed seeds after which no more are run")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--fault", choices=FAULTS, action="append", default=[], help="besides power cuts and bit flips"
    )
    options = parser.parse_args(arguments)
    columns = (
        TextColumn("seeds"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[points]:,} crash points, {task.fields[rate]:.0f}/s"),
        TimeRemainingColumn(),
    )
    num_failures, points, cpu_seconds, started = 0, 0, 1e-9, time.monotonic()
    with Progress(*columns, console=Console(soft_wrap=True, highlight=False, markup=False)) as progress:
        task = progress.add_task("", total=len(options.seeds), points=0, rate=0.0)
        for outcome in _outcomes(options):
            if isinstance(outcome, Report):
                points += len(outcome.crash_points)
                cpu_seconds += outcome.cpu_seconds
            else:
                seed, what = outcome
                num_failures += 1
                progress.print(f"{what}\nreplay: {_command(seed, options)}")
            rate = points / (time.monotonic() - started)
            progress.update(task, advance=1, points=points, rate=rate)
            if num_failures >= options.stop_at:
                break
        seconds = time.monotonic() - started
        progress.print(
            f"{points:,} distinct crash points in {seconds:.1f} s: {points / seconds:.0f}/s on {options.jobs}"
            f" processes, {points / cpu_seconds:.0f} per CPU second; {num_failures} seeds failed"
        )
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
