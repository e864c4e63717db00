"""The benchmark of delayed writeback at its smallest: that it runs and keeps its schema, never how fast."""

import json

import pytest

from kvfs_bench import writeback
from kvfs_bench.figures import report


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    yield writeback.measure(directory, quick=True)
    assert list(directory.iterdir()) == []


def test_schema_and_names(measured):
    """Figures compared over time: a name that vanishes breaks every comparison."""
    result = json.loads(json.dumps(report("writeback", measured[0])))
    figures = {figure["name"]: figure for figure in result["figures"]}
    for name in (
        "writeback.prefilled.cold.bandwidth",
        "writeback.16.tokens_per_second",
        "writeback.16.append_that_spills.p99",
        "writeback.256.step_that_spills.over_others",
        "writeback.256.cold.as_written.bandwidth",
        "writeback.256.cold.compacted.of_prefilled",
        "writeback.best.tokens_per_second",
    ):
        assert name in figures


def test_what_is_the_same_on_every_machine(measured):
    """What delayed writeback is for: large writes, and no page written twice but those of small pieces."""
    figures = {figure.name: figure for figure in measured[0]}
    assert figures["writeback.16.bytes_per_spill"].value == 64
    assert figures["writeback.256.bytes_per_spill"].value == 1024
    once, twice = (figures[f"writeback.{count}.flash_pages_per_kv_page"].value for count in (256, 16))
    assert once < 1.2 < 1.8 < twice < 2.2
    for count in (16, 256):
        assert figures[f"writeback.{count}.flash_pages_per_host_page"].value < 1.01
        assert 2 * 4 <= figures[f"writeback.{count}.tail_bytes"].value <= 2 * 4 * 3  # images of 1 MiB


def test_plot(measured, tmp_path):
    """A PNG."""
    pytest.importorskip("matplotlib")
    writeback.plot(measured[1], tmp_path / "writeback.png")
    assert (tmp_path / "writeback.png").read_bytes().startswith(b"\x89PNG")
