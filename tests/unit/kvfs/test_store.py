"""The store through its public API, on a real embedded drive."""

import gc
import time

import numpy as np
import pytest

import kvfs
from accel.attention_job import AttentionJob
from kvfs.errors import NoSuchSequence
from kvfs.layout import NUMPY_DTYPE

from .conftest import add_model, plain_attention, random_kv, random_queries


def fill(sequence, keys, values):
    for layer in range(sequence.model.num_layers):
        sequence.append(layer, keys, values)


def assert_attends(store, sequence, keys, values, tolerance=1e-5):
    """Attention over a sequence equals the textbook's over the rounded keys and values."""
    dtype = sequence.model.geometry.numpy_dtype
    keys, values = keys.astype(dtype), values.astype(dtype)
    geometry = sequence.model.geometry
    queries = random_queries(num_heads=geometry.num_query_heads, head_dim=geometry.head_dim)
    out, lse = store.attend(0, queries, [sequence])
    want_out, want_lse = plain_attention(queries[0], keys, values, [(0, len(keys))])
    np.testing.assert_allclose(out[0], want_out, atol=tolerance)
    np.testing.assert_allclose(lse[0], want_lse, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("num_tokens", [1, 255, 256, 257, 1000])
def test_attention_equals_the_textbook(store, dtype, num_tokens):
    """Numbers: any length around a token group's border, in every storage type."""
    sequence = store.create_sequence(add_model(store, dtype), "s")
    keys, values = random_kv(num_tokens)
    fill(sequence, keys, values)
    assert_attends(store, sequence, keys, values)


@pytest.mark.parametrize(
    ("num_kv_heads", "group_size", "head_dim"), [(1, 1, 32), (3, 5, 96), (2, 16, 80), (4, 2, 128), (1, 7, 256)]
)
def test_shapes_of_models(store, num_kv_heads, group_size, head_dim):
    """Models whose head_dim or group size is no power of two."""
    model = add_model(
        store, num_kv_heads=num_kv_heads, num_query_heads=num_kv_heads * group_size, head_dim=head_dim
    )
    sequence = store.create_sequence(model, "s")
    keys, values = random_kv(300, num_kv_heads=num_kv_heads, head_dim=head_dim)
    fill(sequence, keys, values)
    assert_attends(store, sequence, keys, values)


def test_causal_queries_and_ranges(store, model):
    """Several queries at once: each must see just the tokens it may."""
    sequence = store.create_sequence(model, "s")
    keys, values = random_kv(600)
    fill(sequence, keys, values)
    keys, values = keys.astype(np.float16), values.astype(np.float16)
    queries = random_queries(num_queries=5)
    out, _ = store.attend(1, queries, [sequence])
    want, _ = plain_attention(queries[0], keys, values, [(0, 600 - 4 + i) for i in range(5)])
    np.testing.assert_allclose(out[0], want, atol=1e-5)
    everything, _ = store.attend(1, queries, [sequence], causal=False)
    want, _ = plain_attention(queries[0], keys, values, [(0, 600)] * 5)
    np.testing.assert_allclose(everything[0], want, atol=1e-5)
    ranges = [(0, 600), (10, 20), (250, 260), (511, 513), (40, 40)]
    windowed, lse = store.attend(1, queries, [sequence], token_ranges=np.array([ranges]))
    want, want_lse = plain_attention(queries[0], keys, values, ranges)
    np.testing.assert_allclose(windowed[0], want, atol=1e-5)
    np.testing.assert_allclose(lse[0], want_lse, atol=1e-5)


def test_attention_leaves_nothing_behind(store, model):
    """Memory: what a command worked with goes with it, not when the garbage collector comes by."""
    sequence = store.create_sequence(model, "s")
    fill(sequence, *random_kv(8 << 10))
    sequence.flush()
    give_up = time.monotonic() + 10
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            store.attend(0, random_queries(), [sequence])
        while left := [found for found in gc.get_objects() if type(found) is AttentionJob]:
            assert time.monotonic() < give_up, f"{len(left)} jobs are left"
            del left
            time.sleep(0.01)  # the thread that was last has yet to let go
    finally:
        gc.enable()


def test_batch_of_different_lengths(store, model):
    """A batch: sequences must not see each other, whatever their lengths."""
    queries = random_queries(num_sequences=3)
    sequences, wanted = [], []
    for index, num_tokens in enumerate((3, 700, 256)):
        sequence = store.create_sequence(model, f"s{index}")
        keys, values = random_kv(num_tokens, seed=index)
        fill(sequence, keys, values)
        sequences.append(sequence)
        rounded = keys.astype(np.float16), values.astype(np.float16)
        wanted.append(plain_attention(queries[index], *rounded, [(0, num_tokens)])[0])
    out, _ = store.attend(0, queries, sequences)
    np.testing.assert_allclose(out, np.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("writeback_tokens", [1, 32, 100, None])
def test_token_by_token_with_any_writeback(path, writeback_tokens):
    """Delayed writeback: tail and flash together are the whole, whenever pages are spilled."""
    keys, values = random_kv(300)
    with kvfs.open(path, cache_bytes="8MiB", writeback_tokens=writeback_tokens) as store:
        sequence = store.create_sequence(add_model(store), "s")
        for token in range(300):
            fill(sequence, keys[token : token + 1], values[token : token + 1])
            if token in (0, 31, 32, 33, 255, 256, 299):
                assert_attends(store, sequence, keys[: token + 1], values[: token + 1])
        sequence.compact()
        assert_attends(store, sequence, keys, values)
    with kvfs.open(path, cache_bytes="8MiB") as store:
        sequence = store.sequence("s")
        assert_attends(store, sequence, keys, values)
        np.testing.assert_array_equal(sequence.read(1)[0], keys.astype(np.float16))
        assert_attends(store, sequence.fork("t"), keys, values)
        assert store.check() == []


def test_attend_waits_for_no_spill(path, monkeypatch):
    """Decoding would stand still for every write: what is on its way to flash is attended over from memory."""
    keys, values = random_kv(700)
    with kvfs.open(path, cache_bytes="8MiB", writeback_tokens=32) as store:
        sequence = store.create_sequence(add_model(store), "s")
        fill(sequence, keys[:256], values[:256])
        sequence.flush()
        with monkeypatch.context() as patch:
            patch.setattr(store._namespace, "is_done", lambda pending: False)
            patch.setattr(store._namespace, "wait", lambda pending: pytest.fail("waited for a write"))
            for start in range(256, 700, 111):
                stop = start + 111
                fill(sequence, keys[start:stop], values[start:stop])
                assert_attends(store, sequence, keys[:stop], values[:stop])
        assert store.counters()["memory"]["tail_bytes"] == 2 * 2 * sequence._layout.image_bytes
        sequence.flush()
        assert_attends(store, sequence, keys, values)
        assert store.counters()["memory"]["tail_bytes"] == 2 * sequence._layout.image_bytes


def flash_runs(store, sequence, layer, position) -> int:
    """In how many pieces a layer's share of a group lies on the flash."""
    layout = sequence._layout
    base = sequence._groups[position].base_lba + layer * layout.layer_lbas
    pages = store._drive.ftl.resolve(np.arange(base, base + layout.layer_lbas))
    return 1 + np.count_nonzero(np.diff(pages) != 1)


def test_groups_written_in_small_pieces_end_in_one(path):
    """Decoding with small spills leaves groups scattered, which costs two thirds of the rate of cold reads."""
    keys, values = random_kv(600)
    with kvfs.open(path, cache_bytes="8MiB", writeback_tokens=32) as store:
        sequence = store.create_sequence(add_model(store), "s")
        for token in range(600):
            fill(sequence, keys[token : token + 1], values[token : token + 1])
            if token % 256 == 250:
                sequence.flush()  # no piece may be on its way still when the whole is written
        sequence.flush()
        for layer in range(2):
            assert [flash_runs(store, sequence, layer, position) for position in range(2)] == [1, 1]
            np.testing.assert_array_equal(sequence.read(layer)[0], keys.astype(np.float16))
        assert_attends(store, sequence, keys, values)


def test_groups_begun_before_a_restart_keep_their_tokens(path):
    """What is in memory of such a group is its end: as a whole it would overwrite what was flushed."""
    keys, values = random_kv(300)
    for start, stop in ((0, 100), (100, 101), (101, 300)):
        with kvfs.open(path, cache_bytes="8MiB", writeback_tokens=32) as store:
            known = [row.name for row in store.catalogue_rows()]
            sequence = store.sequence("s") if known else store.create_sequence(add_model(store), "s")
            for token in range(start, stop):
                fill(sequence, keys[token : token + 1], values[token : token + 1])
    with kvfs.open(path, cache_bytes="8MiB") as store:
        for layer in range(2):
            for found, wanted in zip(store.sequence("s").read(layer), (keys, values), strict=True):
                np.testing.assert_array_equal(found, wanted.astype(np.float16))
        assert store.check() == []


def test_reopening_finds_everything(path):
    """Restart: models, sequences, K/V of whole groups and of the tail, and token ids."""
    keys, values = random_kv(777)
    with kvfs.open(path, cache_bytes="8MiB") as store:
        sequence = store.create_sequence(add_model(store), "chat-42")
        fill(sequence, keys, values)
        sequence.append_tokens(np.arange(777))
    with kvfs.open(path, cache_bytes="8MiB") as store:
        sequence = store.sequence("chat-42")
        assert (sequence.num_tokens, sequence.name, sequence.model.name) == (777, "chat-42", "model-float16")
        assert sequence.tokens.tolist() == list(range(777))
        for layer in range(2):
            found_keys, found_values = sequence.read(layer)
            np.testing.assert_array_equal(found_keys, keys.astype(np.float16))
            np.testing.assert_array_equal(found_values, values.astype(np.float16))
        fill(sequence, keys[:1], values[:1])
        assert_attends(store, sequence, np.concatenate([keys, keys[:1]]), np.concatenate([values, values[:1]]))


@pytest.mark.parametrize("keep", [0, 1, 255, 256, 300, 512, 600])
def test_truncate_and_grow_again(path, keep):
    """Truncation (crop of a speculative step): what is kept stays, what follows is the new."""
    keys, values = random_kv(600)
    more_keys, more_values = random_kv(300, seed=9)
    with kvfs.open(path, cache_bytes="8MiB") as store:
        sequence = store.create_sequence(add_model(store), "s")
        fill(sequence, keys, values)
        sequence.flush()
        sequence.truncate(keep)
        fill(sequence, more_keys, more_values)
        want = np.concatenate([keys[:keep], more_keys]), np.concatenate([values[:keep], more_values])
        assert_attends(store, sequence, *want)
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert_attends(store, store.sequence("s"), *want)
        assert store.check() == []


def test_fork_shares_and_diverges(path):
    """Forks (beams, agents): a child costs almost nothing and neither sees what the other appends."""
    keys, values = random_kv(600)
    with kvfs.open(path, cache_bytes="8MiB") as store:
        parent = store.create_sequence(add_model(store), "parent")
        fill(parent, keys, values)
        parent.flush()
        free_before = store.counters()["space"]["free_bytes"]
        child = parent.fork("child")
        kv_bytes = 600 * parent.model.token_bytes
        assert free_before - store.counters()["space"]["free_bytes"] < kv_bytes / 2
        fill(child, keys[:100], values[:100])
        fill(parent, keys[100:101], values[100:101])
        longer = np.concatenate([keys, keys[:100]]), np.concatenate([values, values[:100]])
        assert_attends(store, child, *longer)
        store.delete_sequence("parent")
        store.flush()
        filler = store.create_sequence(parent.model, "filler")  # would overwrite groups freed too early
        fill(filler, *random_kv(2000, seed=3))
        assert_attends(store, child, *longer)
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert_attends(store, store.sequence("child"), *longer)
        assert store.check() == []


def test_deleting_gives_the_space_back(path):
    """Space: a drive used for hours by short-lived sequences must not fill up."""
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = add_model(store)
        free = store.counters()["space"]["free_bytes"]
        keys, values = random_kv(8000)
        for round_number in range(6):
            sequence = store.create_sequence(model, f"s{round_number}")
            fill(sequence, keys, values)
            sequence.flush()
            store.delete_sequence(sequence.name)
        store.flush()
        assert store.counters()["space"]["free_bytes"] == free


def test_deleting_many(path):
    """As one by one, or none of them."""
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = add_model(store)
        free = store.counters()["space"]["free_bytes"]
        keys, values = random_kv(1000)
        for number in range(4):
            fill(store.create_sequence(model, f"s{number}"), keys, values)
        store.sequence("s3").fork("child")
        store.flush()
        with pytest.raises(NoSuchSequence, match="nowhere"):
            store.delete_sequences(["s1", "nowhere"])
        assert store.sequence("s1").num_tokens == 1000
        store.delete_sequences(["s0", "s1", "s0", "s2", "s3"])
        assert [row.name for row in store.catalogue_rows()] == ["child"]
        assert_attends(store, store.sequence("child"), keys, values)
        store.delete_sequence("child")
        store.flush()
        assert store.counters()["space"]["free_bytes"] == free
        assert store.check() == []


def test_torch_and_numpy_agree(store):
    """Inputs: torch tensors, bfloat16 among them, mean the same as NumPy arrays."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = add_model(store, "bfloat16")
    keys, values = random_kv(40)
    numbers, tensors = store.create_sequence(model, "n"), store.create_sequence(model, "t")
    fill(numbers, keys, values)
    fill(tensors, *(torch.from_numpy(array).to(torch.bfloat16) for array in (keys, values)))
    for have, want in zip(tensors.read(1), numbers.read(1), strict=True):
        np.testing.assert_array_equal(have, want)
        assert have.dtype == NUMPY_DTYPE["bfloat16"]
    queries = torch.randn(1, 1, 8, 64).to(torch.bfloat16)
    out, _ = store.attend(0, queries, [tensors])
    same, _ = store.attend(0, queries.float().numpy(), [numbers])
    np.testing.assert_allclose(out, same, atol=1e-6)


def test_nan_is_stored_and_propagates(store, model):
    """NaN: allowed, kept, and seen in the output instead of being hidden."""
    sequence = store.create_sequence(model, "s")
    keys, values = random_kv(300)
    values[5, 0, 3] = np.nan
    fill(sequence, keys, values)
    assert np.isnan(sequence.read(0)[1][5, 0, 3])
    out, lse = store.attend(0, random_queries(), [sequence])
    assert np.isnan(out[0, 0, :4, 3]).all()
    assert not np.isnan(out[0, 0, 4:]).any()
    assert np.isfinite(lse).all()


def test_several_threads(store, model):
    """Threads: an engine's threads may use one store at once."""
    from concurrent.futures import ThreadPoolExecutor

    def work(index):
        sequence = store.create_sequence(model, f"s{index}")
        keys, values = random_kv(400, seed=index)
        for start in range(0, 400, 50):
            fill(sequence, keys[start : start + 50], values[start : start + 50])
        assert_attends(store, sequence, keys, values)
        sequence.flush()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_link_carries_queries_not_the_cache(store, model):
    """The point of it all: an attention command moves a few kilobytes, however long the context."""
    sequence = store.create_sequence(model, "s")
    fill(sequence, *random_kv(4096))
    sequence.flush()
    before = store.counters()["link"]
    store.attend(0, random_queries(), [sequence])
    after = store.counters()["link"]
    moved = sum(after[name] - before[name] for name in ("bytes_to_drive", "bytes_from_drive"))
    offloaded = 2 * 4096 * 2 * 64 * 2  # K and V of the layer, fp16
    # the two log pages that counters() reads cross the link as well
    assert offloaded / (moved - 4096) > 0.5 * 4096 / (4 + 1)


def test_tails_stay_within_their_memory(path):
    """Memory: many sequences with part-filled groups must not hold an image per layer each for ever."""
    with kvfs.open(path, cache_bytes="8MiB", tail_bytes="1MiB") as store:
        model = add_model(store)
        contents = {}
        for index in range(20):
            sequence = store.create_sequence(model, f"s{index}")
            contents[sequence] = random_kv(100 + index, seed=index)
            fill(sequence, *contents[sequence])
            sequence.append_tokens(range(100 + index))
            assert store._image_pool.used_bytes <= (1 << 20) + 2 * model.layout.image_bytes
        for sequence, (keys, values) in contents.items():
            assert sequence.num_tokens == len(keys)
            assert_attends(store, sequence, keys, values)
            fill(sequence, keys[:1], values[:1])
        batch = list(contents)
        out, _ = store.attend(0, random_queries(num_sequences=20), batch)
        assert np.isfinite(out).all()
    with kvfs.open(path, cache_bytes="8MiB") as store:
        for index, (keys, values) in enumerate(contents.values()):
            sequence = store.sequence(f"s{index}")
            longer = np.concatenate([keys, keys[:1]]), np.concatenate([values, values[:1]])
            assert_attends(store, sequence, *longer)
            assert sequence.tokens.tolist() == list(range(100 + index))
