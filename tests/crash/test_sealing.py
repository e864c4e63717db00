"""The simulator's short run with sealing: power cuts between and inside the commands that derive, and around
their rows.

`make sim ARGS="--mode sealing"` runs more.
"""

import pytest

from .sealing_workload import SealingSimulation


@pytest.mark.parametrize("seed", range(700, 703))
def test_sealing(seed):
    """A segment that is named and torn, of other tokens than its sequence's, or blocks that two own."""
    print(f"seed {seed}")
    report = SealingSimulation(seed).run(40)
    assert len(report.crash_points) >= 40
