"""The benchmark of prefix look-ups at its smallest: that it runs and keeps its schema, never how fast."""

from kvfs_bench import prefix
from kvfs_bench.figures import report


def test_schema_and_names(tmp_path):
    """Figures compared over time: a name that vanishes breaks every comparison."""
    figures = {figure["name"]: figure for figure in report("prefix", prefix.measure(tmp_path, True))["figures"]}
    assert figures["prefix.groups_stored"]["value"] == 8 * 512
    assert figures["prefix.lookup_128k.whole.median"]["goal"] == 5
    for name in (
        "prefix.lookup_128k.whole.max",
        "prefix.lookup_128k.half.median",
        "prefix.lookup_128k.none.median",
        "prefix.lookup_128k.other_tenant.median",
        "prefix.lookup_128k.after_opening.median",
        "prefix.find_and_restore_128k",
    ):
        assert figures[name]["value"] > 0
    assert list(tmp_path.iterdir()) == []
