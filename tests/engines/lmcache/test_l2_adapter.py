"""kvfs behind LMCache's server, through LMCache's own factory and interface."""

import logging
import time

import numpy as np
import pytest

pytest.importorskip("lmcache.v1", reason="these tests need LMCache: pip install 'kvfs[lmcache]'")

from lmcache.v1.distributed.internal_api import L2AdapterListener

from kvfs.engines import shared_store

from .conftest import CHUNK_BYTES, Caller, chunk, key, layout, make_adapter, same


def test_round_trip(open_adapter):
    """A chunk that comes back with other bytes: wrong K/V in the engine."""
    adapter = Caller(open_adapter())
    keys, chunks = [key(number) for number in range(20)], [chunk(number) for number in range(20)]
    assert adapter.store(keys, chunks).bytes_transferred() == 20 * CHUNK_BYTES
    wanted = [keys[7], key(1000), keys[3]]
    assert adapter.look_up(wanted) == [True, False, True]
    loaded = adapter.load(wanted)
    assert same(loaded[0], chunks[7]) and same(loaded[2], chunks[3])
    assert loaded[1] is None
    assert adapter.store(keys, chunks).bytes_transferred() == 0  # they were there


def test_after_a_restart(open_adapter):
    """Chunks that do not survive, the reason to have the adapter."""
    adapter = open_adapter()
    keys, chunks = [key(number, salt="tenant") for number in range(4)], [chunk(number) for number in range(4)]
    Caller(adapter).store(keys, chunks)
    adapter.close()
    adapter = Caller(open_adapter())
    assert adapter.look_up(keys) == [True] * 4
    assert all(map(same, adapter.load(keys), chunks))
    listed = adapter.adapter.list_l2_keys()
    assert sorted(entry.key.chunk_hash_hex for entry in listed.entries) == [
        one.chunk_hash.hex() for one in keys
    ]
    assert {entry.key.cache_salt for entry in listed.entries} == {"tenant"}


def test_event_fds(open_adapter):
    """One event fd for two kinds of results: the controllers would miss results."""
    adapter = open_adapter()
    fds = {adapter.get_store_event_fd(), adapter.get_load_event_fd(), adapter.get_lookup_and_lock_event_fd()}
    assert len(fds) == 3


def test_tasks_in_flight(open_adapter):
    """Tasks that are mixed up while several are under way; results given twice."""
    adapter = open_adapter()
    batches = [([key(10 * batch + number) for number in range(10)], batch) for batch in range(6)]
    chunks = {one: chunk(seed) for keys, _ in batches for seed, one in enumerate(keys)}
    tasks = {adapter.submit_store_task(keys, [chunks[one] for one in keys]) for keys, _ in batches}
    deadline, done = time.monotonic() + 20, {}
    while set(done) != tasks:
        assert time.monotonic() < deadline
        done |= adapter.pop_completed_store_tasks()
    assert all(result.is_successful() for result in done.values())
    loads = []
    for keys, _ in batches:
        memory = [chunk() for _ in keys]
        loads.append((adapter.submit_load_task(keys, memory), keys, memory))
    for task, keys, memory in loads:
        while (found := adapter.query_load_result(task)) is None:
            assert time.monotonic() < deadline
        assert adapter.query_load_result(task) is None
        assert found.popcount() == len(keys)
        assert all(same(one, chunks[name]) for one, name in zip(memory, keys, strict=True))


@pytest.mark.parametrize(
    ("other_key", "other_layout"),
    [
        ({"model": "other/model"}, {}),
        ({"world_size": 2}, {}),
        ({}, {"dtype": "float16"}),
        ({}, {"shape": (2, 4, 64, 64)}),
    ],
)
def test_another_identity(open_adapter, other_key, other_layout):
    """K/V of another model, parallelism, dtype or layout of the same size, loaded for this one."""
    adapter = Caller(open_adapter())
    stored = chunk(1)
    adapter.store([key(1)], [stored])
    other = key(1, **other_key)
    desc = layout(**other_layout)
    assert adapter.look_up([other], desc) == [False]
    assert adapter.load([other], desc) == [None]
    if not other_key:
        assert adapter.adapter.report_status()["misses"]["identity"] == 2
    replacement = chunk(2, desc)
    adapter.store([other], [replacement])
    assert same(adapter.load([other], desc)[0], replacement)
    assert same(adapter.load([key(1)])[0], stored)


def test_another_version(open_adapter, monkeypatch, caplog):
    """Chunks of another LMCache, which may have laid them out otherwise; and nobody is told."""
    from kvfs.engines.lmcache import chunk_caches

    adapter = open_adapter()
    Caller(adapter).store([key(1)], [chunk(1)])
    adapter.close()
    monkeypatch.setattr(chunk_caches, "version_facts", lambda: {"lmcache": "0.0.1"})
    adapter = Caller(open_adapter())
    with caplog.at_level(logging.WARNING, logger=chunk_caches.logger.name):
        chunk_caches.logger.addHandler(caplog.handler)
        try:
            assert adapter.look_up([key(1)]) == [False]
            assert adapter.look_up([key(1)]) == [False]
        finally:
            chunk_caches.logger.removeHandler(caplog.handler)
    assert len([record for record in caplog.records if "another identity" in record.getMessage()]) == 1
    assert adapter.adapter.report_status()["misses"]["identity"] == 2


def test_tenants(open_adapter):
    """A tenant who finds what another one has cached; or whose chunks count for another one."""
    adapter = Caller(open_adapter())
    adapter.store([key(1, salt="a"), key(2, salt="a")], [chunk(1), chunk(2)])
    adapter.store([key(3, salt="b")], [chunk(3)])
    assert adapter.look_up([key(1, salt="b"), key(1), key(1, salt="a")]) == [False, False, True]
    assert adapter.adapter.report_status()["misses"]["identity"] == 0  # not even by a reason
    usage = adapter.adapter.get_usage()
    assert dict(usage.bytes_by_cache_salt) == {"a": 2 * CHUNK_BYTES, "b": CHUNK_BYTES}


def test_the_cap(open_adapter):
    """More on the drive than was allowed; locked chunks evicted before they are loaded."""
    adapter = Caller(open_adapter(capacity_bytes="1MiB"))
    kept = key(0)
    adapter.store([kept], [chunk(0)])
    assert adapter.look_up([kept]) == [True]
    for number in range(1, 40):
        adapter.store([key(number)], [chunk(number)])
        usage = adapter.adapter.get_usage()
        assert usage.total_bytes_used <= usage.total_capacity_bytes == 1 << 20
    assert same(adapter.load([kept])[0], chunk(0))
    adapter.adapter.submit_unlock([kept])
    for number in range(40, 80):
        adapter.store([key(number)], [chunk(number)])
    assert adapter.look_up([kept, key(79)]) == [False, True]


def test_all_is_locked(open_adapter):
    """A store that hangs, or evicts what is locked, where nothing may be evicted; and loads that end with
    it."""
    adapter = Caller(open_adapter(capacity_bytes=str(5 * CHUNK_BYTES - 4096)))
    keys = [key(number) for number in range(4)]
    assert adapter.store(keys, [chunk(number) for number in range(4)]).is_successful()
    assert all(adapter.look_up(keys))
    assert not adapter.store([key(9)], [chunk(9)]).is_successful()
    assert all(same(one, chunk(number)) for number, one in enumerate(adapter.load(keys)))
    adapter.adapter.submit_unlock(keys)
    assert adapter.store([key(9)], [chunk(9)]).is_successful()


def test_a_full_drive(open_adapter):
    """A drive that others have filled: an engine that fails for want of a cache."""
    adapter = open_adapter()
    first = chunk(0)
    Caller(adapter).store([key(0)], [first])
    store = adapter._drive.store
    others = store.object_cache("others")
    number = 0
    while others.put([b"%d" % number], [np.ones(1 << 20, np.uint8)])[0] and number < 200:
        others.pin([b"%d" % number])
        number += 1
    caller, results = Caller(adapter), []
    for one in range(60):
        assert caller.look_up([key(one)]) == [True]  # and locked: there is ever less to be evicted
        results.append(caller.store([key(one + 1)], [chunk(one + 1)]).is_successful())
        if not results[-1]:
            break
    assert not results[-1]
    assert same(caller.load([key(0)])[0], first)


def test_a_damaged_chunk(open_adapter, tmp_path):
    """Damage on flash that the engine computes with, or that takes other chunks with it."""
    path = tmp_path / "drive.kvfs"
    adapter = open_adapter()
    keys, chunks = [key(number) for number in range(3)], [chunk(number) for number in range(3)]
    Caller(adapter).store(keys, chunks)
    shared = adapter._drive.store
    cache = adapter._chunks._by_layout[next(iter(adapter._chunks._by_layout))]
    from kvfs.engines.lmcache.object_keys import l2_key

    (lba, _), *_ = cache._find(l2_key(keys[1])).extents
    shared.flush()
    page = int(shared._drive.ftl.resolve(np.array([lba]))[0])
    offset = shared._drive.ftl.media.layout.data_start + page * 4096 + 7
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    caller = Caller(adapter)
    loaded = caller.load(keys)
    assert same(loaded[0], chunks[0]) and loaded[1] is None and same(loaded[2], chunks[2])
    assert adapter.report_status()["misses"]["damaged"] == 1
    assert caller.look_up(keys) == [True, False, True]
    assert caller.store([keys[1]], [chunks[1]]).is_successful()
    assert same(caller.load([keys[1]])[0], chunks[1])


class Told(L2AdapterListener):
    def __init__(self):
        self.stored, self.accessed, self.deleted = [], [], []

    def on_l2_keys_stored(self, keys, sizes):
        self.stored += keys

    def on_l2_keys_accessed(self, keys):
        self.accessed += keys

    def on_l2_keys_deleted(self, keys):
        self.deleted += keys


def test_delete(open_adapter):
    """Quotas that LMCache cannot enforce: deletion that deletes nothing, or that it hears nothing of."""
    adapter, told = open_adapter(), Told()
    adapter.register_listener(told)
    caller = Caller(adapter)
    keys = [key(number) for number in range(4)]
    caller.store(keys, [chunk(number) for number in range(4)])
    caller.load(keys[:1])
    adapter.delete(keys[:2])
    assert caller.look_up(keys) == [False, False, True, True]
    assert (told.stored, told.accessed, told.deleted) == (keys, keys[:1], keys[:2])
    assert adapter.get_usage().total_bytes_used < 4 * CHUNK_BYTES


def test_pages_of_keys(open_adapter):
    """Keys that a listing in pages leaves out or repeats."""
    adapter = open_adapter()
    keys = [key(number) for number in range(12)] + [key(number, model="other") for number in range(5)]
    Caller(adapter).store(keys, [chunk(1) for _ in keys])
    found, cursor = [], None
    while True:
        page = adapter.list_l2_keys(page_size=5, cursor=cursor)
        assert len(page.entries) <= 5
        assert all(entry.size_bytes == CHUNK_BYTES for entry in page.entries)
        found += [entry.key.to_object_key() for entry in page.entries]
        if (cursor := page.next_page_token) is None:
            break
    assert len(found) == len(keys) and set(found) == set(keys)
    of_model = adapter.list_l2_keys(model_name="other").entries
    assert {entry.key.model_name for entry in of_model} == {"other"} and len(of_model) == 5
    for wrong in ({"page_size": 0}, {"cursor": "nonsense"}, {"cursor": "12:xy"}):
        with pytest.raises(ValueError):
            adapter.list_l2_keys(**wrong)


def test_serialized_chunks(open_adapter):
    """LMCache's serializers store plain bytes and look them up by the engine's layout: never found."""
    adapter = Caller(open_adapter())
    serialized = layout((CHUNK_BYTES // 2,), "uint8")
    stored = chunk(1, serialized)
    adapter.store([key(1)], [stored])
    assert adapter.look_up([key(1)], layout()) == [True]
    assert same(adapter.load([key(1)], serialized)[0], stored)


def test_one_drive_for_several(open_adapter, tmp_path):
    """Two adapters of one process on one drive: the second one refused, or the drive closed under the first."""
    first, second = open_adapter(), open_adapter(cache="another")
    Caller(first).store([key(1)], [chunk(1)])
    assert Caller(second).look_up([key(1)]) == [False]
    second.close()
    assert same(Caller(first).load([key(1)])[0], chunk(1))
    first.close()
    first.close()
    assert not shared_store._stores
    assert not first.report_status()["is_healthy"]


def test_what_cannot_be_opened(tmp_path):
    """A server that starts without its cache, or leaves a drive locked behind."""
    from kvfs.errors import KvfsError

    (tmp_path / "text").write_text("no drive")
    with pytest.raises(KvfsError):
        make_adapter(tmp_path / "text")
    for params in ({"path": ""}, {"capacity_byte": 1}, {"num_threads": 0}, {"capacity_bytes": "many"}):
        with pytest.raises(ValueError):
            make_adapter(**{"path": tmp_path / "drive.kvfs", **params})
    assert not shared_store._stores and not (tmp_path / "drive.kvfs").exists()
    with pytest.raises(KvfsError):
        make_adapter(tmp_path / "none.kvfs", size=None)


def test_made_durable_by_itself(open_adapter, tmp_path):
    """An engine that is killed loses all since it was started."""
    adapter = open_adapter(flush_seconds=0.05)
    Caller(adapter).store([key(1)], [chunk(1)])
    store, deadline = adapter._drive.store, time.monotonic() + 10
    while store._objects._changes:
        assert time.monotonic() < deadline
        time.sleep(0.02)
