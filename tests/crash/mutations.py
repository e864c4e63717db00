"""make mutations: is the simulator any good? Lines are broken on purpose, one at a time; it must notice each.

Every mutation is one text of one file replaced by another, in a copy of the tree that the simulator then runs
with a few seeds. Killed: a run failed or did not end. Survived: nothing was noticed. Stale: the text is no
longer there, so the list has to follow the code; that is an error.

Some faults took campaigns of ten thousand and more crash points to find, which is too many to spend on each
mutation. What such a campaign finds becomes a test that needs no luck, and those tests are run before the long
simulations; the score says how many fell to them.

    .venv/bin/python -m tests.crash.mutations --json
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .mutation_list import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("accel", "ftl", "kvfs", "spdk_glue", "tests", "pyproject.toml")
# (mode, first seed, seeds, crash points of each, faults): short runs first, until one kills
STORE_RUNS = (("store", 0, 4, 60, ()), ("store", 10, 25, 150, ()))
FOUND_IN_STORE = (
    "tests/unit/kvfs/test_free_space.py",
    "tests/crash/test_simulator.py::test_found_seeds_of_the_store",
)
FOUND_IN_FLASH = (
    "tests/unit/ftl/test_recovery.py",
    "tests/unit/ftl/test_page_chain.py",
    "tests/crash/test_simulator.py::test_found_seeds",
    "tests/crash/test_ftl_faults.py",
)
ZONED_FILES = ("ftl/zones.py", "ftl/zoned_blocks.py", "ftl/media_zoned.py")
FOUND_IN_ZONES = (
    "tests/crash/test_zoned_power_cut.py::test_blocks_in_zones",
    "tests/unit/ftl/test_zoned_blocks.py",
    "tests/unit/ftl/test_media_zoned.py",
)
ZONED_RUNS = (
    ("zoned", 0, 8, 25, ()),
    ("zoned", 100, 4, 30, ("weak-blocks",)),
    ("zoned", 20, 20, 40, ()),
)
FLASH_RUNS = (
    ("ftl", 0, 15, 60, ()),
    ("ftl", 100, 8, 50, ("weak-blocks",)),
    ("ftl", 150, 10, 50, ("parity", "weak-blocks")),
    ("ftl", 200, 8, 50, ("lost-writes",)),
    ("ftl", 250, 8, 50, ("parity", "lost-writes")),
    ("ftl", 300, 4, 50, ("parity", "dead-die")),
    ("ftl", 50, 30, 80, ("parity",)),
    ("ftl", 400, 10, 60, ("parity", "weak-blocks")),
    ("store", 0, 4, 40, ()),
)
SET_RUNS = (("set", 0, 4, 40, ()), ("set-prefix", 700, 4, 40, ()), ("set", 100, 20, 40, ()))
FOUND_IN_SETS = tuple(
    f"tests/unit/kvfs/drive_set/test_{name}.py"
    for name in ("missed_deletions", "recovery", "drive_set", "prefixes", "objects")
)
PREFIX_RUNS = (("prefix", 500, 4, 40, ()), ("prefix", 0, 25, 40, ()))
FOUND_IN_PREFIXES = ("tests/unit/kvfs/prefix", "tests/property/test_prefix.py")
OBJECT_RUNS = (("objects", 600, 4, 40, ()), ("objects", 610, 25, 60, ()))
FOUND_IN_OBJECTS = ("tests/unit/kvfs/objects", "tests/property/test_objects.py")
SEALING_RUNS = (("sealing", 700, 4, 40, ()), ("sealing", 710, 25, 60, ()))
FOUND_IN_SEALING = ("tests/unit/kvfs/sealing",)
CAP_RUNS = (("caps", 800, 4, 40, ()), ("caps", 810, 15, 60, ()))
SET_CAP_FILES = ("kvfs/space/set_caps.py", "kvfs/space/set_space.py")
SET_CAP_RUNS = (("set-caps", 7, 2, 40, ()), ("set-caps", 35, 8, 60, ()))
FOUND_IN_CAPS = ("tests/unit/kvfs/space",)
# A run that does not end counts as killed: one that waits for ever, or takes so much processor time. Without a
# mutation the longest takes some 200 s.
LONGEST_CPU_S = 600
# Without so much processor time in so long; a machine with other work gives more, a progress bar takes less.
STALL_S, STALL_CPU_S = 30, 1.0
POLL_S = 5
WANTED = 0.95


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation. state: killed, survived or stale; by: the run's last line; by_found: a test of
    what an earlier campaign had found."""

    mutation: Mutation
    state: str
    by: str
    seconds: float
    by_found: bool = False


def find(mutation: Mutation, tree: Path) -> int:
    """How often the old text is in its file."""
    path = tree / mutation.file
    return path.read_text().count(mutation.old) if path.exists() else 0


def copy_tree(target: Path) -> Path:
    """A tree of its own for one mutation, with the compiled parts of this one."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("numba._*"))
        else:
            shutil.copy(source, target / name)
    return target


def try_mutation(mutation: Mutation) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvfs-mutation-") as folder:
        tree = copy_tree(Path(folder))
        if find(mutation, tree) != 1:
            return Outcome(mutation, "stale", f"{find(mutation, tree)} places in {mutation.file}", 0.0)
        path = tree / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        runs, tests = STORE_RUNS, FOUND_IN_STORE
        if mutation.file in ZONED_FILES:
            runs, tests = ZONED_RUNS, FOUND_IN_ZONES
        elif mutation.file.startswith("kvfs/drive_set/"):
            runs, tests = SET_RUNS, FOUND_IN_SETS
        elif mutation.file.startswith("kvfs/prefix/"):
            runs, tests = PREFIX_RUNS, FOUND_IN_PREFIXES
        elif mutation.file.startswith("kvfs/objects/"):
            runs, tests = OBJECT_RUNS, FOUND_IN_OBJECTS
        elif mutation.file.startswith(("kvfs/sealing/", "accel/seal")):
            runs, tests = SEALING_RUNS, FOUND_IN_SEALING
        elif mutation.file in SET_CAP_FILES:
            runs, tests = SET_CAP_RUNS, FOUND_IN_CAPS
        elif mutation.file.startswith("kvfs/space/"):
            runs, tests = CAP_RUNS, FOUND_IN_CAPS
        elif mutation.file.startswith("ftl/"):
            runs, tests = FLASH_RUNS, FOUND_IN_FLASH
        short, *long = [_simulation(*run) for run in runs]
        found = ["pytest", "-qx", "-p", "no:cacheprovider", *tests]
        for arguments in (short, found, *long):
            by = run_module(tree, arguments)
            if by is not None:
                return Outcome(mutation, "killed", by, time.monotonic() - started, arguments is found)
    return Outcome(mutation, "survived", "", time.monotonic() - started)


def _simulation(mode: str, first: int, count: int, crash_points: int, faults) -> list[str]:
    arguments = ["tests.crash.simulate", f"{first}:{first + count}", "--mode", mode, "--jobs", "1"]
    arguments += [f"--fault={fault}" for fault in faults]
    return [*arguments, "--crash-points", str(crash_points), "--stop-at", "1"]


def run_module(tree: Path, arguments: list[str], environment: dict[str, str] | None = None) -> str | None:
    """How a module's run in a tree ended, or None if all was well. environment: more than this process's."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    used, used_at = 0.0, time.monotonic()
    while True:
        try:
            output, _ = process.communicate(timeout=POLL_S)
            break
        except subprocess.TimeoutExpired:
            now = _cpu_seconds(process.pid)
            if now > used + STALL_CPU_S:
                used, used_at = now, time.monotonic()
            if now > LONGEST_CPU_S or time.monotonic() - used_at > STALL_S:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return "no end"
    if process.returncode == 0:
        return None
    said = [line for line in output.splitlines() if line.startswith(("seed ", "FAILED ", "ERROR "))]
    return [f"ended with {process.returncode}", *output.strip().splitlines(), *said][-1]


def _cpu_seconds(pid: int) -> float:
    """Of a process that has not been waited for, and of its children that have."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make mutations", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutations to try, all by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    chosen = [mutation for mutation in MUTATIONS if not options.names or mutation.name in options.names]
    console = Console(stderr=options.json, markup=False, highlight=False, soft_wrap=True)
    with Progress(console=console) as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task("mutations", total=len(chosen))
        outcomes = []
        for run in as_completed([pool.submit(try_mutation, mutation) for mutation in chosen]):
            outcome = run.result()
            outcomes.append(outcome)
            progress.print(f"{outcome.state:8} {outcome.seconds:4.0f} s  {outcome.mutation.name}: {outcome.by}")
            progress.advance(task)
    killed = sum(outcome.state == "killed" for outcome in outcomes)
    stale = sum(outcome.state == "stale" for outcome in outcomes)
    if options.json:
        found = {"score": score(outcomes), "outcomes": [asdict(outcome) for outcome in outcomes]}
        print(json.dumps(found, indent=1))
    else:
        console.print(_table(outcomes))
        by_found = sum(outcome.by_found for outcome in outcomes)
        told = f"{score(outcomes):.1%}, {by_found} of them by tests of what campaigns had found; {stale} stale"
        console.print(f"{killed} of {len(outcomes) - stale} killed: {told}")
    return 0 if score(outcomes) >= WANTED and not stale else 1


def score(outcomes: list[Outcome]) -> float:
    """The share that was killed of those that are not stale."""
    states = [outcome.state for outcome in outcomes if outcome.state != "stale"]
    return states.count("killed") / max(1, len(states))


def _table(outcomes: list[Outcome]) -> Table:
    table = Table("mutation", "file", "state", "by")
    for outcome in outcomes:
        mutation = outcome.mutation
        table.add_row(mutation.name, mutation.file, outcome.state, outcome.by[:90])
    return table


if __name__ == "__main__":
    sys.exit(main())
