"""The decode benchmark at its smallest: names, schema, that all compute the same; never how fast."""

import signal
from multiprocessing import get_context

import numpy as np
import pytest

pytest.importorskip("torch", reason="the rivals need torch: pip install torch")

from kvfs_bench import decode
from kvfs_bench.decode_shape import Shape, decoded, prompt, reference
from kvfs_bench.figures import report
from kvfs_bench.memory_cap import memory_cap


def test_contenders_agree(tmp_path):
    """A contender that computes something else, or reads nothing, makes every ratio worthless."""
    measured, settings = decode.measure(tmp_path, quick=True)
    figures = {figure["name"]: figure for figure in report("decode", measured)["figures"]}
    for name in decode.CLASSES:
        assert settings[name]
        if name == decode.LMCACHE and "not installed" in settings[name]:
            continue
        assert figures[f"decode.{name}.relative_error_max"]["met"], name
        assert figures[f"decode.{name}.tokens_per_second"]["value"] > 0
    for name in (decode.KVFS, decode.DIRECT):  # K/V is four times the cap: most of it has to be read
        assert figures[f"decode.{name}.disk_bytes_per_token"]["value"] > 0.5 * decode.QUICK.kv_bytes / 1e6
    for name in (decode.FLEXGEN, decode.DIRECT):
        assert figures[f"decode.ratio_vs_{name}"]["goal"] == decode.RATIO_GOAL[name]
    assert "cap" in settings["memory cap"]
    assert list(tmp_path.iterdir()) == []


def test_reference_is_softmax_over_all_tokens():
    """The judge of all contenders, against attention written out for one head."""
    shape = Shape(cap_bytes=0, num_layers=2, num_tokens=40)
    keys, values = (
        np.concatenate([stored, *(getattr(decoded(step, 1), kind) for step in range(3))])[:, 2].astype(float)
        for stored, kind in zip(prompt(shape, 1), ("keys", "values"), strict=True)
    )
    weights = np.exp(keys @ decoded(2, 1).queries[9].astype(float) / 128**0.5)  # query head 9: KV head 2
    expected = weights @ values / weights.sum()
    np.testing.assert_allclose(reference(shape, 1, 3)[9], expected, rtol=1e-9)


def _take(num_bytes, cap):
    cap.join()
    np.ones(num_bytes, np.uint8)


def test_memory_cap_holds():
    """A cap that holds nobody would have every contender work from the page cache."""
    with memory_cap("kvfs-test", 64 << 20) as cap:
        if cap is None:
            pytest.skip("needs a memory control group: run as root, or in a delegated group")
        codes = []
        for num_bytes in (16 << 20, 256 << 20):
            process = get_context("spawn").Process(target=_take, args=(num_bytes, cap))
            process.start()
            process.join()
            codes.append(process.exitcode)
        assert codes == [0, -signal.SIGKILL]
        assert cap.peak_bytes() <= 64 << 20
    assert not cap.folder.exists()


def test_what_fits_is_not_read(tmp_path):
    """The plot's left end: K/V that fits in the cap stays there, for every contender."""
    shape = Shape(cap_bytes=64 << 20, num_layers=2, num_tokens=2048)
    runs, _, _ = decode.measure_shape(shape, tmp_path, 1, lambda text: None)
    for name, run in runs.items():
        assert run.disk_bytes == 0, name
        error = decode._relative_error(run.out, reference(shape, shape.checked_layer, run.num_steps))
        assert error < 2e-2, name
