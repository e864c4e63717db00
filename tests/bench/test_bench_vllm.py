"""The benchmark of vLLM: what it says where vLLM is missing. With it, it takes a minute and is run by hand."""

import importlib.util

import pytest

from kvfs_bench import vllm_connector


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_missing(tmp_path):
    """A user without vLLM is told how to install it, not shown a traceback."""
    with pytest.raises(RuntimeError, match=r"pip install 'kvfs\[vllm\]'"):
        vllm_connector.measure(tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_figures():
    """Figures compared over time: a name that vanishes, or a ratio the wrong way round."""
    found, computed = [{"seconds": 0.1}] * 3, [{"seconds": 0.7}] * 3
    pairs = [(1.0, 1.02), (2.0, 2.0), (1.0, 1.01)]
    figures = {
        figure.name: figure for figure in vllm_connector._figures(pairs, computed, found, vllm_connector.FULL)
    }
    assert figures["vllm.overhead_without_hits"].value == pytest.approx(1.01)
    assert figures["vllm.overhead_without_hits"].met
    assert (
        figures["vllm.first_token_speedup"].value == pytest.approx(7)
        and figures["vllm.first_token_speedup"].met
    )
    assert {"vllm.request_1024_64", "vllm.first_token_4096_after_restart"} < figures.keys()
