"""The churn and overhead benchmarks at their smallest: names, schema and write amplification, never time."""

import pytest

from ftl.geometry import Geometry
from kvfs.placement import PlacementPolicy
from kvfs_bench import churn, ftl_overhead
from kvfs_bench.figures import report

FIELDS = {"name", "value", "unit", "rival", "rival_value", "ratio", "limit", "goal", "met"}


@pytest.fixture(scope="module")
def measured():
    return churn.measure(short=True, num_processes=1)


@pytest.fixture
def figures(measured):
    found = report("churn", measured[0])
    assert found["schema"] == 1
    return {figure["name"]: figure for figure in found["figures"]}


def test_names_and_schema(figures):
    """Figures compared over time: a name or field that vanishes breaks every comparison."""
    assert all(set(figure) == FIELDS for figure in figures.values())
    for name in (
        "gc.uniform.op28.waf",
        "gc.uniform.op12_5.deviation",
        "churn.random.full90.waf",
        "churn.random.full90.waf_page_mapped_greedy",
        "churn.random.full90.waf_sizes_unknown",
        "churn.short_predicted.full90.waf",
        "gc.policy.greedy.waf",
        "gc.policy.cost-benefit.waf",
        "gc.policy.d-choices.waf",
    ):
        assert name in figures


def test_uniform_overwrites(figures):
    """A simulator that is wrong here proves nothing elsewhere; so small a drive is near, not within 4%."""
    for spare in ("12_5", "28"):
        assert figures[f"gc.uniform.op{spare}.deviation"]["value"] < 0.15


def test_placement_pays(figures):
    """The point of placing by lifetime: if this fails, every sequence is copied over and over."""
    placed = figures["churn.random.full90.waf"]
    assert placed["value"] < 1.02 < 3 < placed["rival_value"]
    assert figures["churn.random.full90.waf_sizes_unknown"]["value"] < 1.03
    short = figures["churn.short_predicted.full90.waf"]
    assert short["value"] < 1.25 < 3 < short["rival_value"]


def test_plot(measured, tmp_path):
    """A PNG with both lines."""
    pytest.importorskip("matplotlib")
    churn.plot(measured[1], tmp_path / "waf.png")
    assert (tmp_path / "waf.png").read_bytes().startswith(b"\x89PNG")


def test_overhead_names(tmp_path):
    """As above; and that wear stays even, which is the same on every machine."""
    figures = {f.name: f for f in ftl_overhead.measure(tmp_path, quick=True)}
    for name in ("ftl.map_pages_per_second", "ftl.read_overhead", "ftl.ram_fraction", "wear.spread"):
        assert name in figures
    assert figures["ftl.ram_fraction"].met and figures["wear.spread"].met
    assert list(tmp_path.iterdir()) == []


def test_placement_ids_keep_apart():
    """Large sequences alone, short ones by death: mixing them is what costs copies."""
    unit = Geometry().superblock_bytes
    policy = PlacementPolicy(unit, first_id=4, horizon=240.0)
    large = [policy.place(number, 4 * unit + 1, 0.0, None) for number in range(100)]
    assert len({place.own_id for place in large}) == 100
    assert all(place.identifier(4 * unit - 1) == place.own_id for place in large)
    assert {place.identifier(4 * unit) for place in large}.isdisjoint({place.own_id for place in large})
    soon, later, same = (
        policy.place(n, unit // 2, 0.0, at).identifier(0) for n, at in ((1, 5), (2, 55), (3, 6))
    )
    assert soon == same != later
    far = policy.place(9, unit // 2, 0.0, 1e9).identifier(0)
    assert far == policy.place(17, unit // 2, 0.0, None).identifier(0) not in (soon, later)
    unknown = policy.place(5, None, 0.0, None)
    assert unknown.identifier(0) == unknown.identifier(100 * unit)
