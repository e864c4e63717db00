"""Large writes that are accepted before they are on the drive: nobody may notice, but for the clock."""

import errno
import threading

import pytest

from kvfs.files.file_data import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from kvfs.files.write_behind import BATCH_BYTES, LIMIT_BYTES, MIN_BYTES
from tests.unit.kvfs.files.test_data import content
from tests.unit.kvfs.files.test_durability import kill

SIZE = MIN_BYTES


class Gate:
    """The drive's writes, held until they are let through."""

    def __init__(self, namespace, monkeypatch):
        self._write = namespace.write_scattered
        self._open = threading.Event()
        self.batches: list[int] = []  # bytes of each
        self.error: Exception | None = None
        monkeypatch.setattr(namespace, "write_scattered", self)

    def __call__(self, extents, placement_id=0):
        self._open.wait()
        self.batches.append(sum(data.nbytes for _, data in extents))
        if self.error is not None:
            raise self.error
        self._write(extents, placement_id)

    def open(self):
        self._open.set()

    def open_soon(self):
        threading.Timer(0.1, self.open).start()


@pytest.fixture
def gate(store, monkeypatch):
    gate = Gate(store._namespace, monkeypatch)
    yield gate
    gate.open()


def test_a_write_does_not_wait_for_the_drive(posix, gate):
    data = content(3 * SIZE)
    posix.write(b"a", 0, data)
    assert posix.stat(b"a").size == len(data) and not gate.batches
    gate.open_soon()
    assert posix.read(b"a") == data


def test_writes_are_gathered(posix, gate):
    """The first is on its way alone; what comes meanwhile goes out together."""
    data = content(LIMIT_BYTES)
    with posix.open(b"a") as handle:
        for start in range(0, len(data), SIZE):
            posix.tree.write(handle, start, data[start : start + SIZE])
        assert not gate.batches
        gate.open_soon()
        posix.tree.sync(handle, False)
    batches = [num_bytes for num_bytes in gate.batches if num_bytes >= SIZE]  # the others are the catalogue's
    assert sum(batches) == len(data) and len(batches) <= 3 and max(batches) == BATCH_BYTES
    assert posix.read(b"a") == data


def test_memory_is_bounded(posix, gate):
    posix.write(b"a", 0, bytes(SIZE))
    data = content(LIMIT_BYTES)

    def write_all():
        with posix.open(b"a") as handle:
            for start in range(0, len(data), SIZE):
                posix.tree.write(handle, start, data[start : start + SIZE])

    writer = threading.Thread(target=write_all)
    writer.start()
    writer.join(0.2)
    assert writer.is_alive()
    gate.open()
    writer.join()
    assert posix.read(b"a") == data


def written(offset, data):
    def change(posix, expected):
        posix.write(b"a", offset, data)
        expected.extend(bytes(max(0, offset + len(data) - len(expected))))
        expected[offset : offset + len(data)] = data

    return change


def resized(size):
    def change(posix, expected):
        posix.set(b"a", size=size)
        expected.extend(bytes(max(0, size - len(expected))))
        del expected[size:]

    return change


def zeroed(mode):
    def change(posix, expected):
        posix.fallocate(b"a", mode, 100, SIZE)
        expected[100 : 100 + SIZE] = bytes(SIZE)

    return change


CHANGES = {
    "behind": written(2 * SIZE, b"\x01" * SIZE),
    "overlap": written(SIZE - 3, b"overlaps"),
    "overwrite": written(SIZE // 2, b"\x01" * SIZE),
    "continue": written(2 * SIZE + 7, b"\x01" * SIZE),
    "gap": written(5 * SIZE, b"far behind"),
    "shrink": resized(SIZE + 5),
    "grow": resized(9 * SIZE),
    "punch": zeroed(PUNCH_HOLE | KEEP_SIZE),
    "zero": zeroed(ZERO_RANGE),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_follows_finds_it_written(posix, change):
    """Or blocks are written twice at once, and any may win."""
    posix.tree._behind.is_in_background = False  # all is written as late as can be
    posix.write(b"b", 0, b"\xff" * 12 * SIZE)
    posix.unlink(b"b")  # what a new block held before
    expected = bytearray(content(2 * SIZE + 7))
    posix.write(b"a", 0, bytes(expected))
    change(posix, expected)
    assert posix.stat(b"a").size == len(expected)
    assert posix.read(b"a") == expected


def test_blocks_of_a_file_that_is_gone(posix):
    """They may be another's as soon as they are free: nothing may be on its way there."""
    posix.tree._behind.is_in_background = False
    free = posix.tree.usage().free_blocks
    posix.write(b"a", 0, content(4 * SIZE))
    posix.unlink(b"a")
    posix.write(b"b", 0, content(4 * SIZE, 1))
    posix.set(b"b", size=0)
    posix.sync(b"b")
    assert posix.tree.usage().free_blocks == free
    data = content(free * 4096 - (1 << 20), 2)  # nearly all there is: old blocks, too
    for start in range(0, len(data), SIZE):
        posix.write(b"c", start, data[start : start + SIZE])
    posix.sync(b"c")
    assert posix.read(b"c") == data


def test_a_sync_of_another_file_takes_it_along(opened):
    """A commit writes all rows, and none may name what is not on the drive."""
    store, posix = opened()
    posix.tree._behind.is_in_background = False
    data = content(2 * SIZE)
    posix.write(b"a", 0, data)
    posix.write(b"b", 0, b"small")
    posix.sync(b"b")
    kill(store)
    _, posix = opened()
    assert posix.read(b"a") == data


def test_who_waits_is_not_kept_by_who_writes_on(posix, gate):
    """A program that writes without end, and another's fsync: it waits for what was written before."""
    posix.write(b"b", 0, content(SIZE))
    gate.open()
    stop = threading.Event()

    def write_on():
        with posix.open(b"a") as handle:
            while not stop.is_set():
                for start in range(0, LIMIT_BYTES, SIZE):
                    posix.tree.write(handle, start, bytes(SIZE))

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        for _ in range(20):
            posix.sync(b"b")
            assert len(posix.read(b"b")) == SIZE
    finally:
        stop.set()
        writer.join()


def test_closing_the_store_waits(opened):
    store, posix = opened()
    data = content(8 * SIZE)
    posix.write(b"a", 0, data)
    store.close()
    _, posix = opened()
    assert posix.read(b"a") == data


@pytest.mark.parametrize("tell", ["sync", "flush", "write"])
def test_an_error_is_told_once(posix, gate, caplog, tell):
    """As a page cache does: by the next sync, close or write, whichever comes first."""
    posix.write(b"b", 0, content(SIZE))
    with posix.open(b"a") as handle:
        gate.error = OSError(errno.EIO, "the drive is gone")
        posix.tree.write(handle, 0, content(SIZE))
        gate.open()
        posix.tree._behind.wait()
        gate.error = None
        calls = {
            "sync": lambda: posix.tree.sync(handle, False),
            "flush": lambda: posix.tree.flush(handle),
            "write": lambda: posix.tree.write(handle, 0, b"small"),
        }
        with pytest.raises(OSError, match="the drive is gone"):
            calls[tell]()
        assert "what was written to it is lost" in caplog.text
        for call in calls.values():
            call()


def test_an_error_is_told_to_whose_it_is(posix, gate):
    """A batch has writes of several files; those that succeed alone have succeeded."""
    data = content(SIZE)
    with posix.open(b"first") as first, posix.open(b"a") as a, posix.open(b"b") as b:
        posix.tree.write(first, 0, data)  # on its way alone: the two others go together
        posix.tree.write(a, 0, data)
        posix.tree.write(b, 0, data)
        bad_lba = posix.tree._file(a).inode.extents.lba(0)
        write = gate._write

        def fails(extents, placement_id):
            if bad_lba in [lba for lba, _ in extents]:
                raise OSError(errno.EIO, "one bad block")
            write(extents, placement_id)

        gate._write = fails
        gate.open()
        posix.tree.flush(first)
        posix.tree.flush(b)
        with pytest.raises(OSError, match="one bad block"):
            posix.tree.flush(a)
    assert posix.read(b"b") == data == posix.read(b"first")
