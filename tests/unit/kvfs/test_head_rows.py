"""Single heads of a sequence in one batch: any pieces in any order, from flash and from the tail."""

import numpy as np
import pytest

import kvfs
from kvfs.head_pieces import KEYS, VALUES, HeadRows

NUM_TOKENS, NUM_LAYERS, NUM_HEADS, HEAD_DIM = 700, 2, 2, 64


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(sequence: groups on flash, pages of a third, a tail; K/V [2, layers, tokens, heads, dim])"""
    path = tmp_path_factory.mktemp("head_rows") / "drive.kvfs"
    kvfs.format(path, size="48MiB")
    rows = np.random.default_rng(0).standard_normal((2, NUM_LAYERS, NUM_TOKENS, NUM_HEADS, HEAD_DIM))
    rows = rows.astype(np.float16)
    with kvfs.open(path, cache_bytes="8MiB", writeback_tokens=32) as store:
        shape = {"num_layers": NUM_LAYERS, "num_kv_heads": NUM_HEADS, "head_dim": HEAD_DIM}
        model = store.add_model("tiny", num_query_heads=4, dtype="float16", **shape)
        sequence = store.create_sequence(model, "a")
        for part in (slice(640), slice(640, None)):
            for layer in range(NUM_LAYERS):
                sequence.append(layer, *rows[:, layer, part])
            if part.stop == 640:
                sequence.flush()
        assert 512 < sequence._layers[0].num_spilled < NUM_TOKENS
        yield sequence, rows


def in_order(step: int) -> list[HeadRows]:
    """All there is, in the order in which it lies on flash."""
    return [
        HeadRows(layer, kind, head, start, min(start + step, NUM_TOKENS))
        for start in range(0, NUM_TOKENS, step)
        for layer in range(NUM_LAYERS)
        for head in range(NUM_HEADS)
        for kind in (KEYS, VALUES)
    ]


def some(seed: int) -> list[HeadRows]:
    random = np.random.default_rng(seed)
    return [
        HeadRows(*(int(random.integers(n)) for n in (NUM_LAYERS, 2, NUM_HEADS)), *map(int, sorted(ends)))
        for ends in random.integers(0, NUM_TOKENS + 1, (8, 2))
    ]


@pytest.mark.parametrize("pieces", [in_order(256), in_order(32), in_order(100), *map(some, range(20))])
def test_rows(stored, pieces):
    sequence, rows = stored
    wanted = [rows[piece.kind, piece.layer, piece.start : piece.stop, piece.head] for piece in pieces]
    found = np.frombuffer(sequence.read_heads(pieces), np.float16).reshape(-1, HEAD_DIM)
    assert np.array_equal(found, np.concatenate(wanted))


def test_one_read_for_what_lies_together(stored):
    """Without it: a command for each layer, head and kind of a prompt that is restored."""
    sequence, _ = stored
    reads = []
    namespace = sequence._store._namespace
    original = namespace.read_scattered
    namespace.read_scattered = lambda extents: reads.append(len(extents)) or original(extents)
    try:
        sequence.read_heads([piece for piece in in_order(256) if piece.stop <= 512])
    finally:
        namespace.read_scattered = original
    assert len(reads) == 1 and reads[0] <= 2  # groups may lie together, too
