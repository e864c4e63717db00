"""Run fsx, the file system exerciser, in a fresh mount: python tools/suites/fsx.py FSX [--operations 100000]

FSX is a binary, or a checkout of xfstests in which ltp/fsx has been built. Every seed runs with buffered I/O
and memory maps, and with direct I/O (-Z, without maps). What follows -- are options of fsx itself: its files
and writes are small, with `-- -l 6000000 -o 1500000` they are large. Exit code 1 if a run found wrong data.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mounted import mounted_drive

# direct I/O in whole blocks: -Z wants them aligned, and mixes badly with maps of the same file
MODES = {"buffered": [], "direct": ["-Z", "-R", "-W", "-r", "4096", "-w", "4096", "-t", "4096"]}
LAST_LINES = 20


@dataclass
class Run:
    mode: str
    seed: int
    passed: bool
    seconds: float
    message: str


def find_binary(path: Path) -> Path:
    for candidate in (path, path / "ltp" / "fsx", path / "fsx"):
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate.resolve()
    sys.exit(f"{path}: neither fsx nor a checkout with ltp/fsx built in it")


def run_fsx(binary: Path, folder: Path, mode: str, seed: int, operations: int, extra: list[str]) -> Run:
    file = folder / f"{mode}-{seed}"
    command = [binary, "-q", "-N", str(operations), "-S", str(seed), *MODES[mode], *extra, file]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    lines = (done.stdout + done.stderr).strip().splitlines()
    message = "" if done.returncode == 0 else "\n".join([*lines[:LAST_LINES], "...", *lines[-LAST_LINES:]])
    return Run(mode, seed, done.returncode == 0, round(time.monotonic() - started, 1), message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fsx", type=Path)
    parser.add_argument("--operations", type=int, default=100_000, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--modes", default=",".join(MODES), help="buffered, direct or both")
    parser.add_argument("--size", default="512MiB", help="of the drive")
    parser.add_argument("--mountpoint", type=Path, help="run in what is mounted there, not in a fresh mount")
    parser.add_argument("--json", action="store_true", dest="json_output")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, extra = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    modes = arguments.modes.split(",")
    if not set(modes) <= set(MODES):
        parser.error(f"modes are {', '.join(MODES)}")
    binary = find_binary(arguments.fsx)
    runs = []
    with mounted_drive(arguments.size, arguments.mountpoint) as mountpoint:
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for mode in modes:
                run = run_fsx(binary, mountpoint, mode, seed, arguments.operations, extra)
                runs.append(run)
                if not arguments.json_output:
                    verdict = "passed" if run.passed else f"FAILED\n{run.message}"
                    print(f"fsx {mode}, seed {seed}, {arguments.operations} operations: {verdict}", flush=True)
    if arguments.json_output:
        print(json.dumps({"suite": "fsx", "runs": [asdict(run) for run in runs]}, indent=2))
    sys.exit(0 if all(run.passed for run in runs) else 1)


if __name__ == "__main__":
    main()
