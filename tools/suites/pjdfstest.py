"""Run pjdfstest, the POSIX conformance suite, in a fresh mount: python tools/suites/pjdfstest.py CHECKOUT

CHECKOUT is a clone of https://github.com/pjd/pjdfstest. It is built there if it has not been (autoconf,
automake, a compiler). Has to be root: the suite changes users. Exit code 1 if a check failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mounted import mounted_drive

TAP_LINE = re.compile(r"(not )?ok (\d+)(?: (.*))?")
TAP_PLAN = re.compile(r"1\.\.(\d+)")


@dataclass
class Result:
    passed: int = 0
    failed: int = 0
    as_linux: int = 0  # of those passed: Linux differs from POSIX, as the suite knows ("TODO")
    failures: list[str] = field(default_factory=list)  # "chmod/00.t 17: what the check says"
    seconds: float = 0.0


def build(checkout: Path) -> None:
    if (checkout / "pjdfstest").exists():
        return
    for command in (["autoreconf", "-ifs"], ["./configure"], ["make"]):
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{checkout}: {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")


def run_file(test: Path, name: str, folder: str, result: Result) -> None:
    """One script of the suite, which prints a line per check (TAP)."""
    done = subprocess.run(["sh", test], cwd=folder, capture_output=True, text=True, errors="replace")
    plan = TAP_PLAN.search(done.stdout)
    seen = set()
    for line in done.stdout.splitlines():
        match = TAP_LINE.fullmatch(line.strip())
        if match:
            seen.add(int(match[2]))
            if match[1] and (match[3] or "").startswith("# TODO"):
                result.as_linux += 1
            elif match[1]:
                result.failures.append(f"{name} {match[2]}: {match[3] or ''}")
    expected = int(plan[1]) if plan else 0
    missing = expected - len(seen)
    if missing > 0 or plan is None:
        result.failures.append(f"{name}: ended after {len(seen)} of {expected or 'unknown'} checks")
    failed = sum(failure.startswith(f"{name} ") for failure in result.failures) + max(missing, 0)
    result.failed += failed
    result.passed += max(expected, len(seen)) - failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument(
        "--only", default="", help="only files whose name holds this, such as rename/ or chmod/00"
    )
    parser.add_argument("--size", default="512MiB", help="of the drive")
    parser.add_argument("--mountpoint", type=Path, help="run in what is mounted there, not in a fresh mount")
    parser.add_argument("--json", action="store_true", dest="json_output")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("pjdfstest changes users: run it as root")
    checkout = arguments.checkout.resolve()
    build(checkout)
    tests = {str(test.relative_to(checkout / "tests")): test for test in sorted(checkout.glob("tests/**/*.t"))}
    tests = {name: test for name, test in tests.items() if arguments.only in name}
    if not tests:
        sys.exit(f"{checkout}: no tests of that name; is it a checkout of pjdfstest?")
    result, started = Result(), time.monotonic()
    with (
        mounted_drive(arguments.size, arguments.mountpoint) as mountpoint,
        tempfile.TemporaryDirectory(dir=mountpoint) as folder,
    ):
        os.chmod(folder, 0o755)
        for number, (name, test) in enumerate(tests.items(), 1):
            if sys.stderr.isatty():
                print(f"\r{number} of {len(tests)}: {name:30}", end="", file=sys.stderr)
            run_file(test, name, folder, result)
    result.seconds = round(time.monotonic() - started, 1)
    report(result, arguments.json_output)
    sys.exit(1 if result.failed else 0)


def report(result: Result, json_output: bool) -> None:
    if json_output:
        print(json.dumps({"suite": "pjdfstest", **asdict(result)}, indent=2))
        return
    for failure in result.failures:
        print(failure)
    total = result.passed + result.failed
    print(
        f"pjdfstest: {result.passed} of {total} checks passed ({result.as_linux} as Linux has it),"
        f" {result.failed} failed, {result.seconds} s"
    )


if __name__ == "__main__":
    main()
