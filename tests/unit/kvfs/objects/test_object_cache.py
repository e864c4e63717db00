"""Caches of objects in process: right bytes, the cap, what a miss says, and what is left after a restart."""

import logging
import threading

import numpy as np
import pytest

import kvfs
from kvfs.errors import CatalogueFull, InvalidArgument, NvmeStatusError, StoreClosed
from kvfs.objects import object_caches
from kvfs.telemetry.metrics import metrics_text
from spdk_glue import dma
from spdk_glue.command import IoOpcode
from spdk_glue.status import Status

from .conftest import MIB, NO_MISSES, content, get, key_of, put

BLOCK = 4096


def drive_bytes(store):
    space = store.counters()["space"]
    return space["capacity_bytes"] - space["free_bytes"]


@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7, MIB])
@pytest.mark.parametrize("offset", [0, 1, 64])
def test_any_size_and_alignment(cache, num_bytes, offset):
    """The last part block, and memory that no drive transfers to, with what lies around it untouched."""
    memory = dma.allocate(num_bytes + 2 * BLOCK)
    data = memory[offset : offset + num_bytes]
    data[:] = content(1, num_bytes)
    assert cache.put([b"k"], [data]) == [True]
    memory[:] = 0xEE
    assert cache.get([b"k"], [data]) == [True]
    assert np.array_equal(data, content(1, num_bytes))
    assert (memory[:offset] == 0xEE).all() and (memory[offset + num_bytes :] == 0xEE).all()
    assert cache.sizes([b"k", b"l"]) == [num_bytes, None]


def test_buffers_of_many_kinds(cache):
    """What engines have: bytes, views of them, arrays of any type."""
    objects = [
        b"abc",
        bytearray(b"abc"),
        memoryview(b"abc"),
        np.frombuffer(b"abc", "S3"),
        np.zeros((2, 3), "<f2"),
    ]
    keys = [bytes([number]) for number in range(len(objects))]
    assert cache.put(keys, objects) == [True] * len(objects)
    out = np.ones((2, 3), "<f2")
    assert cache.get([keys[-1]], [out]) == [True] and not out.any()
    buffer = bytearray(3)
    assert cache.get(keys[:1], [buffer]) == [True] and buffer == b"abc"
    for bad in ([np.zeros((4, 4))[:, 1]], ["abc"], [None], [b"read-only"]):
        with pytest.raises(InvalidArgument):
            cache.get(keys[:1], bad)
    for bad_keys in ([b""], [b"x" * 65], ["text"]):
        with pytest.raises(InvalidArgument):
            cache.contains(bad_keys)
    with pytest.raises(InvalidArgument):
        cache.put([b"a", b"b"], [b"one"])
    with pytest.raises(InvalidArgument, match="twice"):
        cache.put([b"a", b"a"], [b"one", b"three"])
    assert cache.put([b"a", b"a"], [b"one", b"one"]) == [True, True]
    assert cache.put([], []) == cache.get([], []) == cache.pin([]) == []


def test_one_batch_of_commands(store, cache, monkeypatch):
    """Eight objects in one batch each way; aligned ones without a copy."""
    batches = []
    for name in ("read_scattered", "write_scattered"):
        method = getattr(store._namespace, name)

        def counted(extents, *arguments, method=method):
            batches.append([data for _, data in extents])
            return method(extents, *arguments)

        monkeypatch.setattr(store._namespace, name, counted)
    memory = dma.allocate(8 * MIB).reshape(8, MIB)
    keys = [key_of(number) for number in range(8)]
    cache.put(keys, list(memory))
    cache.get(keys, list(memory))
    assert [len(batch) for batch in batches] == [8, 8]
    for batch in batches:
        assert all(np.shares_memory(data, memory) for data in batch)


def test_a_key_keeps_its_object(store, cache):
    """Keys name content: what is there is not written again, but for another size."""
    put(cache, 1)
    written = cache.usage(), store._objects.counters()["bytes_written"]
    assert put(cache, 1) == [True]
    assert (cache.usage(), store._objects.counters()["bytes_written"]) == written
    assert cache.put([key_of(1)], [content(2, 5000)]) == [True]
    buffer = np.empty(5000, np.uint8)
    assert cache.get([key_of(1)], [buffer]) == [True] and np.array_equal(buffer, content(2, 5000))
    assert cache.usage()[:2] == (1, 2 * BLOCK)
    store.flush()
    assert drive_bytes(store) == 2 * BLOCK and store.check() == []


def test_misses_have_reasons(store, cache):
    """Another model over the same keys is a miss, never its bytes."""
    put(cache, 1)
    other = store.object_cache("cache", {"model": "n", "layers": 2})
    assert get(other, 1) == [False] and list(other.keys()) == [] and other.contains([key_of(1)]) == [False]
    assert get(cache, 2) == [False]
    assert get(cache, 1, num_bytes=MIB - 1) == [False]
    same = store.object_cache("cache", {"layers": 2, "model": "m"})
    assert get(same, 1) == [True]
    usage = cache.usage()
    assert usage.hits == 1
    assert usage.misses == {**NO_MISSES, "absent": 1, "identity": 1, "size": 1}
    assert put(other, 1) == [True] and usage.objects + 1 == cache.usage().objects
    assert other.delete([key_of(1)]) == 1 and get(cache, 1) == [True]
    counters = store.counters()["objects"]
    assert counters["hits"] == 2 and counters["miss_identity"] == 1
    assert [row["cache"] for row in counters["caches"]] == ["cache"]


def test_who_looks_up_or_pins_counts_misses(store, cache):
    """A hit rate that looks good because misses are met before anything is read."""
    put(cache, 1)
    other = store.object_cache("cache", {"model": "n"})
    assert cache.look_up([key_of(1), key_of(2)]) == [None, "absent"]
    assert other.look_up([key_of(1), key_of(2)]) == ["identity", "absent"]
    assert cache.usage().misses == {**NO_MISSES, "absent": 2, "identity": 1}
    assert other.pin([key_of(1), key_of(2)]) == [False, False] and cache.pin([key_of(1)]) == [True]
    assert cache.usage().misses == {**NO_MISSES, "absent": 3, "identity": 2}
    assert cache.contains([key_of(2)]) == [False]  # a question
    assert cache.usage().hits == 0 and sum(cache.usage().misses.values()) == 5


def test_requests_by_tenant_and_model(store, cache):
    """An owner who cannot see which tenant or model gets nothing out of a cache, and why."""
    for tenant, miss, found in (("t", None, 300), ("t", "absent", 100), ("t", "lost", 0), ("", "identity", 0)):
        cache.count_request(tenant, "m", 300, found, miss)
    rows = store.counters()["objects"]["tenants"]
    assert [(row["cache"], row["tenant"], row["model"]) for row in rows] == [
        ("cache", "", "m"),
        ("cache", "t", "m"),
    ]
    known = {"lookups": 3, "hits": 2, "misses": 1, "tokens_wanted": 900, "tokens_found": 400}
    assert rows[1].items() >= {**known, "miss_absent": 1, "miss_identity": 0, "miss_lost": 1}.items()
    metric = 'kvfs_object_request_misses_total{cache="cache",model="m",reason="identity",tenant=""} 1.0'
    assert metric in metrics_text(store.telemetry()).decode()
    for bad in (
        ("t\n", "m", 1, 1, None),
        ("t", "", 1, 1, None),
        ("t", "m", 1, 2, None),
        ("t", "m", 1, 0, None),
    ):
        with pytest.raises(InvalidArgument):
            cache.count_request(*bad)
    with pytest.raises(InvalidArgument):
        cache.count_request("t", "m", 1, 0, "damp")


def test_the_cap_holds(store):
    """Both identities count; what was not used longest goes; nothing goes for what never fits."""
    cache = store.object_cache("cache", {"model": "m"}, "4MiB")
    other = store.object_cache("cache", {"model": "n"})
    put(cache, 1, 2, 3)
    put(other, 4)
    get(cache, 1)
    put(other, 5)
    assert cache.contains([key_of(seed) for seed in (1, 2, 3)]) == [True, False, True]
    assert put(cache, 6, num_bytes=4 * MIB + 1) == [False]
    assert cache.usage()[:3] == (4, 4 * MIB, 4 * MIB) and cache.usage().evictions == 1
    assert put(cache, *range(10, 16)) == [True] * 4 + [False] * 2  # a batch does not evict itself
    cache.set_capacity(2 * MIB)
    assert cache.usage()[:2] == (2, 2 * MIB)
    cache.set_capacity(None)
    assert put(cache, *range(20, 26)) == [True] * 6
    for bad in (0, -1, "much", 1.5):
        with pytest.raises(InvalidArgument):
            store.object_cache("cache", {}, bad)


def test_a_cap_goes_to_the_catalogue_behind_what_it_evicts(store, cache):
    """A power cut that has other objects evicted than those that were: flushed ones, just used."""
    put(cache, 1, 2, 3)
    store.flush()
    get(cache, 1)
    cache.set_capacity(MIB)
    assert [usage.bytes for usage in store._objects._catalogue.usage()] == [MIB]


def test_a_catalogue_without_room(store, cache, monkeypatch, caplog):
    """What replaced another is dropped; the row that it left names blocks that are somebody else's soon."""
    put(cache, 1, 2)
    store.flush()

    def full(rows):
        raise CatalogueFull(0)

    with monkeypatch.context() as patch:
        patch.setattr(store._objects._catalogue, "add", full)
        assert put(cache, 1, num_bytes=MIB // 2) == [True]
        store._objects.write_rows()
        assert [key for _, _, key, _ in store._objects._catalogue.placed()] == [key_of(2)]
        store.flush()
    assert [record.message for record in caplog.records if "1 objects are dropped" in record.message]
    caplog.clear()
    store.flush()  # what was dropped then
    assert cache.contains([key_of(1), key_of(2)]) == [False, True]
    assert drive_bytes(store) == MIB and store.check() == []


def test_pins(store):
    """Pinned objects stay; a cap below them is refused; pins are counted."""
    cache = store.object_cache("cache", capacity_bytes=3 * MIB)
    put(cache, 1, 2, 3)
    assert cache.pin([key_of(1), key_of(1), key_of(9)]) == [True, True, False]
    assert put(cache, 4, 5) == [True, True]
    assert cache.contains([key_of(seed) for seed in (1, 2, 3, 4, 5)]) == [True, False, False, True, True]
    with pytest.raises(InvalidArgument, match="pinned"):
        cache.set_capacity(MIB // 2)
    cache.pin([key_of(4), key_of(5)])
    assert put(cache, 6) == [False]
    assert cache.unpin([key_of(1), key_of(4)]) == [True, True]
    assert put(cache, 6) == [True] and cache.contains([key_of(1), key_of(4)]) == [True, False]
    assert cache.unpin([key_of(1), key_of(1), key_of(9)]) == [True, False, False]
    assert cache.delete([key_of(5), key_of(5)]) == 1
    assert cache.usage()[:2] == (2, 2 * MIB)


def test_a_full_drive(store):
    """Own objects go first, others' never; then it is False, and all accounts are right."""
    other = store.object_cache("other")
    put(other, *range(8))
    cache = store.object_cache("cache")
    for seed in range(100, 160):
        assert put(cache, seed) == [True]
    assert cache.usage().evictions > 0 and other.usage().evictions == 0
    assert get(other, *range(8)) == [True] * 8
    cache.pin(list(cache.keys()))
    assert put(cache, *range(200, 203)).count(False) > 0
    assert cache.usage().bytes + other.usage().bytes <= drive_bytes(store)
    assert store.check() == []
    model = store.add_model("m", num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=64)
    store.drop_objects("cache")
    rows = np.ones((2560, 1, 64), np.float16)
    store.create_sequence(model, "s").append(0, rows, rows)  # room that was just given up
    store.flush()
    assert store.check() == []


def test_a_restart(path):
    """Objects, caps, identities and the order of use are as before."""
    with kvfs.open(path, cache_bytes="8MiB") as store:
        cache = store.object_cache("cache", {"model": "m"}, 4 * MIB)
        put(cache, 1, 2, 3, 4)
        store.flush()
        get(cache, 1, 2)
        cache.pin([key_of(3)])
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert store.check() == []
        assert [(row.name, row.objects, row.bytes) for row in store.object_usage()] == [("cache", 4, 4 * MIB)]
        cache = store.object_cache("cache", {"model": "m"})
        assert cache.usage()[:3] == (4, 4 * MIB, 4 * MIB)
        assert get(store.object_cache("cache", {"model": "n"}), 1) == [False]
        put(cache, 5, 6)
        assert get(cache, 1, 2, 3, 4) == [True, True, False, False]
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert store.drop_objects("nothing") == 0 and store.drop_objects() == 4
        store.flush()
        assert drive_bytes(store) == 0
    with pytest.raises(StoreClosed):
        put(cache, 1)
    with pytest.raises(StoreClosed):
        cache.usage()


def test_a_damaged_object(store, cache, lose, caplog):
    """A miss, told once, and gone with its blocks; its neighbours in the batch are read."""
    put(cache, 1, 2, 3)
    lose(cache._index.find(cache._identity_id, key_of(2)).extents[0][0] + 5)
    with caplog.at_level(logging.WARNING, "kvfs.objects"):
        assert get(cache, 1, 2, 2, 3) == [True, False, False, True]
        assert get(cache, 2) == [False]
    assert len([record for record in caplog.records if record.name.startswith("kvfs.objects")]) == 1
    assert cache.usage().misses == {**NO_MISSES, "absent": 1, "damaged": 2}
    assert cache.usage()[:2] == (2, 2 * MIB)
    assert put(cache, 2) == [True] and get(cache, 1, 2, 3) == [True] * 3
    store.flush()
    assert store.check() == [] and drive_bytes(store) == 3 * MIB


def test_a_write_that_fails(store, cache, monkeypatch):
    """Nothing of it is stored, and its blocks are free; a disk behind the drive that is full is no error."""
    error = NvmeStatusError(IoOpcode.WRITE, Status.WRITE_FAULT)

    def fail(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(store._namespace, "write_scattered", fail)
        with pytest.raises(NvmeStatusError):
            put(cache, 1, 2)
        error = NvmeStatusError(IoOpcode.WRITE, Status.CAPACITY_EXCEEDED)
        assert put(cache, 1, 2) == [False, False]
    assert cache.usage()[:2] == (0, 0)
    store.flush()
    assert drive_bytes(store) == 0 and store.check() == []
    assert put(cache, 1, 2) == get(cache, 1, 2) == [True, True]


def test_replaced_while_it_is_read(store, cache, monkeypatch):
    """A reader gets what was there when it began, however often the blocks could have been given to others."""
    put(cache, 1)
    read = store._namespace.read_scattered
    began, replaced = threading.Event(), threading.Event()

    def slow(extents):
        if threading.current_thread() is reader:
            began.set()
            assert replaced.wait(20)
        read(extents)

    with monkeypatch.context() as patched:
        patched.setattr(store._namespace, "read_scattered", slow)
        found = []
        reader = threading.Thread(target=lambda: found.append(get(cache, 1)))
        reader.start()
        assert began.wait(20)
        assert cache.delete([key_of(1)]) == 1
        assert cache.usage()[:2] == (0, MIB)  # until it is read
        for seed in range(2, 60):
            put(cache, seed)
            cache.delete([key_of(seed)])
            store.flush()
        assert store.check() == []
        replaced.set()
        reader.join()
    assert found == [[True]]
    assert cache.usage()[:2] == (0, 0)
    store.flush()
    assert drive_bytes(store) == 0 and store.check() == []


def test_closing_waits_for_readers(path, monkeypatch):
    """The drive must not go while it transfers into somebody's memory."""
    store = kvfs.open(path, cache_bytes="8MiB")
    cache = store.object_cache("cache")
    put(cache, 1)
    read = store._namespace.read_scattered
    began, go_on = threading.Event(), threading.Event()

    def slow(extents):
        began.set()
        assert go_on.wait(20)
        read(extents)

    monkeypatch.setattr(store._namespace, "read_scattered", slow)
    found = []
    reader = threading.Thread(target=lambda: found.append(get(cache, 1)))
    reader.start()
    assert began.wait(20)
    closer = threading.Thread(target=store.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    go_on.set()
    reader.join()
    closer.join()
    assert found == [[True]]


def test_many_threads(store):
    """Puts, gets, deletes and flushes at once under a tight cap: right bytes or a miss, accounts right."""
    cache = store.object_cache("cache", capacity_bytes=MIB)
    sizes = [3000, 70_000, 200_000]
    failures = []

    def work(thread):
        random = np.random.default_rng(thread)
        try:
            for step in range(150):
                seed = int(random.integers(30))
                num_bytes = sizes[seed % 3]
                match int(random.integers(5)):
                    case 0 | 1:
                        put(cache, seed, num_bytes=num_bytes)
                    case 2 | 3:
                        get(cache, seed, num_bytes=num_bytes)
                    case 4:
                        cache.delete([key_of(seed)])
                assert cache.usage().bytes <= MIB
                if step % 40 == 0:
                    store.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    store.flush()
    assert store.check() == []
    assert drive_bytes(store) == cache.usage().bytes


def test_flushes_by_itself(path, monkeypatch):
    """An engine that never flushes: rows are written once enough has come."""
    monkeypatch.setattr(object_caches, "FLUSH_BYTES", 4 * MIB)
    store = kvfs.open(path, cache_bytes="8MiB")
    put(store.object_cache("cache"), 1, 2, 3)
    put(store.object_cache("cache"), 4)
    put(store.object_cache("cache"), 5)
    store._abandon()
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert get(store.object_cache("cache"), 1, 2, 3, 4, 5) == [True] * 4 + [False]
        assert store.check() == []


def test_names_and_identities(store):
    for name in ("", "a\nb", 3, "x" * 256):
        with pytest.raises(InvalidArgument):
            store.object_cache(name)
    for identity in ([], {"a": [1]}, {3: "x"}, {"a": float("nan")}, {"a": "x" * 5000}):
        with pytest.raises(InvalidArgument):
            store.object_cache("a", identity)


def test_in_a_transaction_that_is_taken_back(store, cache):
    """A fork on a full drive: it is refused, and what was evicted before is neither back nor free too early."""
    put(cache, 1, 2)
    store.flush()
    cache.delete([key_of(1)])
    with pytest.raises(ZeroDivisionError), store._catalogue.transaction():
        store._sync()
        raise ZeroDivisionError
    assert store.check() == []
    assert drive_bytes(store) == MIB and get(cache, 1, 2) == [False, True]
