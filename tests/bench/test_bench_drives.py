"""The benchmark of drive sets at its smallest: that it runs and keeps its schema, never how fast."""

import json

from kvfs_bench import drives
from kvfs_bench.figures import report


def test_schema_and_names():
    """Figures compared over time: a name that vanishes breaks every comparison."""
    result = json.loads(json.dumps(report("drives", drives.measure(quick=True))))
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert list(figures) == ["drives.1.tokens", "drives.2.tokens", "drives.8.tokens"]
    for figure in figures.values():
        assert 0 < figure["value"] <= 1.05 * figure["limit"]
    assert "sleeping" in drives.settings()["flash"]
