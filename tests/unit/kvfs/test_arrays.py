"""Arrays of all kinds, in and out: the same bits, no copies without need, one line for what does not fit."""

import array
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import kvfs
from kvfs.arrays import as_numpy, output_array
from kvfs.errors import InvalidArgument

from .conftest import HEAD_DIM, NUM_KV_HEADS, add_model, random_kv, random_queries
from .remote.owner import Served

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = (5, NUM_KV_HEADS, HEAD_DIM)


class OnlyDLPack:
    """An array of a library that knows DLPack and nothing else. device: the DLDeviceType that it gives."""

    def __init__(self, values, device=1):
        self._values, self._device = values, device

    def __dlpack__(self, **options):
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._device, 0


@pytest.fixture(params=["store", "client", "set"])
def any_store(request, path, tmp_path):
    """A drive that is open here, one that another owns, and a set of two."""
    if request.param == "set":
        paths = [tmp_path / "one.kvfs", tmp_path / "two.kvfs"]
        kvfs.format(paths, "48MiB")
        with kvfs.open(paths, cache_bytes="8MiB", num_workers=1) as store:
            yield store
        return
    with kvfs.open(path, cache_bytes="8MiB", num_workers=1) as store:
        if request.param == "store":
            yield store
            return
        with Served(store, tmp_path / "mount", memory_bytes=1 << 20) as served, served.open() as client:
            yield client


def filled(store, dtype, keys, values):
    sequence = store.create_sequence(add_model(store, dtype), "s")
    sequence.append(0, keys, values)
    return sequence


def kinds_of(values: np.ndarray) -> dict:
    """The same numbers as float16 arrays of every kind that is taken."""
    half = values.astype(np.float16)
    wide = np.zeros((*half.shape[:-1], 2 * half.shape[-1]), np.float16)
    wide[..., ::2] = half
    return {
        "NumPy": half,
        "strided": wide[..., ::2],
        "DLPack": OnlyDLPack(half),
        "buffer": memoryview(half),
        "lists": half.tolist(),
    }


@pytest.mark.parametrize("kind", kinds_of(np.zeros(1)))
def test_kinds_of_input(store, kind):
    """Every kind of array says the same to the store, or a caller's tokens come back as others."""
    keys, values = random_kv(SHAPE[0])
    sequence = filled(store, "float16", kinds_of(keys)[kind], kinds_of(values)[kind])
    for stored, given in zip(sequence.read(0), (keys, values), strict=True):
        np.testing.assert_array_equal(stored, given.astype(np.float16))
    queries = random_queries().astype(np.float16)
    out, lse = store.attend(0, kinds_of(queries)[kind], [sequence])
    for found, wanted in zip((out, lse), store.attend(0, queries, [sequence]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_bfloat16_bits(any_store):
    """bfloat16 has no buffer of its own: its bits go in and out as uint16, of a model of that dtype alone."""
    keys, values = (rows.astype(BFLOAT16) for rows in random_kv(SHAPE[0]))
    sequence = filled(any_store, "bfloat16", keys.view(np.uint16), OnlyDLPack(values.view(np.uint16)))
    out = np.empty(SHAPE, np.uint16), np.empty(SHAPE, BFLOAT16)
    assert sequence.read(0, out=out)[0] is out[0]
    np.testing.assert_array_equal(out[0], keys.view(np.uint16))
    np.testing.assert_array_equal(out[1].view(np.uint16), values.view(np.uint16))
    other = any_store.create_sequence(add_model(any_store, "float16"), "other")
    with pytest.raises(InvalidArgument, match="keys has dtype uint16"):
        other.append(0, keys.view(np.uint16), values.view(np.uint16))


def test_results_in_the_callers_arrays(any_store):
    """out= is where the result is, and what is returned; parts of larger arrays count as arrays."""
    keys, values = random_kv(600)  # some of it on flash
    sequence = filled(any_store, "float16", keys, values)
    room = np.zeros((2, 700, NUM_KV_HEADS, HEAD_DIM), np.float16)
    out = memoryview(room[0, 50:350]), room[1, 50:350]
    found = sequence.read(0, 200, 500, out=out)
    assert found[0] is out[0] and found[1] is out[1]
    for target, wanted in zip(room, sequence.read(0, 200, 500), strict=True):
        np.testing.assert_array_equal(target[50:350], wanted)
        assert not target[:50].any() and not target[350:].any()
    queries = random_queries(num_queries=3)
    wanted = any_store.attend(0, queries, [sequence])
    out = np.full(queries.shape, np.nan, np.float32), np.full(queries.shape[:-1], np.nan, np.float32)
    found = any_store.attend(0, queries, [sequence], out=out)
    assert found[0] is out[0] and found[1] is out[1]
    np.testing.assert_allclose(out[0], wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out[1], wanted[1], rtol=1e-5, atol=1e-6)


def read_only():
    rows = np.zeros(SHAPE, np.float16)
    rows.flags.writeable = False
    return rows


REFUSED_OUTPUTS = [
    ((np.zeros(SHAPE, np.float32), None), r"keys has dtype float32, wanted float16"),
    ((np.zeros(SHAPE, np.uint16), None), r"keys has dtype uint16, wanted float16"),
    ((np.zeros((4, *SHAPE[1:]), np.float16), None), r"keys has shape \(4, 2, 64\), wanted \(5, 2, 64\)"),
    ((read_only(), None), "keys is read-only"),
    ((memoryview(read_only()), None), "keys is read-only"),
    ((np.zeros((5, 2, 128), np.float16)[..., ::2], None), "keys is not contiguous"),
    ((OnlyDLPack(np.zeros(SHAPE, np.float16), device=2), None), "keys: on a device .DLPack type 2"),
    ((np.zeros(SHAPE).tolist(), None), "keys is not an array whose memory"),
    (("keys", "values"), "keys "),
    (np.zeros((2, *SHAPE), np.float16), "out is the arrays .keys, values., not ndarray"),
    ((np.zeros(SHAPE, np.float16),), "out is the arrays"),
]
REFUSED_INPUTS = [
    (OnlyDLPack(np.zeros(SHAPE, np.float16), device=2), "keys: on a device .DLPack type 2, number 0"),
    (array.array("f", [0.0]), r"keys has shape \(1,\)"),
    (np.zeros(SHAPE, np.int16), "keys has dtype int16, wanted float16, bfloat16 or float32"),
    (np.zeros(SHAPE, np.complex64), "keys has dtype complex64"),
    (b"12345678", "keys has dtype"),
    ([[1.0], [1.0, 2.0]], "keys is not an array"),
]


def test_refused(any_store):
    """What cannot be read from or written to says so in one line that names it, and nothing is lost by it."""
    sequence = filled(any_store, "float16", *random_kv(SHAPE[0]))
    for out, line in REFUSED_OUTPUTS:
        with pytest.raises(InvalidArgument, match=line) as caught:
            sequence.read(0, out=out)
        assert "\n" not in str(caught.value)
    for keys, line in REFUSED_INPUTS:
        with pytest.raises(InvalidArgument, match=line):
            sequence.append(0, keys, np.zeros(SHAPE, np.float16))
    assert sequence.layer_tokens(0) == SHAPE[0] and sequence.read(0)[0].shape == SHAPE


def test_no_copies():
    """A view of a caller's memory, not of a copy: a copy of a long prefill takes longer than storing it."""
    values = np.zeros(SHAPE, np.float16)
    for view in (values, OnlyDLPack(values), memoryview(values)):
        assert np.shares_memory(as_numpy(view), values)
        assert np.shares_memory(output_array(view, "out", SHAPE, values.dtype), values)


def test_torch_tensors(any_store):
    """torch in and out, bfloat16 without its leaving 16 bits, and no copy on the way."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install kvfs[transformers]")
    keys, values = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)).bfloat16() for _ in range(2))
    strided = keys.transpose(0, 1).contiguous().transpose(0, 1)
    assert as_numpy(strided).ctypes.data == strided.data_ptr()
    sequence = filled(any_store, "bfloat16", strided, values.requires_grad_())
    out = torch.empty(SHAPE, dtype=torch.bfloat16), torch.empty(SHAPE, dtype=torch.bfloat16)
    assert sequence.read(0, out=out)[1] is out[1]
    assert torch.equal(out[0], keys) and torch.equal(out[1], values)
    queries = torch.from_numpy(random_queries()).bfloat16()
    answer = torch.empty(queries.shape), torch.empty(queries.shape[:-1])
    any_store.attend(0, queries, [sequence], out=answer)
    wanted = any_store.attend(0, queries, [sequence])
    np.testing.assert_allclose(answer[0].numpy(), wanted[0], rtol=1e-5, atol=1e-6)
    assert torch.from_dlpack(wanted[0]).shape == queries.shape

    elsewhere = torch.empty(SHAPE, dtype=torch.bfloat16, device="meta")
    with pytest.raises(InvalidArgument, match=r"keys: on device meta, not in host memory: pass tensor.cpu\(\)"):
        sequence.append(0, elsewhere, elsewhere)
    with pytest.raises(InvalidArgument, match="keys: on device meta"):
        sequence.read(0, out=(elsewhere, elsewhere))
    with pytest.raises(InvalidArgument, match="values requires a gradient"):
        sequence.read(0, out=(keys, values))


def test_core_without_torch():
    """The core installs without torch: an import of it in passing breaks that, and costs seconds each time."""
    modules = ["kvfs", "kvfs.aio", "kvfsctl.main", "kvfs.mount.mounting", "kvfs.serving"]
    code = (
        f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
