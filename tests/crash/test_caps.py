"""Caps and power cuts: charges, caps and pins after each recovery."""

import pytest

from .cap_workload import CapSimulation


@pytest.mark.parametrize("seed", range(2, 5))
def test_caps(seed):
    """More under a cap than it allows, or a pinned sequence that is gone, once the power has failed."""
    print(f"seed {seed}")
    simulation = CapSimulation(seed)
    report = simulation.run(40)
    assert len(report.crash_points) >= 40
    assert simulation.workload.evictions
