"""Pages that the model counts are the pages that a real drive reads for the same command."""

import numpy as np
import pytest

import kvfs
from kvfs.layout import KvGeometry
from machine_model import layout_bytes

GEOMETRY = KvGeometry(num_layers=1, num_query_heads=4, num_kv_heads=4, head_dim=128)
NUM_TOKENS = 2048 + 512
PAGE = 4096


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A sequence, sealed both ways."""
    path = tmp_path_factory.mktemp("drive") / "model.kvfs"
    kvfs.format(path, "128MiB")
    with kvfs.open(path, cache_bytes="16MiB") as store:
        model = store.add_model("m", num_layers=1, num_query_heads=4, num_kv_heads=4, head_dim=128)
        sequence = store.create_sequence(model, "s")
        random = np.random.default_rng(1)
        rows = [random.standard_normal((NUM_TOKENS, 4, 128)).astype(np.float16) for _ in range(2)]
        sequence.append(0, *rows)
        store.flush()
        sequence.seal("sketch")
        sequence.seal("channel_major_keys")
        yield store


def pages_read(store, **options) -> kvfs.PageCounts:
    store._drive.cache.clear()
    queries = np.random.default_rng(2).standard_normal((1, 1, 4, 128)).astype(np.float16)
    counts = kvfs.PageCounts()
    store.attend(0, queries, [store.sequence("s")], counts=counts, **options)
    return counts


def test_dense(store):
    """Whole pages of K and V."""
    model = layout_bytes.dense_pages(GEOMETRY, NUM_TOKENS, PAGE)
    assert pages_read(store).pages_from_flash == 4 * model.total


@pytest.mark.parametrize("compression", [4, 8])
def test_sketches(store, compression):
    """The index of every token, and refinements up to the budget."""
    counts = pages_read(store, compression=compression)
    model = layout_bytes.sketched_pages(GEOMETRY, NUM_TOKENS, PAGE, float(compression))
    assert counts.index_pages == 4 * model.ordered
    assert counts.chosen_pages == pytest.approx(4 * model.scattered, abs=4 * 2)


def test_sparf(store):
    """Channels of every segment; at random, as here, more pages hold a chosen token than in real text."""
    counts = pages_read(store, sparf=(16, NUM_TOKENS // 16))
    model = layout_bytes.sparf_pages(GEOMETRY, NUM_TOKENS, PAGE, 8.0)
    assert counts.index_pages == 4 * model.ordered
    dense = 4 * layout_bytes.dense_pages(GEOMETRY, NUM_TOKENS, PAGE).total
    at_random = 1 - (1 - 1 / 16) ** 16
    assert 4 * model.scattered < counts.chosen_pages <= 1.05 * at_random * dense
