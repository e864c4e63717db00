"""The connector's two halves over a cache in memory: no vLLM, no drive."""

import types

import numpy as np
import pytest

from kvfs.engines.vllm.block_objects import BlockPool, HeadShare, head_keys
from kvfs.engines.vllm.scheduler_side import SchedulerSide
from kvfs.engines.vllm.step_plan import BlockTransfer, Transfers
from kvfs.engines.vllm.worker_side import WorkerSide

from .memory_cache import MemoryCache

TOKENS, HEADS, LAYERS, TOKEN_BYTES, BLOCKS = 4, 4, 3, 1024, 32


@pytest.fixture
def cache():
    return MemoryCache()


@pytest.fixture
def worker_of(cache):
    """A function that makes the worker of one rank, over a pool of random bytes."""
    made = []

    def make(rank=0, num_ranks=1, seed=0, staging_bytes=1 << 20):
        heads = HeadShare.of_rank(rank, num_ranks, HEADS)
        random = np.random.default_rng(seed)
        layers = [
            random.integers(0, 256, (BLOCKS, heads.count, TOKENS, TOKEN_BYTES), np.uint8) for _ in range(LAYERS)
        ]
        made.append(WorkerSide(cache, lambda: None, BlockPool(layers), heads, staging_bytes))
        return made[-1], layers

    yield make
    cache.gate.set()
    for worker in made:
        worker.close()


def request(name="r", num_blocks=4, **more):
    """As vLLM's Request, as far as the scheduler's half looks."""
    hashes = [b"%032d" % index for index in range(num_blocks)]
    settings = {"num_preemptions": 0, "num_tokens": num_blocks * TOKENS, "block_hashes": hashes, **more}
    return types.SimpleNamespace(request_id=name, **settings)


def scheduler_of(cache, salt=b""):
    return SchedulerSide(cache, HEADS, TOKENS, lambda _: salt, names_of)


def names_of(one):
    return f"tenant of {one.request_id}", "m"


def step(scheduler, one, num_computed, block_ids):
    return scheduler.plan({one.request_id: (num_computed, lambda: block_ids)})


def save(worker, keys, block_ids):
    worker.begin()
    worker.save(Transfers(saves=[BlockTransfer("r", keys, block_ids)]))


def load(worker, keys, block_ids):
    worker.load(Transfers(loads=[BlockTransfer("r", keys, block_ids)]))
    loaded = worker._loader.loaded(10.0)
    assert loaded.request_ids == {"r"}
    return loaded.failed_block_ids


def written(worker):
    """All that was handed over is stored."""
    assert worker._writer.reserve(worker._writer._limit_bytes, 10.0)
    with worker._writer._changed:
        worker._writer._staged_bytes = 0


def test_other_tensor_parallel_size(cache, worker_of):
    """Blocks stored by two ranks are read by one, and by four: heads are known by their number in the model."""
    keys, ids = [b"a" * 32, b"b" * 32], [3, 7]
    stored = []
    for rank in range(2):
        worker, layers = worker_of(rank, 2, seed=rank)
        save(worker, keys, ids)
        written(worker)
        stored.append([layer[ids] for layer in layers])
    whole = [np.concatenate(parts, axis=1) for parts in zip(*stored, strict=True)]  # heads side by side
    for num_ranks in (1, 4):
        for rank in range(num_ranks):
            worker, layers = worker_of(rank, num_ranks, seed=9)
            assert not load(worker, keys, [11, 2])
            count = HEADS // num_ranks
            for layer, expected in zip(layers, whole, strict=True):
                assert np.array_equal(layer[[11, 2]], expected[:, rank * count : (rank + 1) * count])


def test_one_of_the_ranks_with_the_same_head_stores_it():
    """More ranks than heads: each is read by several, and stored once."""
    shares = [HeadShare.of_rank(rank, 8, 4) for rank in range(8)]
    assert [share.first for share in shares] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [share.is_first for share in shares] == [True, False] * 4
    with pytest.raises(ValueError, match="3 KV heads"):
        HeadShare.of_rank(0, 2, 3)


def test_a_block_counts_with_all_its_heads(cache):
    """An engine that is killed between two heads leaves a block that nobody may count on."""
    scheduler, one = scheduler_of(cache), request()
    keys = head_keys(one.block_hashes, 0, HEADS)
    cache.objects = dict.fromkeys(keys, b"")
    assert scheduler.num_found(one, 0) == 4 * TOKENS
    del cache.objects[keys[2 * HEADS + 3]]
    assert scheduler.num_found(one, 0) == 2 * TOKENS
    assert scheduler.num_found(one, 1 * TOKENS) == 1 * TOKENS
    assert scheduler.num_found(one, 3 * TOKENS) == 0


def test_blocks_are_stored_once_and_when_full(cache):
    """A token that is not known yet, or not computed, would be stored as something else."""
    scheduler, one = scheduler_of(cache), request(num_blocks=2)
    assert scheduler.num_found(one, 0) == 0
    scheduler.allocated(one, [5, 6, 7], 0, 0)
    assert not step(scheduler, one, TOKENS - 1, [5, 6, 7]).saves
    first = step(scheduler, one, TOKENS + 1, [5, 6, 7]).saves
    assert first == [BlockTransfer("r", [one.block_hashes[0]], [5])]
    second = step(scheduler, one, 3 * TOKENS, [5, 6, 7]).saves  # the third block has no hash: sampled ahead
    assert second == [BlockTransfer("r", [one.block_hashes[1]], [6])]
    assert not step(scheduler, one, 3 * TOKENS + 1, [5, 6, 7]).saves


def test_what_was_lost_is_stored_again_and_not_asked_again(cache):
    """A damaged object must neither be counted on for ever nor stay a hole in all prompts that need it."""
    scheduler, one = scheduler_of(cache), request()
    cache.objects = dict.fromkeys(head_keys(one.block_hashes, 0, HEADS), b"")
    assert scheduler.num_found(one, TOKENS) == 3 * TOKENS
    scheduler.allocated(one, [5, 6, 7, 8], TOKENS, 3 * TOKENS)
    (loading,) = step(scheduler, one, 0, []).loads
    assert loading == BlockTransfer("r", one.block_hashes[1:], [6, 7, 8])
    scheduler.failed({7, 8})
    assert scheduler.num_found(one, 0) == 0
    (again,) = step(scheduler, one, 4 * TOKENS, [5, 6, 7, 8]).saves
    assert again.block_ids == [7, 8]


def test_blocks_outside_a_sliding_window_are_left_alone(cache):
    """vLLM's null block stands for them: it is everybody's."""
    scheduler, one = scheduler_of(cache), request()
    cache.objects = dict.fromkeys(head_keys(one.block_hashes, 0, HEADS), b"")
    assert scheduler.num_found(one, 0)
    scheduler.allocated(one, [0, 0, 7, 8], 0, 4 * TOKENS)
    (loading,) = step(scheduler, one, 0, []).loads
    assert loading.block_ids == [7, 8] and loading.keys == one.block_hashes[2:]


def test_salts_and_resets_separate(cache):
    """An adapter that was trained again, or weights that were replaced, under hashes that are the same."""
    scheduler, one = scheduler_of(cache, b"adapter 1"), request()
    scheduler.num_found(one, 0)
    (saved,) = step(scheduler, one, 4 * TOKENS, [1, 2, 3, 4]).saves
    cache.objects = dict.fromkeys(head_keys(saved.keys, 0, HEADS), b"")
    assert scheduler_of(cache, b"adapter 1").num_found(request(), 0)
    assert not scheduler_of(cache, b"adapter 2").num_found(request(), 0)
    assert not scheduler_of(cache).num_found(request(), 0)
    scheduler.reset()
    assert not scheduler.num_found(request("s"), 0)
    assert not SchedulerSide(cache, HEADS, TOKENS, lambda _: None, names_of).num_found(one, 0)


def test_requests_are_counted_with_reasons(cache):
    """A cache that helps nobody, and whose owner cannot see whom it fails, or why."""
    scheduler, keys = scheduler_of(cache), head_keys(request().block_hashes, 0, HEADS)

    def asked(name, num_computed=0, **more):
        one = request(name, **more)
        for _ in range(3):  # vLLM asks again while it has no blocks for it
            num_found = scheduler.num_found(one, num_computed)
        scheduler.allocated(one, [5, 6, 7, 8], num_computed, num_found)
        return one

    scheduler.finished(asked("cold"))
    cache.of_others = set(keys)
    scheduler.finished(asked("other"))
    cache.objects = dict.fromkeys(keys[: 3 * HEADS], b"")
    scheduler.finished(asked("part"))
    scheduler.finished(asked("begun", num_computed=TOKENS))
    scheduler.finished(asked("nothing wanted", num_computed=4 * TOKENS))
    cache.objects = dict.fromkeys(keys, b"")
    scheduler.finished(asked("all"))
    lost = asked("lost")
    scheduler.failed({7})
    scheduler.finished(lost)
    assert [(name.split()[-1], *rest) for name, model, *rest in cache.requests] == [
        ("cold", 4 * TOKENS, 0, "absent"),
        ("other", 4 * TOKENS, 0, "identity"),
        ("part", 4 * TOKENS, 3 * TOKENS, "identity"),
        ("begun", 3 * TOKENS, 2 * TOKENS, "identity"),
        ("all", 4 * TOKENS, 4 * TOKENS, None),
        ("lost", 4 * TOKENS, 2 * TOKENS, "lost"),
    ]


def test_a_hole_fails_from_there_on(cache, worker_of):
    """What comes before a lost block is used; the lost one and what is behind it is reported, and untouched."""
    worker, layers = worker_of(seed=1)
    keys = [bytes([number]) * 32 for number in range(4)]
    save(worker, keys, [1, 2, 3, 4])
    written(worker)
    del cache.objects[head_keys(keys, 0, HEADS)[2 * HEADS]]
    other, into = worker_of(seed=2)
    before = into[0][[12, 13]].copy()
    assert load(other, keys, [10, 11, 12, 13]) == {12, 13}
    assert np.array_equal(into[0][[10, 11]], layers[0][[1, 2]])
    assert np.array_equal(into[0][[12, 13]], before)


def test_slow_drive_holds_nobody_up(cache, worker_of):
    """A step waits for staging memory a small part of its own time at most, and stores less."""
    worker, _ = worker_of(staging_bytes=4 * HEADS * LAYERS * TOKENS * TOKEN_BYTES)
    cache.gate.clear()
    keys = [bytes([number]) * 32 for number in range(16)]
    save(worker, keys, list(range(1, 17)))
    assert worker._writer.blocks_skipped >= 8
    cache.gate.set()
    written(worker)
    assert 0 < len(cache.objects) <= 8 * HEADS


def test_full_drive_is_one_line(cache, worker_of, caplog):
    """An engine says once that it does not store, not once for each block, and goes on."""
    worker, _ = worker_of()
    cache.has_room = False
    for number in range(5):
        save(worker, [bytes([number]) * 32], [number + 1])
    written(worker)
    assert worker._writer.objects_refused == 5 * HEADS
    assert [record.message for record in caplog.records if "no room" in record.message] == [
        "kvfs: no room: the drive is full, or the cache at its cap; blocks are not stored"
    ]


def test_what_is_there_is_not_copied_again(cache, worker_of):
    """A prompt that several requests share is written once."""
    worker, _ = worker_of()
    for _ in range(3):
        save(worker, [b"k" * 32], [5])
        written(worker)
    assert cache.num_puts == 1
