"""The X-cache benchmark at its smallest: that it runs and keeps its schema, never how fast."""

import json

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install torch transformers")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install torch transformers")

from kvfs_bench import x_cache
from kvfs_bench.figures import report


def test_schema_and_names():
    """Figures compared over time: a name that vanishes breaks every comparison. It also compares tokens."""
    result = json.loads(json.dumps(report("x-cache", x_cache.measure(quick=True))))
    figures = {figure["name"]: figure for figure in result["figures"]}
    kinds = ("tokens", "share", "layers")
    assert list(figures) == [f"x_cache.{place}.{kind}" for place in ("drive", "host") for kind in kinds]
    for place in ("drive", "host"):
        assert (
            0
            < figures[f"x_cache.{place}.tokens"]["value"]
            <= 1.05 * figures[f"x_cache.{place}.tokens"]["limit"]
        )
    assert "sleeping" in x_cache.settings()["link"]
