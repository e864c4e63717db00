"""Units over channels: the model against float64, the RTL against the model, and SparF of a drive on both."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.drive import Drive, DriveConfig
from accel.fpga import channel_scores
from accel.fpga.arithmetic import BFLOAT16, FLOAT16, NOT_FINITE, Shape
from accel.fpga.model import channel_scores as scores_of
from accel.fpga.model import quantised, weigh_channels
from accel.sparf import reference
from accel.workers import fpga
from ftl.geometry import Geometry
from spdk_glue.namespace import Namespace
from spdk_glue.vendor_command import Derive, KvDtype, SparseMethod
from tests.unit.accel import sparse_drive
from tests.unit.accel.fpga.conftest import SMALL
from tests.unit.accel.fpga.units import NUMPY, assert_same, channel_blocks
from tests.unit.accel.pages import Pages

TOLERANCE = 1e-4  # of the largest score
PAGE = 4096


@settings(max_examples=40)
@given(
    num_channels=st.integers(1, 256),
    dtype=st.sampled_from([FLOAT16, BFLOAT16]),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_model_agrees_with_float64(num_channels, dtype, size, seed):
    """Up to the most channels there may be, all of them as large as can be: the scores' bits must do."""
    shape = Shape(lanes=32, rows=4)
    random = np.random.default_rng(seed)
    keys = (size * random.standard_normal((num_channels, 64))).clip(-6e4, 6e4).astype(NUMPY[dtype])
    weights = random.standard_normal((num_channels, 4))
    if seed % 2:
        keys[:], weights[:] = keys[:1, :1], np.abs(weights[:1])
    words, exponents = quantised(weights.T)
    counts = random.random(num_channels) < 0.8
    mask = [
        int(np.packbits(np.pad(counts, (0, 256))[first : first + 64], bitorder="little").view(np.uint64)[0])
        for first in range(0, num_channels, 64)
    ]
    blocks = [
        (mask[n], words.T[64 * n : 64 * (n + 1)], keys[64 * n : 64 * (n + 1)].view(np.uint16))
        for n in range(len(mask))
    ]
    found = scores_of(weigh_channels(dtype, blocks, shape), exponents)
    expected = (weights * counts[:, None]).T @ keys.astype(np.float64)
    assert np.abs(found - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1e-30)


@settings(max_examples=30)
@given(
    num_channels=st.integers(1, 90),
    num_beats=st.integers(1, 8),
    dtype=st.sampled_from([FLOAT16, BFLOAT16]),
    holds=st.sampled_from([0, 60, 200]),
    seed=st.integers(0, 1000),
)
def test_gives_the_models_words(core, num_channels, num_beats, dtype, holds, seed):
    """A wrong bit for some number of channels, length, filter or timing of the streams."""
    blocks = channel_blocks(SMALL, num_channels, num_beats, dtype, seed)
    if seed % 5 == 0:
        blocks[0][2][0, 0] = 0x7FFF
    weights = [np.pad(block[1], ((0, 0), (0, SMALL.lanes // 2 - SMALL.rows))) for block in blocks]
    masks = np.array([2**64 - 1 if block[0] is None else block[0] for block in blocks], np.uint64)
    core.hold_streams(seed + 1, holds)
    found = core.weigh_channels(
        dtype,
        num_beats,
        [len(block[2]) for block in blocks],
        [block.ctypes.data for block in weights],
        [block[2].ctypes.data for block in blocks],
        masks,
    )
    wanted = weigh_channels(dtype, blocks, SMALL)
    if wanted.status & NOT_FINITE:
        assert found.status & NOT_FINITE
    else:
        assert_same(found, wanted)


@pytest.fixture
def small_worker(core, monkeypatch):
    monkeypatch.setenv("KVFS_FPGA_LANES", str(SMALL.lanes))
    monkeypatch.setenv("KVFS_FPGA_ROWS", str(SMALL.rows))
    fpga.shape.cache_clear()
    yield
    fpga.shape.cache_clear()


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(1, 1), (2, 128), (5, 2048), (3, 2900)])
def test_scores_over_pages(small_worker, num_rows, num_tokens):
    """Rows that the core's do not divide, tails, and channels of more than a page."""
    random = np.random.default_rng(num_tokens)
    keys = random.standard_normal((9, num_tokens)).astype(np.float16)
    weights = random.standard_normal((num_rows, 9)).astype(np.float32)
    pages = Pages(PAGE)
    addresses = [[pages.add(row[at : at + 2048]) for at in range(0, num_tokens, 2048)] for row in keys]
    scores = np.full((num_rows, num_tokens), np.nan, np.float32)
    fpga.approximate_scores(np.array(addresses, np.uint64), num_tokens, PAGE, KvDtype.FLOAT16, weights, scores)
    expected = weights @ keys.astype(np.float32)
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE * np.abs(expected).max())


def test_scores_of_no_channels_and_of_infinities(small_worker, core, caplog):
    scores = np.ones((1, 8), np.float32)
    none = np.zeros((0, 1), np.uint64)
    assert channel_scores.fill(core, FLOAT16, none, 8, PAGE, np.zeros((1, 0)), scores)
    assert not scores.any()
    pages, fpga_says = Pages(PAGE), "(not finite): numba does"
    fpga._say_once.cache_clear()
    address = np.array([[pages.add(np.full(8, np.inf, np.float16))]], np.uint64)
    fpga.approximate_scores(address, 8, PAGE, KvDtype.FLOAT16, np.ones((1, 1), np.float32), scores)
    assert np.isposinf(scores).all() and fpga_says in caplog.text


@pytest.mark.parametrize("tokens", [128, 1 << 20])
def test_sparf_of_a_drive(small_worker, tmp_path, tokens):
    """Both of SparF's steps over pages run on the core, what the drive does between them on its CPU."""
    Drive.format(tmp_path / "drive", Geometry(pages_per_erase_block=32, num_superblocks=48))
    drive = Drive.open(tmp_path / "drive", DriveConfig(cache_bytes=8 << 20, num_workers=1, worker="fpga"))
    try:
        namespace = Namespace(drive.transport)
        stored = sparse_drive.store(namespace, 8, [(0, 8)], derive=Derive.CHANNEL_MAJOR_KEYS)
        queries = sparse_drive.random_queries()
        asked = {"sparse_method": SparseMethod.SPARF, "channels": 16, "tokens": tokens}
        out, lse, header = sparse_drive.attend(
            namespace, sparse_drive.sparse_descriptor([stored], queries, **asked), queries
        )
        assert header["index_pages"] and drive.attention_unit.worker_counts.as_dict()["core_cycles"]
    finally:
        drive.close()
    for head in range(sparse_drive.HEADS):
        rows = slice(2 * head, 2 * head + 2)
        expected, expected_lse = reference.sparf(
            queries[0, 0, rows], stored.keys[0, :, head], stored.values[0, :, head], 16, tokens, 0.125
        )
        assert np.abs(out[0, 0, rows] - expected).max() <= 2e-3 * np.abs(expected).max()
        np.testing.assert_allclose(lse[0, 0, rows], expected_lse, atol=2e-3)
