"""The simulator's short run with caches of objects: power cuts between and inside put, get and eviction.

`make sim ARGS="--mode objects"` runs more.
"""

import pytest

from .object_workload import ObjectSimulation
from .set_object_workload import SetObjectSimulation

FOUND = (694,)  # a cap that was durable before the eviction it had asked for


@pytest.mark.parametrize("seed", range(600, 602))
def test_objects(seed):
    """A flushed object that is gone, other bytes under a key, a cap that did not hold, blocks of nobody."""
    print(f"seed {seed}")
    report = ObjectSimulation(seed).run(30)
    assert len(report.crash_points) >= 30


@pytest.mark.parametrize("seed", FOUND)
def test_found_seeds_of_objects(seed):
    """What campaigns have found."""
    print(f"seed {seed}")
    ObjectSimulation(seed).run(100)


def test_objects_of_sets():
    """The same over several drives that come and go: a deleted object that is back, one on two drives."""
    print("seed 800")
    report = SetObjectSimulation(800).run(20)
    assert len(report.crash_points) >= 20
