"""The admission benchmark at its smallest size: less is written, and some hits are lost for it."""

import pytest

import kvfs_bench.admission as admission


@pytest.mark.parametrize("trace", ["zipf", "scans"])
def test_second_sight_spares_flash(trace):
    """A rule that spares nothing, or that never stores anything."""
    every, second = (admission.measure(trace, rule, capacity=10) for rule in ("all", "second-sight"))
    assert second.written_caps < every.written_caps
    assert second.spared_caps > 0 and second.hit_rate > 0
