"""Fuzz the NVMe/TCP initiator: python tools/suites/fuzz_initiator.py [--pdus 1000000] [--seed 0]

A target that answers rightly, on a wire that does not keep what it carries, against the host's queue; see
tests/unit/spdk_glue/fabrics/host_fuzz.py. Exit code 1, with the seed, if a byte was where it must not be, a
command had no end or two, or a success had wrong data.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.unit.spdk_glue.fabrics.host_fuzz import fuzz

ROUNDS = 500  # of a seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pdus", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    arguments = parser.parse_args()
    seed, pdus, finished, faults, start = arguments.seed, 0, 0, Counter(), time.monotonic()
    while pdus < arguments.pdus:
        try:
            report = fuzz(seed, ROUNDS)
        except AssertionError as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            return 1
        seed, pdus, finished = seed + 1, pdus + report.pdus, finished + report.finished
        for text, count in report.faults.items():
            faults[" ".join(word for word in text.split() if not word.isdecimal())] += count
    for text, count in faults.most_common():
        print(f"{count:8} {text}")
    seconds = time.monotonic() - start
    print(f"{finished:8} rounds without a fault; {pdus} PDUs in {seconds:.0f} s, seeds up to {seed - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
