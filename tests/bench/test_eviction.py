"""The eviction benchmark at its smallest size: a cap that holds, hits as an ideal LRU's."""

import pytest

import kvfs_bench.eviction as eviction


@pytest.mark.parametrize("trace", ["zipf", "sessions"])
def test_hits_are_those_of_an_ideal_lru_and_use_is_never_above_the_cap(trace):
    """A cap that does not hold, or recency that is recorded wrongly."""
    result = eviction.measure(trace, "lru", capacity=10)
    assert result.highest_use == 1
    assert result.hit_rate >= result.ideal_lru_hit_rate - 0.01


def test_bench_eviction():
    """`kvfsctl bench eviction`: a figure of hits and one of use for each pattern and policy, goals met."""
    found = {figure.name: figure for figure in eviction.figures(quick=True)}
    assert len(found) == 2 * len(eviction.TRACES) * len(eviction.POLICIES)
    assert all(figure.met for name, figure in found.items() if name.endswith("highest use"))
