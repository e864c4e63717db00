"""An embedded drive through its NVMe commands: right answers, and a status for whatever is wrong."""

import threading

import numpy as np
import pytest

from accel.attention_job import INLINE_BYTES
from accel.drive import Drive, DriveConfig
from accel.page_cache import LINE_BYTES
from spdk_glue import command, dma
from spdk_glue.command import IoOpcode
from spdk_glue.namespace import Namespace
from spdk_glue.status import NvmeStatusError, QueueFull, Status, decode
from spdk_glue.vendor_command import (
    ANSWER_HEADER,
    ATTENTION_HEADER,
    ATTENTION_ITEM,
    ATTENTION_MAGIC,
    ATTENTION_VERSION,
    GROUP_EXTENT,
    answer_bytes,
)
from tests.unit.accel.conftest import GEOMETRY, blocks

HEADS, GROUP, HEAD_DIM, GROUP_TOKENS = 2, 4, 64, 256
LAYER_LBAS = HEADS * 2 * 8  # 8 pages of 32 rows per head and tensor


@pytest.fixture
def small_drive(tmp_path, monkeypatch, num_lines):
    """Its cache has the test's num_lines, fewer than a drive is opened with."""
    monkeypatch.setattr("accel.drive.MIN_CACHE_BYTES", 0)
    Drive.format(tmp_path / "drive", GEOMETRY)
    config = DriveConfig(cache_bytes=num_lines * LINE_BYTES, num_workers=2)
    drive = Drive.open(tmp_path / "drive", config)
    yield drive
    drive.close()


def groups(namespace, num_groups, base=64, seed=0, scattered=False):
    """One-layer token groups on the drive; keys and values float16 [tokens, HEADS, HEAD_DIM].

    scattered: each of their pages lies in a cache line of its own.
    """
    random = np.random.default_rng(seed)
    shape = (num_groups, HEADS, 2, GROUP_TOKENS, HEAD_DIM)
    image = random.standard_normal(shape, np.float32).astype(np.float16)
    data = dma.allocate(image.nbytes)
    data[:] = image.reshape(-1).view(np.uint8)
    if scattered:
        for number in range(len(data) // 4096):
            namespace.write(base + number, data[number * 4096 : (number + 1) * 4096])
            namespace.write(6000, blocks(15))
    else:
        namespace.write(base, data, placement_id=2)
    rows = image.transpose(2, 0, 3, 1, 4).reshape(2, num_groups * GROUP_TOKENS, HEADS, HEAD_DIM)
    return rows[0], rows[1]


def descriptor(num_groups, base=64, queries=None, **changes):
    header, item = np.zeros(1, ATTENTION_HEADER), np.zeros(1, ATTENTION_ITEM)
    extent = np.zeros(1, GROUP_EXTENT)
    if queries is None:
        queries = np.random.default_rng(1).standard_normal((1, 1, HEADS * GROUP, HEAD_DIM), np.float32)
    fields = {
        "magic": ATTENTION_MAGIC,
        "version": ATTENTION_VERSION,
        "num_items": 1,
        "num_extents": 1,
        "queries_offset": header.nbytes + item.nbytes + extent.nbytes,
        "group_tokens": GROUP_TOKENS,
        "num_layers": 1,
        "num_kv_heads": HEADS,
        "group_size": GROUP,
        "head_dim": HEAD_DIM,
        "num_queries": 1,
        "query_dtype": 2,
        "scale": HEAD_DIM**-0.5,
        "item_num_extents": 1,
        "item_num_tokens": num_groups * GROUP_TOKENS,
        "item_token_stop": num_groups * GROUP_TOKENS,
        "extent_base_lba": base,
        "extent_num_groups": num_groups,
        **changes,
    }
    for name, value in fields.items():
        kind, _, field = name.partition("_")
        record = {"item": item, "extent": extent}.get(kind) if field else None
        if record is None or field not in record.dtype.names:
            header[name] = value
        else:
            record[field] = value
    return np.concatenate(
        [part.view(np.uint8).reshape(-1) for part in (header, item, extent, queries)]
    ), queries


ANSWER = answer_bytes(1, 1, HEADS * GROUP, HEAD_DIM)


def plain(queries, keys, values):
    out = np.empty(queries.shape)
    for head in range(queries.shape[2]):
        scores = keys[:, head // GROUP].astype(np.float64) @ queries[0, 0, head] * HEAD_DIM**-0.5
        weights = np.exp(scores - scores.max())
        out[0, 0, head] = weights @ values[:, head // GROUP].astype(np.float64) / weights.sum()
    return out


def out_of(answer):
    return (
        answer[ANSWER_HEADER.itemsize :]
        .view(np.float32)[: HEADS * GROUP * HEAD_DIM]
        .reshape(1, 1, HEADS * GROUP, HEAD_DIM)
    )


def test_blocks(namespace):
    """Read, Write, Deallocate: data come back, given-back blocks are zeros."""
    data = blocks(300)
    namespace.write(10, data, placement_id=3)
    np.testing.assert_array_equal(namespace.read(10, 300), data)
    namespace.deallocate([(20, 5), (300, 10)])
    want = data.copy().reshape(300, 4096)
    want[10:15] = 0
    want[290:300] = 0
    np.testing.assert_array_equal(namespace.read(10, 300), want.reshape(-1))
    odd = np.zeros(4096 * 2 + 1, np.uint8)[1:]  # memory that no device could reach
    odd[:] = data[: 4096 * 2]
    namespace.write(500, odd)
    np.testing.assert_array_equal(namespace.read(500, 2), odd)
    namespace.flush()


def status_of(call) -> int:
    with pytest.raises(NvmeStatusError) as caught:
        call()
    return caught.value.status


def test_blocks_out_of_range(namespace):
    """Bad ranges: a status, and the neighbours in the same batch succeed."""
    last = namespace.num_lbas
    assert status_of(lambda: namespace.read(last, 1)) == Status.LBA_OUT_OF_RANGE
    assert status_of(lambda: namespace.write(last - 1, blocks(2))) == Status.LBA_OUT_OF_RANGE
    assert status_of(lambda: namespace.deallocate([(last - 1, 2)])) == Status.LBA_OUT_OF_RANGE
    assert status_of(lambda: namespace.deallocate([(1 << 63, 1)])) == Status.LBA_OUT_OF_RANGE
    with pytest.raises(ValueError):
        namespace.write(0, np.zeros(100, np.uint8))
    good = blocks(1)
    assert status_of(lambda: namespace.write_scattered([(5, good), (last, good)])) == Status.LBA_OUT_OF_RANGE
    np.testing.assert_array_equal(namespace.read(5, 1), good)


def test_raw_commands(drive):
    """What no host of ours sends: unknown and bidirectional opcodes, wrong namespaces, missing data."""
    queue_pair = drive.transport.create_queue_pair(depth=4)

    def run(entry, data):
        return decode(int(queue_pair.execute(entry, [data])["status"][0]))

    entry = command.flush()
    for opcode, status in ((0x7C, Status.INVALID_OPCODE), (0x83, Status.INVALID_OPCODE)):
        entry["opcode"] = opcode
        assert run(entry, blocks(1)) == status
    wrong = command.read(0, 1)
    wrong["nsid"] = 7
    assert run(wrong, blocks(1)) == Status.INVALID_NAMESPACE
    assert run(command.read(0, 1), None) == Status.DATA_TRANSFER_ERROR
    assert run(command.read(0, 2), blocks(1)) == Status.SGL_LENGTH_INVALID
    assert run(command.deallocate(3), np.zeros(16, np.uint8)) == Status.SGL_LENGTH_INVALID
    with pytest.raises(QueueFull):
        queue_pair.submit(np.concatenate([command.flush()] * 5), [None] * 5)
    cids = queue_pair.submit(np.concatenate([command.flush()] * 4), [None] * 4)
    assert len(set(cids)) == 4
    assert not queue_pair.wait(cids)["status"].any()
    bad_log = command.get_log_page(0xEE, 512)
    completion = drive.transport.admin.execute(bad_log, [np.zeros(512, np.uint8)])
    assert decode(int(completion["status"][0])) == Status.INVALID_LOG_PAGE


@pytest.mark.parametrize("num_groups", [1, 3, 90])
def test_attention(namespace, num_groups):
    """Numbers: small commands on the caller's thread and large ones through a cache smaller than the data."""
    keys, values = groups(namespace, num_groups)
    for _ in range(2):  # cold, then with what the cache kept
        data, queries = descriptor(num_groups)
        answer = namespace.attend(data, ANSWER)
        np.testing.assert_allclose(out_of(answer), plain(queries, keys, values), atol=1e-5)


@pytest.fixture
def short_way(drive, monkeypatch):
    """One entry for each command that went it: whether it could."""
    found = []
    attend = drive.attention_unit._resident.attend

    def watched(data, answer):
        done = attend(data, answer)
        found.append(done is not None)
        return done

    monkeypatch.setattr(drive.attention_unit._resident, "attend", watched)
    return found


def is_at_rest(drive):
    return not drive.cache._slots[:, 1].any() and not drive.ftl._state.guards._active


@pytest.mark.parametrize("inline_bytes", [0, INLINE_BYTES])
@pytest.mark.parametrize("num_groups", [1, 15])
def test_the_short_way(drive, namespace, short_way, monkeypatch, num_groups, inline_bytes):
    """From the cache, by workers or on the caller's thread: the long way's answer, bit for bit; and counted."""
    monkeypatch.setattr("accel.resident_attention.INLINE_BYTES", inline_bytes)
    groups(namespace, num_groups)
    data, _ = descriptor(num_groups)
    first = namespace.attend(data, ANSWER)
    before, sent = drive.attention_unit.counters.as_dict(), drive.transport.counters.as_dict()
    again = namespace.attend(data, ANSWER)
    assert short_way == [False, True]
    np.testing.assert_array_equal(again[ANSWER_HEADER.itemsize :], first[ANSWER_HEADER.itemsize :])
    assert counts(again) == (0, num_groups * LAYER_LBAS)
    after = drive.attention_unit.counters.as_dict()
    assert after["commands"] == before["commands"] + 1
    assert after["pages_from_cache"] == before["pages_from_cache"] + num_groups * LAYER_LBAS
    assert after["kernel_ns"] > before["kernel_ns"]
    crossed = drive.transport.counters.as_dict()
    assert crossed["bytes_to_drive"] - sent["bytes_to_drive"] == data.nbytes + 2 * 64
    assert crossed["bytes_from_drive"] - sent["bytes_from_drive"] == ANSWER + 2 * 16
    assert is_at_rest(drive)


def test_a_ticket_of_cached_pages_is_answered_when_it_is_submitted(drive, namespace):
    """The same answer, and as many rules, as of one that takes its time."""
    groups(namespace, 3)
    data, _ = descriptor(3)
    unit = drive.attention_unit
    first = namespace.attention_fetch(namespace.attention_submit(data), ANSWER)
    before = unit.counters.as_dict()
    ticket = namespace.attention_submit(data)
    assert unit._tickets[ticket].answer is not None and is_at_rest(drive)
    called = []
    unit.when_done(ticket, lambda: called.append(ticket))
    assert called == [ticket]
    assert status_of(lambda: namespace.attention_fetch(ticket, 100)) == Status.SGL_LENGTH_INVALID
    again = namespace.attention_fetch(ticket, ANSWER)
    np.testing.assert_array_equal(again[ANSWER_HEADER.itemsize :], first[ANSWER_HEADER.itemsize :])
    assert unit.counters.commands == before["commands"] + 1
    assert status_of(lambda: namespace.attention_fetch(ticket, ANSWER)) == Status.UNKNOWN_TICKET
    namespace.attention_cancel(namespace.attention_submit(data))
    assert not unit._tickets


def test_who_waits_for_a_ticket_is_called_once(drive, namespace, monkeypatch):
    """Whether it is done, cancelled, or was never there."""
    monkeypatch.setattr("accel.resident_attention.INLINE_BYTES", 0)
    monkeypatch.setattr("accel.attention_job.INLINE_BYTES", 0)
    groups(namespace, 3)
    data, _ = descriptor(3)
    unit, called = drive.attention_unit, threading.Semaphore(0)
    for _ in range(20):
        ticket = namespace.attention_submit(data)
        unit.when_done(ticket, called.release)
        assert called.acquire(timeout=10)
        namespace.attention_fetch(ticket, ANSWER)
    unit.when_done(99999, called.release)
    assert called.acquire(timeout=10) and not called.acquire(timeout=0.05)


def test_when_the_short_way_is_left(drive, namespace, short_way):
    """A page that is not in the cache, not mapped or moved; another length; a bad descriptor: right answers or
    the long way's errors, and nothing pinned."""
    keys, values = groups(namespace, 3)
    data, queries = descriptor(3)
    want = plain(queries, keys, values)

    def attend(data=data, size=ANSWER):
        np.testing.assert_allclose(out_of(namespace.attend(data, size)), want, atol=1e-5)
        assert is_at_rest(drive)
        return short_way[-1]

    assert [attend(), attend()] == [False, True]
    page = int(drive.ftl.resolve(np.array([64 + 5]))[0])
    drive.cache.drop(page, 1)
    assert [attend(), attend()] == [False, True]
    namespace.write(64 + 5, namespace.read(64 + 5, 1))  # the same bytes at another place
    assert [attend(), attend()] == [False, True]
    assert status_of(lambda: namespace.attend(data, ANSWER + 8)) == Status.DATA_TRANSFER_ERROR
    assert status_of(lambda: namespace.attend(descriptor(3, version=9)[0], ANSWER)) == Status.INVALID_DESCRIPTOR
    assert attend()
    namespace.deallocate([(64 + 5, 1)])
    assert status_of(lambda: namespace.attend(data, ANSWER)) == Status.DEALLOCATED_BLOCK
    assert not short_way[-1]
    assert is_at_rest(drive)


@pytest.mark.parametrize("inline_bytes", [0, INLINE_BYTES])
def test_a_worker_that_fails(drive, namespace, short_way, monkeypatch, inline_bytes):
    """Here or on its own thread: the long way's status, and all is given back."""
    monkeypatch.setattr("accel.resident_attention.INLINE_BYTES", inline_bytes)
    groups(namespace, 3)
    data, _ = descriptor(3)
    namespace.attend(data, ANSWER)

    def fail(*arguments):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(drive.attention_unit._engine.worker, "attend_units", fail)
        assert status_of(lambda: namespace.attend(data, ANSWER)) == Status.INTERNAL_ERROR
    assert is_at_rest(drive)
    namespace.attend(data, ANSWER)
    assert short_way == [False, False, True]


def counts(answer):
    header = answer[: ANSWER_HEADER.itemsize].view(ANSWER_HEADER)[0]
    return int(header["pages_from_flash"]), int(header["pages_from_cache"])


def test_attention_over_scattered_pages(drive, namespace):
    """More lines than the cache has: short spans, whose lines are kept and found again."""
    keys, values = groups(namespace, 5, scattered=True)
    data, queries = descriptor(5)
    num_pages = 5 * LAYER_LBAS
    for turn in range(4):
        answer = namespace.attend(data, ANSWER)
        np.testing.assert_allclose(out_of(answer), plain(queries, keys, values), atol=1e-5)
        from_flash, from_cache = counts(answer)
        assert from_flash + from_cache == num_pages
        assert from_cache == 0 if turn == 0 else from_cache > 50
    assert not drive.cache._slots[:, 1].any()


@pytest.mark.parametrize("num_lines", [1, 4, 31])
def test_a_unit_larger_than_the_cache(small_drive, num_lines):
    """Pages of one unit that no span may pin: read past the cache."""
    namespace = Namespace(small_drive.transport)
    keys, values = groups(namespace, 3, scattered=True)
    data, queries = descriptor(3)
    for _ in range(3):
        answer = namespace.attend(data, ANSWER)
        np.testing.assert_allclose(out_of(answer), plain(queries, keys, values), atol=1e-5)
        assert sum(counts(answer)) == 3 * LAYER_LBAS
        assert counts(answer)[1] == 0
    assert small_drive.cache.bytes_used == 0


@pytest.mark.parametrize("num_lines", [4, 128])
def test_a_group_named_twice(small_drive, num_lines):
    """In one unit, read past the cache or through it: each page is in the place that the kernel reads."""
    namespace = Namespace(small_drive.transport)
    keys, values = groups(namespace, 1, scattered=True)
    data, queries = descriptor(2)
    extent = np.zeros(2, GROUP_EXTENT)
    extent["base_lba"], extent["num_groups"] = 64, 1
    start = ATTENTION_HEADER.itemsize + ATTENTION_ITEM.itemsize
    data = np.concatenate([data[:start], extent.view(np.uint8), data[start + GROUP_EXTENT.itemsize :]])
    header = data[: ATTENTION_HEADER.itemsize].view(ATTENTION_HEADER)
    header["num_extents"] = 2
    header["queries_offset"] += GROUP_EXTENT.itemsize
    data[ATTENTION_HEADER.itemsize : start].view(ATTENTION_ITEM)["num_extents"] = 2
    answer = namespace.attend(data, ANSWER)
    twice = [np.concatenate([rows, rows]) for rows in (keys, values)]
    np.testing.assert_allclose(out_of(answer), plain(queries, *twice), atol=1e-5)
    assert sum(counts(answer)) == 2 * LAYER_LBAS


@pytest.mark.parametrize("inline_bytes", [0, INLINE_BYTES])
@pytest.mark.parametrize("num_lines", [4, 40, 128])
def test_scattered_pages_from_several_threads(small_drive, monkeypatch, inline_bytes):
    """Commands that want more lines together than there are wait for each other, never in a circle."""
    monkeypatch.setattr("accel.attention_job.INLINE_BYTES", inline_bytes)
    namespace = Namespace(small_drive.transport)
    keys, values = groups(namespace, 5, scattered=True)
    failures = []

    def work(seed):
        queries = np.random.default_rng(seed).standard_normal((1, 1, HEADS * GROUP, HEAD_DIM), np.float32)
        want = plain(queries, keys, values)
        for _ in range(10):
            answer = namespace.attend(descriptor(5, queries=queries)[0], ANSWER)
            if not np.allclose(out_of(answer), want, atol=1e-5) or sum(counts(answer)) != 5 * LAYER_LBAS:
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    assert not small_drive.cache._slots[:, 1].any()


def test_attention_from_several_threads(drive, namespace):
    """Concurrency: commands share cache, readers and workers, and must not mix."""
    keys, values = groups(namespace, 60)
    failures = []

    def work(seed):
        queries = np.random.default_rng(seed).standard_normal((1, 1, HEADS * GROUP, HEAD_DIM), np.float32)
        want = plain(queries, keys, values)
        for _ in range(4):
            answer = namespace.attend(descriptor(60, queries=queries)[0], ANSWER)
            if not np.allclose(out_of(answer), want, atol=1e-5):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for number in range(200):  # meanwhile the flash is overwritten and collected
        namespace.write(3000, blocks(256, seed=number), placement_id=number % 3)
    for thread in threads:
        thread.join()
    assert failures == []
    assert drive.ftl.counters.superblocks_erased > 0


BAD_FIELDS = [
    {"magic": 1},
    {"version": 1},
    {"version": 9},
    {"flags": 2},
    {"dtype": 9},
    {"query_dtype": 9},
    {"num_items": 0},
    {"num_items": 2},
    {"num_items": 1 << 31},
    {"num_extents": 1 << 30},
    {"num_queries": 0},
    {"num_queries": 60000},
    {"num_kv_heads": 0},
    {"num_kv_heads": 60000},
    {"group_size": 0},
    {"group_size": 17},
    {"head_dim": 24},
    {"head_dim": 100},
    {"head_dim": 264},
    {"layer": 1},
    {"num_layers": 0},
    {"num_layers": 65535},
    {"group_tokens": 0},
    {"group_tokens": 100},
    {"group_tokens": 1 << 31},
    {"scale": np.nan},
    {"scale": np.inf},
    {"target_error": 0.5},
    {"num_segments": 1},
    {"queries_offset": 0},
    {"queries_offset": 113},
    {"queries_offset": 1 << 31},
    {"item_first_extent": 1},
    {"item_num_extents": 2},
    {"item_num_extents": 0},
    {"item_num_tokens": 1 << 31},
    {"item_causal": 2},
    {"extent_base_lba": 1 << 62},
    {"extent_base_lba": 1 << 40},
    {"extent_num_groups": 0},
    {"extent_num_groups": 1 << 31},
]


@pytest.mark.parametrize("changes", BAD_FIELDS, ids=str)
def test_bad_descriptors(namespace, changes):
    """Every field: a bad one is a status that names it, and the drive goes on."""
    groups(namespace, 2)
    assert status_of(lambda: namespace.attend(descriptor(2, **changes)[0], ANSWER)) == Status.INVALID_DESCRIPTOR
    namespace.attend(descriptor(2)[0], ANSWER)


def test_random_descriptors(drive, namespace):
    """Fuzz: whatever bytes arrive, a status or an answer, never a crash or an internal error."""
    groups(namespace, 2)
    random = np.random.default_rng(7)
    good, _ = descriptor(2)
    # read as quantized, these pages end with no scales: an unrecovered read error
    allowed = {
        Status.INVALID_DESCRIPTOR,
        Status.DEALLOCATED_BLOCK,
        Status.SGL_LENGTH_INVALID,
        Status.UNRECOVERED_READ_ERROR,
    }
    for _ in range(3000):
        data = good.copy()
        for position in random.integers(0, 112, random.integers(1, 4)):
            data[position] = random.integers(0, 256)
        data = data[: random.integers(0, len(data) + 1)] if random.random() < 0.1 else data
        if not len(data):
            continue
        try:
            namespace.attend(data, ANSWER)
        except NvmeStatusError as error:
            # a small, valid change of shape has an answer of another size
            assert error.status in allowed | {Status.DATA_TRANSFER_ERROR}, str(error)
            if error.status == Status.SGL_LENGTH_INVALID:
                namespace.attention_cancel(namespace._next_ticket)
    assert drive.attention_unit._tickets == {}
    namespace.attend(descriptor(2)[0], ANSWER)


def test_tickets(namespace):
    """Tickets: unknown, in use, cancelled, fetched into too small a buffer."""
    groups(namespace, 2)
    data, _ = descriptor(2)
    assert status_of(lambda: namespace.attention_fetch(99999, ANSWER)) == Status.UNKNOWN_TICKET
    assert status_of(lambda: namespace.attention_cancel(99999)) == Status.UNKNOWN_TICKET
    ticket = namespace.attention_submit(data)
    namespace._next_ticket -= 1
    assert status_of(lambda: namespace.attention_submit(data)) == Status.TICKET_IN_USE
    assert status_of(lambda: namespace.attention_fetch(ticket, 100)) == Status.SGL_LENGTH_INVALID
    namespace.attention_fetch(ticket, ANSWER)
    assert status_of(lambda: namespace.attention_fetch(ticket, ANSWER)) == Status.UNKNOWN_TICKET
    namespace.attention_cancel(namespace.attention_submit(data))
    tickets = []
    with pytest.raises(NvmeStatusError) as caught:
        while True:
            tickets.append(namespace.attention_submit(data))
    assert caught.value.status == Status.TOO_MANY_TICKETS
    for ticket in tickets:
        namespace.attention_fetch(ticket, ANSWER)


def test_pages_never_written(namespace):
    """Attention over blocks that hold nothing: an error with the block, not attention over zeros."""
    groups(namespace, 2)
    namespace.deallocate([(64 + LAYER_LBAS + 3, 1)])
    with pytest.raises(NvmeStatusError) as caught:
        namespace.attend(descriptor(2)[0], ANSWER)
    assert (caught.value.status, caught.value.lba) == (Status.DEALLOCATED_BLOCK, 64 + LAYER_LBAS + 3)


@pytest.mark.parametrize("num_groups", [2, 90])
def test_corrupt_page(drive, namespace, num_groups, tmp_path):
    """Bit rot under an attention command: an error with the block; nothing stays pinned or stuck."""
    keys, _ = groups(namespace, num_groups)
    lba = 64 + num_groups // 2 * LAYER_LBAS + 5
    page = int(drive.ftl.resolve(np.array([lba]))[0])
    with (tmp_path / "drive").open("r+b") as file:
        file.seek(drive.ftl.media.layout.data_start + page * 4096 + 77)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 8]))
    for _ in range(3):
        with pytest.raises(NvmeStatusError) as caught:
            namespace.attend(descriptor(num_groups)[0], ANSWER)
        assert (caught.value.status, caught.value.lba) == (Status.UNRECOVERED_READ_ERROR, lba)
    assert not drive.cache._slots[:, 1].any()
    fresh_keys, _ = groups(namespace, num_groups)
    answer = namespace.attend(descriptor(num_groups)[0], ANSWER)
    np.testing.assert_array_equal(fresh_keys, keys)
    assert np.isfinite(out_of(answer)).all()


def test_seal_groups(namespace):
    """Compaction: pages move, content does not; bad requests are refused."""
    from spdk_glue.vendor_command import COMPACT, SEAL_HEADER, SEAL_MAGIC

    keys, values = groups(namespace, 2)

    def payload(**changes):
        header, extent = np.zeros(1, SEAL_HEADER), np.zeros(1, GROUP_EXTENT)
        fields = {"magic": SEAL_MAGIC, "version": 1, "derive": COMPACT, "num_extents": 1, "num_layers": 1}
        for name, value in {**fields, "layer_lbas": LAYER_LBAS, **changes}.items():
            header[name] = value
        extent["base_lba"], extent["num_groups"] = 64, 2
        return np.concatenate([header.view(np.uint8), extent.view(np.uint8)])

    namespace.seal_groups(payload())
    data, queries = descriptor(2)
    np.testing.assert_allclose(out_of(namespace.attend(data, ANSWER)), plain(queries, keys, values), atol=1e-5)
    for changes in (
        {"magic": 0},
        {"derive": 2},
        {"num_extents": 9},
        {"num_layers": 0},
        {"layer_lbas": 1 << 31},
        {"reserved": b"\1"},
    ):
        assert status_of(lambda c=changes: namespace.seal_groups(payload(**c))) == Status.INVALID_DESCRIPTOR


def test_log_pages(namespace):
    """What the drive says of itself, and of its last error."""
    from spdk_glue.identify import ATTENTION_COUNTERS_LOG, FLASH_HEALTH_LOG, SMART_LOG, LogPage

    groups(namespace, 2)
    namespace.attend(descriptor(2)[0], ANSWER)
    health = namespace.log_page(LogPage.FLASH_HEALTH, FLASH_HEALTH_LOG)[0]
    assert health["host_pages_written"] == 2 * LAYER_LBAS
    assert health["wear_histogram"].sum() == GEOMETRY.num_superblocks
    counters = namespace.log_page(LogPage.ATTENTION_COUNTERS, ATTENTION_COUNTERS_LOG)[0]
    assert (counters["commands"], counters["pages_from_flash"]) == (1, 2 * LAYER_LBAS)
    assert namespace.log_page(LogPage.SMART, SMART_LOG)[0]["data_units_written"] >= 1
    assert namespace.attention["worker"] == b"numba"
    assert IoOpcode.ATTENTION_SUBMIT & 3 == 1
