"""The benchmark against LMCache at its smallest: that it runs, verifies, and keeps its schema, never how
fast."""

import importlib.util

import pytest

from kvfs_bench import lmcache_l2
from kvfs_bench.figures import report


def test_without_lmcache(tmp_path, monkeypatch):
    """A traceback where a line should say what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(lmcache_l2.LMCacheMissing, match="pip install"):
        lmcache_l2.measure(tmp_path)


@pytest.mark.slow
def test_schema_and_names(tmp_path):
    """Figures compared over time: a name that vanishes breaks every comparison."""
    pytest.importorskip("lmcache.v1", reason="this benchmark needs LMCache: pip install 'kvfs[lmcache]'")
    from kvfs_bench import lmcache_restore

    found = lmcache_l2.measure(tmp_path, True) + lmcache_restore.measure(tmp_path, True)
    figures = {figure["name"]: figure for figure in report("lmcache", found)["figures"]}
    assert figures["lmcache_l2.load.over fs_native, direct.ratio"]["goal"] == 1.5
    assert figures["lmcache_l2.store.over fs, warm.ratio"]["goal"] == 1.0
    assert figures["lmcache_restore.4096_tokens.faster"]["goal"] == 1.3
    assert all(figure["value"] > 0 for figure in figures.values())
    assert list(tmp_path.iterdir()) == []
