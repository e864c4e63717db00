"""SparF: pages of channels, choices, kernels over both kinds of pages, against the definition."""

import ml_dtypes
import numpy as np
import pytest

from accel.merge import merge_states, merge_units
from accel.quantized_pages import decode_pages, encode_pages
from accel.sparf import DamagedChannels, channel_major, reference
from accel.sparf.kernels import approximate_scores, bend_scores, chosen_runs
from accel.sparf.selection import choose_channels, choose_tokens, join_mean
from accel.workers import AttentionBatch, UnitRange, load_worker
from accel.workers.target import AVX2, AVX512, NEON, PORTABLE
from spdk_glue.derived_layout import DerivedLayout
from spdk_glue.vendor_command import Derive, KvDtype, scale_bytes, tokens_per_page
from tests.unit.accel.pages import Pages

STORED = {KvDtype.FLOAT16: np.float16, KvDtype.BFLOAT16: ml_dtypes.bfloat16, KvDtype.FLOAT32: np.float32}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layout_of(num_tokens, head_dim=64, dtype=KvDtype.FLOAT16, page_size=4096):
    return DerivedLayout(Derive.CHANNEL_MAJOR_KEYS, page_size, 1, 1, head_dim, dtype, num_tokens)


class Stored:
    """Tokens of one KV head in token-major and channel-major pages; keeps the memory alive."""

    def __init__(self, keys, values, dtype=KvDtype.FLOAT16, page_size=4096, segment_tokens=512):
        self.dtype, self.page_size = dtype, page_size
        num_tokens, self.head_dim = keys.shape
        self.pages = Pages(page_size)
        self.per_page = tokens_per_page(page_size, self.head_dim, dtype)
        self.token_major = []
        for rows in (keys, values):
            if dtype in STORED:
                cut = [rows[at : at + self.per_page] for at in range(0, num_tokens, self.per_page)]
                self.token_major.append([self.pages.add(part.astype(STORED[dtype])) for part in cut])
            else:
                self.token_major.append([self.pages.add(page) for page in self.quantized(rows)])
        self.segments = []
        for first in range(0, num_tokens, segment_tokens):
            part = slice(first, min(first + segment_tokens, num_tokens))
            layout = layout_of(part.stop - first, self.head_dim, dtype, page_size)
            image = channel_major.encode_channel_major(keys[part], values[part], layout)
            self.segments.append((first, layout, image, [self.pages.add(page) for page in image]))

    def quantized(self, rows):
        image = rows.astype(np.float16)
        per_image = self.page_size // (2 * self.head_dim)
        images = np.zeros((1, -(-len(rows) // per_image), self.page_size), np.uint8)
        images.reshape(-1)[: image.nbytes] = image.reshape(-1).view(np.uint8)
        pages = np.zeros((1, -(-len(rows) // self.per_page), self.page_size), np.uint8)
        encode_pages(images, per_image, 0, len(rows), self.dtype, self.head_dim, pages)
        self.decoded = decode_pages(pages[0], self.dtype, self.head_dim).reshape(-1, self.head_dim)[: len(rows)]
        return pages[0]


def sparf(stored, queries, num_channels, num_tokens, scale, start, stop, worker="numba"):
    """(out, lse, channels read, tokens read): the steps as a drive takes them; queries [num_rows, head_dim]."""
    total = sum(layout.num_tokens for _, layout, _, _ in stored.segments)
    channels, weights = choose_channels(queries, num_channels, scale)
    scores = np.full((len(queries), total), np.nan, np.float32)
    mean = np.zeros(stored.head_dim)
    for first, layout, image, addresses in stored.segments:
        per_channel = channel_major.pages_per_channel(layout)
        pages = np.array(addresses[:-1], np.uint64).reshape(stored.head_dim, per_channel)[channels]
        part = scores[:, first : first + layout.num_tokens]
        approximate_scores(pages, layout.num_tokens, stored.page_size, stored.dtype, weights, part)
        bend_scores(part, first, start, stop)
        mean += channel_major.mean_of_values(image[-1], layout) * layout.num_tokens / total
    chosen, alpha = choose_tokens(scores, num_tokens)
    page, first_row, stop_row = chosen_runs(chosen, stored.per_page)
    keys, values = (np.array(addresses, np.uint64)[page] for addresses in stored.token_major)
    batch = AttentionBatch(
        dtype=stored.dtype.name.lower(),
        head_dim=stored.head_dim,
        group_size=1,
        key_pages=keys,
        value_pages=values,
        page_first_token=page * stored.per_page,
        page_first_row=first_row,
        page_num_tokens=stop_row,
        unit_first_page=np.array([0, len(page) // 2, len(page)]),
        unit_item=np.zeros(2, np.int32),
        unit_kv_head=np.zeros(2, np.int32),
        queries=queries[None, :, None],
        visible_start=start[None],
        visible_stop=stop[None],
        scale=scale,
        scales_offset=stored.page_size - scale_bytes(stored.head_dim, stored.dtype),
    )
    out = np.empty((2, len(queries), 1, stored.head_dim), np.float32)
    lse = np.empty((2, len(queries), 1), np.float32)
    load_worker(worker).attend_units(batch, UnitRange(0, 2), out, lse)
    merged, merged_lse = merge_units(out, lse, batch.unit_item, batch.unit_kv_head, 1, 1)
    return (*join_mean(merged[0, :, 0], merged_lse[0, :, 0], alpha, mean), channels, chosen)


def dense(queries, keys, values, scale, start, stop):
    out, lse = np.zeros(queries.shape), np.full(len(queries), -np.inf)
    for row, query in enumerate(queries.astype(np.float64)):
        seen = slice(start[row], stop[row])
        if start[row] >= stop[row]:
            continue
        scores = scale * keys[seen].astype(np.float64) @ query
        weights = np.exp(scores - scores.max())
        out[row] = weights @ values[seen] / weights.sum()
        lse[row] = scores.max() + np.log(weights.sum())
    return out, lse


def as_stored(rows, dtype):
    return rows.astype(STORED[dtype]).astype(np.float32)


def test_definition_with_everything_chosen_is_dense_attention():
    """Else the method's error could not be told from the definition's."""
    queries, keys, values = normal(4, 64), normal(300, 64, seed=1), normal(300, 64, seed=2)
    start, stop = np.array([0, 10, 0, 50]), np.array([300, 290, 1, 50])
    expected = dense(queries, keys, values, 0.125, start, stop)
    for found, right in zip(
        reference.sparf(queries, keys, values, 64, 300, 0.125, start, stop), expected, strict=True
    ):
        np.testing.assert_allclose(found, right, atol=1e-12)


@pytest.mark.parametrize("dtype", [*STORED, KvDtype.INT8])
def test_everything_chosen_is_dense_attention(dtype):
    """r = head_dim and k = all tokens: a token or a channel lost shows here."""
    queries, keys, values = normal(4, 64), normal(700, 64, seed=1), normal(700, 64, seed=2)
    start, stop = np.zeros(4, np.int64), np.full(4, 700)
    if dtype in STORED:
        keys, values = as_stored(keys, dtype), as_stored(values, dtype)
        stored = Stored(keys, values, dtype)
    else:
        stored = Stored(keys, values, dtype)
        keys, values = (stored.quantized(rows) is not None and stored.decoded for rows in (keys, values))
    out, lse, _, chosen = sparf(stored, queries, 64, 700, 0.125, start, stop)
    expected, expected_lse = dense(
        queries, keys.astype(np.float64), values.astype(np.float64), 0.125, start, stop
    )
    assert chosen.all()
    np.testing.assert_allclose(out, expected, atol=2e-6 if dtype in STORED else 2e-4)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6 if dtype in STORED else 2e-4)


@pytest.mark.parametrize("worker", ["numba", "reference"])
@pytest.mark.parametrize("num_channels, num_tokens", [(8, 40), (1, 1), (32, 200)])
def test_steps_over_pages_are_the_definition(worker, num_channels, num_tokens):
    """The published method: another union, another alpha or tau would not be it."""
    queries = 2 * normal(6, 64) * np.exp(normal(64, seed=4))
    keys, values = (as_stored(normal(900, 64, seed=seed), KvDtype.FLOAT16) + 0 for seed in (1, 2))
    start, stop = np.array([0, 0, 100, 5, 0, 400]), np.array([900, 899, 800, 6, 900, 400])
    stored = Stored(keys, values)
    out, lse, channels, chosen = sparf(
        stored, queries, num_channels, num_tokens, 0.125, start, stop, worker=worker
    )
    expected, expected_lse = reference.sparf(
        queries, keys, values, num_channels, num_tokens, 0.125, start, stop
    )
    assert num_channels <= len(channels) <= 6 * num_channels
    assert chosen.sum() <= 6 * num_tokens
    seen = start < stop
    np.testing.assert_allclose(lse[seen], expected_lse[seen], atol=2e-5)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert np.isneginf(lse[~seen]).all()


@pytest.mark.parametrize("target", [AVX512, AVX2, NEON, PORTABLE], ids=["avx512", "avx2", "neon", "portable"])
@pytest.mark.parametrize("dtype", STORED)
def test_approximate_scores(dtype, target):
    """Of every vector shape; bfloat16 is widened by pairs, which here are tokens."""
    num_tokens, page_size = 2100, 4096
    keys = as_stored(normal(num_tokens, 40, seed=1), dtype)
    layout = layout_of(num_tokens, 40, dtype, page_size)
    image = channel_major.encode_channel_major(keys, keys, layout)
    pages = Pages(page_size)
    addresses = np.array([pages.add(page) for page in image[:-1]], np.uint64).reshape(40, -1)
    assert addresses.shape[1] == channel_major.pages_per_channel(layout) > 1
    channels = np.array([0, 3, 17, 39])
    weights = normal(11, 4, seed=2)
    scores = np.full((11, 3000), 7e7, np.float32)
    part = scores[:, 500 : 500 + num_tokens]
    approximate_scores(addresses[channels], num_tokens, page_size, dtype, weights, part, target=target)
    np.testing.assert_allclose(part, weights @ keys[:, channels].T, atol=3e-6)
    assert (scores[:, :500] == 7e7).all()
    assert (scores[:, 500 + num_tokens :] == 7e7).all()


def test_scores_are_bent_as_the_command_says():
    """Approximate scores without the cap and the bias would choose other tokens."""
    scores = normal(3, 50)
    slopes, position = np.array([0.5, 0.25, 0.0], np.float32), np.array([200, 200, 201])
    bent = scores.copy()
    bend_scores(bent, 100, np.array([0, 110, 149]), np.array([500, 120, 149]), 2.0, slopes, position)
    expected = 2 * np.tanh(scores / 2) - slopes[:, None] * (position[:, None] - 100 - np.arange(50))
    np.testing.assert_allclose(bent[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(bent[1, 10:20], expected[1, 10:20], rtol=1e-5)
    assert np.isneginf(bent[1, :10]).all() and np.isneginf(bent[1, 20:]).all() and np.isneginf(bent[2]).all()


def test_result_merges_with_a_dense_part():
    """lse - ln(alpha) is the weight of all tokens: without it the dense tail outweighs them."""
    queries, keys, values = normal(4, 64), normal(1000, 64, seed=1), normal(1000, 64, seed=2)
    none, every = np.zeros(4, int), np.full(4, 1000)
    sealed, lse = reference.sparf(queries, keys[:800], values[:800], 64, 300, 0.125)
    _, true_lse = dense(queries, keys[:800], values[:800], 0.125, none, np.full(4, 800))
    np.testing.assert_allclose(lse, true_lse, atol=1e-9)  # exact scores: alpha is exact
    tail = dense(queries, keys[800:], values[800:], 0.125, none, np.full(4, 200))
    parts = (array.astype(np.float32) for array in (sealed, lse, *tail))
    _, merged_lse = merge_states(*parts)
    np.testing.assert_allclose(merged_lse, dense(queries, keys, values, 0.125, none, every)[1], atol=1e-5)


def test_runs_of_chosen_tokens():
    """A run across a page's end would be read from whatever lies behind it."""
    chosen = np.zeros(20, bool)
    chosen[[0, 1, 3, 6, 7, 8, 9, 15, 16, 19]] = True
    page, first, stop = chosen_runs(chosen, 8)
    runs = list(zip(page.tolist(), first.tolist(), stop.tolist(), strict=True))
    assert runs == [(0, 0, 2), (0, 3, 4), (0, 6, 8), (1, 0, 2), (1, 7, 8), (2, 0, 1), (2, 3, 4)]
    assert [len(part) for part in chosen_runs(np.zeros(9, bool), 4)] == [0, 0, 0]


def test_choices():
    """Ties and zeros must not choose more than asked for, nor what no row sees."""
    channels, weights = choose_channels(np.zeros((2, 64), np.float32), 3, 1.0)
    assert len(channels) == 3 and not weights.any()
    queries = np.array([[3.0, 0, 4, 0], [0, 5, 0, 0]], np.float32)
    channels, weights = choose_channels(queries, 1, 0.5)
    np.testing.assert_array_equal(channels, [1, 2])
    np.testing.assert_allclose(weights, [[0, 0.5 * np.sqrt(7 / 4) * 4], [2.5, 0]])
    scores = np.array([[1.0, 0, -np.inf, -np.inf], [-np.inf, -np.inf, -np.inf, -np.inf]], np.float32)
    chosen, alpha = choose_tokens(scores, 3)
    np.testing.assert_array_equal(chosen, [True, True, False, False])
    np.testing.assert_allclose(alpha, [1, 1])
    chosen, alpha = choose_tokens(scores, 1)
    np.testing.assert_array_equal(chosen, [True, False, False, False])
    np.testing.assert_allclose(alpha, [np.e / (1 + np.e), 1])


def test_damaged_and_foreign_pages_are_refused():
    """The mean of V is read with every command: a wrong one is in every answer."""
    layout = layout_of(100)
    image = channel_major.encode_channel_major(normal(100, 64), normal(100, 64, seed=1), layout)
    np.testing.assert_allclose(
        channel_major.mean_of_values(image[-1], layout), normal(100, 64, seed=1).mean(axis=0), atol=1e-6
    )
    for byte in (0, 4, 6, 8, 13, 16):
        page = image[-1].copy()
        page[byte] ^= 1
        with pytest.raises(DamagedChannels) as damage:
            channel_major.mean_of_values(page, layout, segment=5)
        assert damage.value.segment == 5
    page = image[-1].copy()
    page[32:36] = list(np.float32(np.nan).tobytes())
    with pytest.raises(DamagedChannels):
        channel_major.mean_of_values(page, layout)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_rows_that_a_copy_cannot_hold_are_refused(bad):
    """Infinite in float16, a key would be chosen by every query."""
    rows = normal(100, 64)
    broken = rows.copy()
    broken[3, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        channel_major.encode_channel_major(broken, rows, layout_of(100))
    with pytest.raises(ValueError, match="are not"):
        channel_major.encode_channel_major(rows[:9], rows[:9], layout_of(100))
