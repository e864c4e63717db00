"""`kvfsctl bench nvme`, short: that it runs, and that each figure is there with its rival's."""

import json
import subprocess
import sys

import pytest

from spdk_glue import spdk_target


@pytest.mark.slow
def test_bench_nvme():
    done = subprocess.run(
        [sys.executable, "-m", "kvfsctl", "bench", "nvme", "--quick", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = {figure["name"]: figure for figure in json.loads(done.stdout)["figures"]}
    for name in ("pyspdk.random_read_4k", "pyspdk.read_128k", "attention.cold.spdk"):
        assert figures[name]["value"] > 0 and figures[name]["rival_value"] > 0
        assert figures[f"{name}.ratio"]["goal"] is not None
    for name in ("initiator.random_read_4k", "initiator.read_128k"):
        assert figures[name]["value"] > 0 and figures[name]["rival_value"] > 0
    for name in ("target.disk.read_128k", "target.disk.random_read_4k"):
        assert figures[name]["value"] > 0 and figures[f"{name}.ratio"]["goal"] is not None
    assert figures["target.attention.over_kernel"]["value"] > 0
    assert figures["attention.in_process.over_kernel"]["value"] > 0
    if spdk_target.available()[0]:
        for name in ("disk.read_128k", "disk.random_read_4k"):
            assert figures[f"spdk_plug_in.{name}"]["value"] > 0
            assert figures[f"spdk_plug_in.{name}.ratio"]["goal"] == 0.85
