"""The demo's figures, table and plot, from results without running anything."""

import dataclasses
import io

import pytest
from rich.console import Console

from kvfs_bench.figures import report
from kvfsctl import demo_plot
from kvfsctl.demo_report import Outcome, common_prefix, figures, summary, table

FIGURE_KEYS = {"name", "value", "unit", "rival", "rival_value", "ratio", "limit", "goal", "met"}


@pytest.fixture
def outcome():
    """A run of 4,096 tokens of context, 4 generated, 2 after reopening."""
    speed = {"prefill_s": 1.0, "tokens_per_second": 50.0, "peak_rss_bytes": 1 << 29, "cpus_elsewhere": 0.0}
    flash = {"bytes_read": 1 << 20, "bytes_written": 2 << 20, "waf": 1.25}
    kvfs = speed | {
        "tokens": [1, 2, 3, 4],
        "flash": flash,
        "attention": {"core_units": 0, "core_cycles": 0, "core_bytes": 0, "fallback_units": 0},
        "link_bytes_per_token": 20_000,
        "commands_per_token": 12.0,
        "num_query_heads": 8,
        "num_kv_heads": 2,
    }
    continued = kvfs | {"tokens": [5, 6], "open_s": 0.5, "tokens_from_flash": 4099}
    plain = speed | {"tokens": [1, 2, 3, 4, 5, 6], "tokens_per_second": 100.0, "loss": 2.5}
    offloading = speed | {"tokens": [1, 2, 3, 4], "link_bytes_per_token": 12_000_000}
    return Outcome("float16", 4096, 4, 2, plain, plain, kvfs, continued, offloading)


def by_name(outcome):
    return {figure.name: figure.as_dict() for figure in figures(outcome)}


def test_every_figure_has_the_schema(outcome):
    """Without it: what compares figures over time stumbles over a missing key."""
    printed = report("demo", figures(outcome))
    assert set(printed) == {"schema", "bench", "machine", "figures"}
    assert all(set(figure) == FIGURE_KEYS for figure in printed["figures"])
    assert len({figure["name"] for figure in printed["figures"]}) == len(printed["figures"])


def test_link_goal_and_ratios(outcome):
    """Without it: a goal that is missed is reported as reached."""
    found = by_name(outcome)
    assert found["demo.link_bytes_ratio"]["value"] == 600
    assert found["demo.link_bytes_ratio"]["goal"] == pytest.approx(409.6)
    assert found["demo.link_bytes_ratio"]["met"] is True
    assert found["demo.tokens_per_second"]["ratio"] == 0.5
    assert found["demo.flash_bytes_read"]["value"] == 2 << 20
    slower = dataclasses.replace(outcome, offloading=outcome.offloading | {"link_bytes_per_token": 8_000_000})
    assert by_name(slower)["demo.link_bytes_ratio"]["met"] is False


@pytest.mark.parametrize(
    ("first", "after", "expected"), [([1, 2, 9, 4], [5, 6], (2, 2)), ([1, 2, 3, 4], [5, 7], (4, 1))]
)
def test_a_different_token_shows(outcome, first, after, expected):
    """Without it: wrong tokens are reported as identical."""
    wrong = dataclasses.replace(
        outcome, kvfs=outcome.kvfs | {"tokens": first}, continued=outcome.continued | {"tokens": after}
    )
    assert (wrong.identical, wrong.identical_after_reopening) == expected
    assert not wrong.all_identical and outcome.all_identical
    found = by_name(wrong)
    assert not (found["demo.tokens_identical"]["met"] and found["demo.tokens_identical_after_reopening"]["met"])
    assert any("NO, the first" in line for line in summary(wrong))


def test_fewer_tokens_are_not_identical(outcome):
    """Without it: a generation that stops early passes."""
    short = dataclasses.replace(outcome, kvfs=outcome.kvfs | {"tokens": [1, 2, 3]})
    assert not short.all_identical
    assert common_prefix([], [1]) == 0


def test_a_busy_machine_is_mentioned(outcome):
    """Without it: a rival that was disturbed by other processes looks slow."""
    assert not any("other processes" in line for line in summary(outcome))
    disturbed = dataclasses.replace(outcome, offloading=outcome.offloading | {"cpus_elsewhere": 1.3})
    assert any("1.3 CPUs busy during offloading" in line for line in summary(disturbed))


def test_the_table_shows_units_and_all_columns(outcome):
    """Without it: people read numbers without units."""
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(outcome))
    text = console.export_text()
    for word in ("tokens/s", "50.0", "100.0", "19.5 KiB", "11.4 MiB", "1.250", "512.0 MiB", "offloading"):
        assert word in text


def test_plot_and_its_figures(tmp_path):
    """Without it: `--plot` fails after minutes of measuring."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install matplotlib")
    points = {
        (way, context): {"tokens_per_second": 50.0 + context} | link
        for way, link in (
            ("kvfs_generate", {"link_bytes_per_token": 2e4}),
            ("in_memory", {}),
            ("offloading", {"link_bytes_per_token": 1e7}),
        )
        for context in (512, 4096)
    }
    demo_plot.plot(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    names = {figure.name for figure in demo_plot.point_figures(points)}
    assert "demo.context_512.kvfs.link_bytes_per_token" in names and len(names) == 10


def test_cycles_of_an_fpga_are_told(outcome):
    """Of each phase that had such a worker, and of no other."""
    assert not [line for line in summary(outcome) if "FPGA" in line]
    outcome.kvfs["attention"] = {
        "core_units": 10,
        "core_cycles": 1000,
        "core_bytes": 64_000,
        "fallback_units": 1,
    }
    lines = [line for line in summary(outcome) if "FPGA" in line]
    assert lines == [
        "FPGA cores: 10 units, 1,000 cycles, 64.0 bytes of K and V a cycle (1.00 beats of 64): 19.2 GB/s each,"
        " modelled at 300 MHz; 1 units left to numba"
    ]
