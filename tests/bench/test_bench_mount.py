"""The benchmark of the mount at its smallest size: that it runs and keeps its schema, never how fast."""

import os
import shutil

import pytest

from kvfs_bench import mount
from kvfs_bench.figures import report

pytestmark = [
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no /dev/fuse to mount with"),
    pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed"),
]


def test_schema_and_names(tmp_path):
    """Figures compared over time, each with its rival; and nothing stays mounted or on disk."""
    steps = []
    result = report("mount", mount.measure(tmp_path, quick=True, progress=steps.append))
    figures = {figure["name"]: figure for figure in result["figures"]}
    sizes = ("read_1m_direct", "write_1m_buffered", "kv_read_1m_direct", "read_4k")
    for name in (*sizes, "create", "stat", "unlink"):
        figure = figures[f"mount.{name}"]
        assert figure["rival"] == mount.PASSTHROUGH and figure["ratio"] > 0 and figure["limit"] > 0
    assert {"remote.attend.4096.overhead", "remote.append.1024_tokens_a_call"} <= set(figures)
    assert len(steps) == 5  # requests, files in each of three targets, and the store in another process
    assert list(tmp_path.iterdir()) == []
