"""The benchmark of keyed objects at its smallest: that it runs and keeps its schema, never how fast."""

from kvfs_bench import objects
from kvfs_bench.figures import report


def test_schema_and_names(tmp_path):
    """Figures compared over time: a name that vanishes breaks every comparison. The cap holds at any speed."""
    figures = {
        figure["name"]: figure for figure in report("objects", objects.measure(tmp_path, True))["figures"]
    }
    for name in ("put.bandwidth", "get.bandwidth", "put.over_files", "get.over_files"):
        assert figures[f"objects.{name}"]["value"] > 0
    assert figures["objects.get_one_at_a_time.bandwidth"]["value"] > 0
    for name in ("offered_over_cap", "most_used_over_cap", "hit_rate"):
        assert figures[f"objects.cap.{name}"]["met"]
    assert list(tmp_path.iterdir()) == []
