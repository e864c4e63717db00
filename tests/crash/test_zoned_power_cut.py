"""The translation layer on a zoned drive: power cuts and killed hosts, at every operation of the drive.

The long run is `make sim ARGS="--mode zoned"`.
"""

import pytest

from .zoned_simulator import ZonedSimulation

CRASHES_PER_SEED = 12


@pytest.mark.parametrize("seed", range(6))
def test_crashes(seed):
    """Flushed data after any end, and a layer that goes on: the drive refuses whatever breaks a zone's rules."""
    print(f"seed {seed}")
    report = ZonedSimulation(seed).run(CRASHES_PER_SEED)
    assert len(report.crash_points) >= CRASHES_PER_SEED


@pytest.mark.parametrize("seed", range(2))
def test_zones_that_wear_out(seed):
    """One that can only be read any more: what it holds is moved, and nothing is lost."""
    print(f"seed {seed}")
    ZonedSimulation(seed, ["weak-blocks"]).run(CRASHES_PER_SEED)


@pytest.mark.parametrize("seed", range(2))
def test_a_crash_in_every_operation(seed):
    """No operation is too short for the power to fail in it: writes, resets, finishes and flushes, each in turn."""
    print(f"seed {seed}")
    simulation = ZonedSimulation(seed)
    simulation.what_if_chance, simulation.longest_cut = 1.0, 60
    report = simulation.run(60)
    assert len({operation for operation, _ in report.crash_points}) >= 40


def test_runs_repeat():
    """A seed that fails must fail again."""
    first, second = (ZonedSimulation(5).run(4) for _ in range(2))
    assert (first.digest, first.crash_points) == (second.digest, second.crash_points)
