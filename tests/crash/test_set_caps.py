"""Caps of a set of drives and power cuts: charges, caps and pins after each recovery."""

from dataclasses import replace

from .set_cap_workload import SetCapSimulation


def test_set_caps():
    """More under a cap than it allows, a cap that is gone, half an evicted sequence, a pinned one evicted."""
    simulation = SetCapSimulation(8)
    report = simulation.run(40)
    assert len(report.crash_points) >= 40
    assert simulation.workload.evictions


def test_every_media_operation():
    """Nothing is left to chance: the power fails in each operation of any drive, one after the other."""
    simulation = SetCapSimulation(7)
    simulation.schedule = replace(simulation.schedule, what_if_chance=2.0)
    report = simulation.run(25)
    assert len(report.crash_points) >= 25
    assert simulation.workload.evictions
