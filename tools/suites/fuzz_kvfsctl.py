"""Fuzz the command line: python tools/suites/fuzz_kvfsctl.py [--seconds 180] [--seed 0]

Random words over all verbs and options, see tests/unit/kvfsctl/fuzzing.py. Exit code 1, with the seed and the
command line, if one ended with a traceback, with more than a line, with a code that is not in the table, or not
within a minute.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.unit.kvfsctl.fuzzing import command_line, complaint_about, leaves, make_places

PATIENCE_SECONDS = 60
ROUND = 50  # command lines between two fresh copies of the places


def _give_up(*_) -> None:
    raise TimeoutError(f"still at it after {PATIENCE_SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--seed", type=int, default=0, help="the first: each is good for 50 command lines")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, _give_up)
    verbs, seed, count, end = leaves(), arguments.seed, 0, time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as name:
        template, scratch = Path(name, "template"), Path(name, "scratch")
        template.mkdir()
        make_places(template)
        while time.monotonic() < end:
            shutil.copytree(template, scratch, symlinks=True)
            os.chdir(scratch)
            choose = random.Random(seed)
            for _ in range(ROUND):
                line = command_line(choose, verbs)
                signal.alarm(PATIENCE_SECONDS)
                found = complaint_about(line)
                signal.alarm(0)
                count += 1
                if found:
                    print(f"seed {seed}, {line}: {found}", file=sys.stderr)
                    return 1
            os.chdir(name)
            shutil.rmtree(scratch)
            seed += 1
    print(f"{count} command lines without a fault, seeds up to {seed - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
