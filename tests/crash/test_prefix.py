"""The simulator's short run with prefix reuse: power cuts between and inside publish, find and restore.

`make sim ARGS="--mode prefix"` runs more.
"""

import pytest

from .prefix_workload import PrefixSimulation
from .set_prefix_workload import SetPrefixSimulation

FOUND = (2683,)  # a part group on flash that a store with a larger writeback_tokens gave up


@pytest.mark.parametrize("seed", range(500, 504))
def test_prefixes(seed):
    """Entries without their groups, groups without their tokens, another's keys and values under a prompt."""
    print(f"seed {seed}")
    report = PrefixSimulation(seed).run(40)
    assert len(report.crash_points) >= 40


@pytest.mark.parametrize("seed", FOUND)
def test_found_seeds_of_prefixes(seed):
    """What campaigns have found."""
    print(f"seed {seed}")
    PrefixSimulation(seed).run(100)


@pytest.mark.parametrize("seed", range(700, 702))
def test_prefixes_of_sets(seed):
    """The same over several drives, of which one is behind, moves away or has forgotten."""
    print(f"seed {seed}")
    report = SetPrefixSimulation(seed).run(40)
    assert len(report.crash_points) >= 40
