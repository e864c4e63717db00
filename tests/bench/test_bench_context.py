"""The benchmark of growing contexts at its smallest size: that it runs and keeps its schema, never how fast."""

import pytest

from kvfs_bench import context
from kvfs_bench.figures import report


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    yield context.measure(directory, quick=True)
    assert list(directory.iterdir()) == []


def test_schema_and_names(measured):
    """Figures compared over time: a name that vanishes breaks every comparison."""
    result = report("context", measured[0])
    figures = {figure["name"]: figure for figure in result["figures"]}
    for name in (
        "context.warm.512.time",
        "context.warm.fit.deviation",
        "context.cold.4k.time",
        "context.cold.fit.r_squared",
        "context.batch.16k_in_all.4.bandwidth",
        "context.batch.512_each.4.bandwidth",
        "context.memory.growth",
    ):
        assert name in figures
    assert figures["context.memory.4k.peak"]["value"] > 0


def test_the_line():
    """The verdict on linearity: of times on a line it finds the line, of others how far they are off."""
    tokens = (1 << 10, 1 << 14, 1 << 18)
    line = context.Line.through({count: 1e-3 + 1e-7 * count for count in tokens})
    assert line.fixed == pytest.approx(1e-3)
    assert line.per_token == pytest.approx(1e-7)
    assert line.r_squared == pytest.approx(1)
    assert line.deviation == pytest.approx(0, abs=1e-9)
    assert context.Line.through({count: 1e-12 * count**2 for count in tokens}).deviation > 0.5


def test_plot(measured, tmp_path):
    """A PNG."""
    pytest.importorskip("matplotlib")
    context.plot(measured[1], tmp_path / "context.png")
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")
