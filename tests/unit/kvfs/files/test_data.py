"""What is in files: bytes, holes, space, and who may still read them."""

import errno
import os
import stat
import threading

import numpy as np
import pytest

from kvfs.errors import OutOfSpace, StoreClosed
from kvfs.files.file_data import KEEP_SIZE, MAX_SIZE, PUNCH_HOLE, ZERO_RANGE
from kvfs.read_ahead import MIN_BYTES, NUM_PIECES
from kvfs.tree import ROOT_INODE, FileError
from spdk_glue import dma
from tests.unit.kvfs.files.posix import USER, Posix
from tests.unit.kvfs.files.test_names import fails

BLOCK = 4096


def content(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


@pytest.mark.parametrize("offset", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_write_and_read(posix, offset, size):
    """Bytes beside those that are written, at every edge of a block."""
    before, data = content(8 * BLOCK, 1), content(size, 2)
    posix.write(b"a", 0, before)
    posix.write(b"a", offset, data)
    assert posix.read(b"a") == before[:offset] + data + before[offset + size :]
    assert posix.read(b"a", offset + 1, 7) == posix.read(b"a")[offset + 1 :][:7]
    assert posix.read(b"a", len(before), 1) == b"" == posix.read(b"a", 1 << 60, 1)


@pytest.mark.parametrize("change", ["write", "truncate", "punch"])
def test_what_changes_after_it_was_read_early(posix, change):
    """Old bytes, served from memory to whoever reads from front to back."""
    size, num_pieces = MIN_BYTES, 4 + NUM_PIECES
    data = bytearray(content(num_pieces * size))
    posix.write(b"a", 0, bytes(data))
    with posix.open(b"a", os.O_RDWR | os.O_DIRECT) as handle:
        for number in range(3):
            assert bytes(posix.tree.read(handle, number * size, size)) == data[number * size :][:size]
        ahead = posix.tree._file(handle).read.__self__
        early = [future.result() for _, future in ahead._ahead.values()]
        assert len(early) == NUM_PIECES
        if change == "write":
            posix.write(b"a", 3 * size + 7, b"new")
            data[3 * size + 7 : 3 * size + 10] = b"new"
        elif change == "truncate":
            posix.set(b"a", size=3 * size + 5)
            del data[3 * size + 5 :]
        else:
            posix.fallocate(b"a", PUNCH_HOLE | KEEP_SIZE, 3 * size, size)
            data[3 * size : 4 * size] = bytes(size)
        for number in range(3, num_pieces):
            assert bytes(posix.tree.read(handle, number * size, size)) == data[number * size :][:size]


def test_reading_at_once(store, posix):
    """The short way gives what the long one gives, and counts in every layer; it is not for a hole."""
    data = content(8 * BLOCK)
    posix.write(b"a", 0, data)
    posix.write(b"a", 9 * BLOCK, data[:100])
    with posix.open(b"a") as handle:

        def counted(read):
            before = store.counters()
            found = read(handle, 3 * BLOCK + 5, BLOCK)
            after = store.counters()
            assert bytes(found) == data[3 * BLOCK + 5 :][:BLOCK]
            pages = after["flash"]["bytes_read"] - before["flash"]["bytes_read"]
            return pages, [after["link"][name] - before["link"][name] for name in after["link"]]

        assert posix.tree.read_now(handle, 0, 1) is None, "the time of access is to be noted"
        assert counted(posix.tree.read) == counted(posix.tree.read_now)
        assert bytes(posix.tree.read_now(handle, 9 * BLOCK, BLOCK)) == data[:100]
        for offset, size in ((7 * BLOCK, 2 * BLOCK), (8 * BLOCK, 1), (10 * BLOCK, 1), (0, 0)):
            assert posix.tree.read_now(handle, offset, size) is None
        with store._files._data_lock:
            assert posix.tree.read_now(handle, 0, 1) is None, "it would have to wait"


@pytest.mark.parametrize("offset", [0, BLOCK, 7])
def test_memory_that_the_drive_takes_as_it_is(posix, offset):
    """Aligned, as the mount's are: whole blocks are written from where they lie, and not looked at later."""
    posix.write(b"a", 0, content(4 * BLOCK))
    before = posix.read(b"a")
    memory = dma.allocate(2 * BLOCK)
    memory[:] = 7
    with posix.open(b"a") as handle:
        assert posix.tree.write(handle, offset, memoryview(memory)) == 2 * BLOCK
    memory[:] = 9
    assert posix.read(b"a") == before[:offset] + b"\7" * 2 * BLOCK + before[offset + 2 * BLOCK :]


def test_large_requests(posix):
    """More than one command can move."""
    data = content(9 << 20)
    posix.write(b"a", 123, data)
    assert posix.read(b"a", 123) == data
    assert posix.stat(b"a").num_blocks == (len(data) + 123 + BLOCK - 1) // BLOCK * 8


def test_holes_are_zero(posix):
    """What a deleted file had there."""
    posix.write(b"old", 0, b"\xff" * (12 << 20))
    posix.unlink(b"old")
    posix.write(b"a", 100 * BLOCK + 10, b"x")
    assert posix.read(b"a") == bytes(100 * BLOCK + 10) + b"x"
    assert posix.stat(b"a").num_blocks == BLOCK // 512
    posix.set(b"a", size=200 * BLOCK)
    assert not any(posix.read(b"a", 100 * BLOCK + 11))


@pytest.mark.parametrize("size", [0, 10, BLOCK, BLOCK + 10])
@pytest.mark.parametrize("grow", ["truncate", "write", "allocate"])
def test_what_was_cut_off_stays_away(posix, size, grow):
    """Bytes that come back when a file grows again."""
    posix.write(b"a", 0, b"\xff" * (3 * BLOCK))
    posix.set(b"a", size=size)
    if grow == "truncate":
        posix.set(b"a", size=4 * BLOCK)
    elif grow == "write":
        posix.write(b"a", 4 * BLOCK - 1, b"\0")
    else:
        posix.fallocate(b"a", 0, 0, 4 * BLOCK)
    assert posix.read(b"a") == b"\xff" * size + bytes(4 * BLOCK - size)


def test_allocate(posix):
    """Space that was promised and is not there; a size that moves though it was to stay."""
    free = posix.tree.usage().free_blocks
    posix.write(b"a", 0, b"x")
    posix.fallocate(b"a", KEEP_SIZE, 0, 10 * BLOCK)
    found = posix.stat(b"a")
    assert (found.size, found.num_blocks) == (1, 80) and posix.tree.usage().free_blocks == free - 10
    posix.fallocate(b"a", 0, 5 * BLOCK, 10 * BLOCK)
    found = posix.stat(b"a")
    assert (found.size, found.num_blocks) == (15 * BLOCK, 120)
    assert posix.read(b"a") == b"x" + bytes(15 * BLOCK - 1)
    posix.set(b"a", size=15 * BLOCK)
    posix.set(b"a", size=1)
    assert posix.stat(b"a").num_blocks == 8


def test_punch_hole(posix):
    """Neighbours of the hole; space that does not come back."""
    data = content(10 * BLOCK)
    posix.write(b"a", 0, data)
    free = posix.tree.usage().free_blocks
    posix.fallocate(b"a", PUNCH_HOLE | KEEP_SIZE, BLOCK + 100, 5 * BLOCK)
    wanted = data[: BLOCK + 100] + bytes(5 * BLOCK) + data[6 * BLOCK + 100 :]
    assert posix.read(b"a") == wanted and posix.tree.usage().free_blocks == free + 4
    posix.fallocate(b"a", PUNCH_HOLE | KEEP_SIZE, 8 * BLOCK + 1, 10)
    assert posix.read(b"a") == wanted[: 8 * BLOCK + 1] + bytes(10) + wanted[8 * BLOCK + 11 :]
    fails(errno.EOPNOTSUPP, posix.fallocate, b"a", PUNCH_HOLE, 0, BLOCK)


@pytest.mark.parametrize("mode", [ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_zero_range(posix, mode):
    data = content(4 * BLOCK)
    posix.write(b"a", 0, data)
    posix.fallocate(b"a", mode, BLOCK + 5, 6 * BLOCK)
    size = 7 * BLOCK + 5 if mode == ZERO_RANGE else 4 * BLOCK
    assert posix.read(b"a") == data[: BLOCK + 5] + bytes(size - BLOCK - 5)
    assert posix.stat(b"a").num_blocks == 8 * 8


def test_fallocate_refusals(posix):
    """Modes that would move data; ranges that no file has."""
    posix.write(b"a", 0, b"x")
    for mode in (0x04, 0x08, 0x20, 0x40, PUNCH_HOLE | ZERO_RANGE | KEEP_SIZE):
        fails(errno.EOPNOTSUPP, posix.fallocate, b"a", mode, 0, BLOCK)
    for offset, length in ((-1, 5), (0, 0), (0, -1)):
        fails(errno.EINVAL, posix.fallocate, b"a", 0, offset, length)
    fails(errno.EFBIG, posix.fallocate, b"a", 0, MAX_SIZE, 1)
    assert posix.read(b"a") == b"x"


def test_sizes_without_end(posix):
    """An offset that wraps round, in Python or in the catalogue."""
    posix.set(posix.mknod(b"a", stat.S_IFREG) and b"a", size=MAX_SIZE)
    posix.write(b"a", MAX_SIZE - 1, b"x")
    assert posix.read(b"a", MAX_SIZE - 2, 10) == b"\0x"
    fails(errno.EFBIG, posix.write, b"a", MAX_SIZE, b"x")
    fails(errno.EFBIG, posix.set, b"a", size=MAX_SIZE + 1)
    fails(errno.EINVAL, posix.set, b"a", size=-1)
    with posix.open(b"a") as handle:
        fails(errno.EINVAL, posix.tree.write, handle, -1, b"x")
    posix.sync(b"a")


def test_seek(posix):
    """cp --sparse and tar that miss data, or find holes for ever."""
    posix.write(b"a", 10 * BLOCK, content(BLOCK))
    posix.set(b"a", size=20 * BLOCK)
    assert posix.seek(b"a", 5, os.SEEK_DATA) == 10 * BLOCK
    assert posix.seek(b"a", 5, os.SEEK_HOLE) == 5
    assert posix.seek(b"a", 10 * BLOCK + 7, os.SEEK_DATA) == 10 * BLOCK + 7
    assert posix.seek(b"a", 10 * BLOCK + 7, os.SEEK_HOLE) == 11 * BLOCK
    fails(errno.ENXIO, posix.seek, b"a", 12 * BLOCK, os.SEEK_DATA)
    fails(errno.ENXIO, posix.seek, b"a", 20 * BLOCK, os.SEEK_HOLE)
    fails(errno.ENXIO, posix.seek, b"a", -1, os.SEEK_HOLE)
    fails(errno.EINVAL, posix.seek, b"a", 0, os.SEEK_SET)
    posix.write(b"b", 0, b"all data")
    assert posix.seek(b"b", 0, os.SEEK_HOLE) == 8  # the end


def test_a_full_drive(posix):
    """A write that cannot be done takes nothing with it; what is deleted can be used again at once."""
    kept = content(100_000)
    posix.write(b"kept", 0, kept)
    with posix.open(b"big") as handle:
        position = 0
        with pytest.raises(OutOfSpace):
            while True:
                position += posix.tree.write(handle, position, content(1 << 20))
        assert posix.tree.attributes(posix.stat(b"big").inode).size == position
        with pytest.raises(OutOfSpace):
            posix.tree.allocate(handle, 0, 0, 1 << 50)
    assert posix.read(b"kept") == kept
    posix.write(b"kept", 50_000, b"in place still works")
    posix.unlink(b"big")
    posix.write(b"again", 0, content(10 << 20))
    assert posix.read(b"again") == content(10 << 20)


def test_a_fragmented_drive(posix):
    """Free blocks that cannot be used because they do not lie together."""
    num_blocks = posix.tree.usage().free_blocks
    with posix.open(b"a") as handle:
        posix.tree.allocate(handle, 0, 0, num_blocks * BLOCK)
        for block in range(0, num_blocks, 2):
            posix.tree.allocate(handle, PUNCH_HOLE | KEEP_SIZE, block * BLOCK, BLOCK)
    data = content(num_blocks // 2 // 256 * 256 * BLOCK)
    for start in range(0, len(data), 1 << 20):
        posix.write(b"b", start, data[start : start + (1 << 20)])
    assert posix.read(b"b") == data and not any(posix.read(b"a"))


def test_a_write_that_fails_leaves_no_trace(posix, store, monkeypatch):
    """Blocks that are lost, or that show half a write once the file grows over them."""
    posix.write(b"a", 0, b"before")
    free = posix.tree.usage().free_blocks

    def fails_after_writing(extents, placement_id):
        original(extents, placement_id)
        raise OSError("the drive is gone")

    original = store._namespace.write_scattered
    with monkeypatch.context() as patch:
        patch.setattr(store._namespace, "write_scattered", fails_after_writing)
        with pytest.raises(OSError):
            posix.write(b"a", BLOCK, b"\xff" * BLOCK)
    assert posix.read(b"a") == b"before" and posix.tree.usage().free_blocks == free
    posix.set(b"a", size=3 * BLOCK)
    assert posix.read(b"a") == b"before" + bytes(3 * BLOCK - 6)


def test_deleted_while_open(posix):
    """Programs delete their scratch files first and then use them."""
    free = posix.tree.usage().free_blocks
    with posix.open(b"a") as handle:
        posix.tree.write(handle, 0, b"scratch")
        posix.unlink(b"a")
        posix.tree.write(handle, 7, b"!" * BLOCK)
        posix.tree.sync(handle, False)
        assert bytes(posix.tree.read(handle, 0, 8)) == b"scratch!"
        assert posix.tree.usage().free_blocks == free - 2
    assert posix.tree.usage().free_blocks == free


def test_deleted_while_the_kernel_refers_to_it(posix):
    """An inode number that fails while a descriptor of the file is still passed around."""
    inode = posix.mknod(b"a", stat.S_IFREG).inode
    posix.tree.lookup(ROOT_INODE, b"a")
    posix.unlink(b"a")
    assert posix.tree.attributes(inode).num_links == 0
    posix.tree.forget(inode, 1)
    fails(errno.ESTALE, posix.tree.attributes, inode)
    fails(errno.ESTALE, posix.tree.open, inode, os.O_RDONLY, posix.caller)


def test_set_id_bits(posix):
    """A program that runs as its owner after somebody else wrote to it."""
    bits, user = stat.S_ISUID | stat.S_ISGID | 0o755, Posix(posix.tree, USER)

    def after(change, mode=bits):
        posix.write(b"a", 0, b"x")
        posix.set(b"a", mode=mode)
        change()
        return stat.S_IMODE(posix.stat(b"a").mode)

    assert after(lambda: user.write(b"a", 0, b"y")) == 0o755
    assert after(lambda: user.set(b"a", size=0)) == 0o755
    assert after(lambda: user.write(b"a", 0, b"", os.O_TRUNC)) == 0o755
    assert after(lambda: posix.set(b"a", uid=5)) == 0o755
    assert after(lambda: posix.set(b"a", gid=5), stat.S_ISGID | 0o644) == stat.S_ISGID | 0o644
    assert after(lambda: posix.write(b"a", 0, b"y")) == bits  # the superuser's writes leave them
    assert after(lambda: posix.set(b"a", uid=6, mode=bits)) == bits
    posix.mkdir(b"d")
    posix.set(b"d", mode=stat.S_ISGID | 0o755)
    assert stat.S_IMODE(posix.set(b"d", gid=5).mode) == stat.S_ISGID | 0o755


def test_times(posix):
    """What setattr sends is what stat shows, also beyond what the catalogue holds."""
    posix.write(b"a", 0, b"x")
    found = posix.set(b"a", atime_ns=5, mtime_ns=-6, ctime_ns=7)
    assert (found.atime_ns, found.mtime_ns, found.ctime_ns) == (5, -6, 7)
    assert posix.set(b"a", mtime_ns=1 << 70).mtime_ns == (1 << 63) - 1
    posix.sync(b"a")
    posix.set(b"a", mtime_ns=6)
    posix.read(b"a")
    first = posix.stat(b"a").atime_ns
    assert first > 5
    posix.read(b"a")
    assert posix.stat(b"a").atime_ns == first  # once after a change, as with relatime


def test_open_flags(posix):
    """A file emptied, or not, against what its opener asked for."""
    posix.write(b"a", 0, b"data")
    with posix.open(b"a", os.O_RDONLY) as handle:
        fails(errno.EBADF, posix.tree.write, handle, 0, b"x")
        fails(errno.EBADF, posix.tree.allocate, handle, 0, 0, 1)
    with posix.open(b"a", os.O_RDONLY | os.O_TRUNC):
        pass
    assert posix.read(b"a") == b"data"
    with posix.open(b"a", os.O_WRONLY | os.O_TRUNC):
        pass
    assert posix.stat(b"a").size == 0
    posix.mkdir(b"d")
    fails(errno.EISDIR, posix.tree.open, posix.stat(b"d").inode, os.O_RDONLY, posix.caller)


def test_handles_that_are_not_open(posix):
    """A number of the kernel's that is taken for another file's."""
    folder = posix.tree.open_folder(ROOT_INODE, posix.caller)
    with posix.open(b"a") as handle:
        fails(errno.EBADF, posix.tree.release_folder, handle)
    for wrong in (handle, folder, 12345):
        fails(errno.EBADF, posix.tree.read, wrong, 0, 1)
        fails(errno.EBADF, posix.tree.write, wrong, 0, b"x")
        fails(errno.EBADF, posix.tree.release, wrong)
        fails(errno.EBADF, posix.tree.sync, wrong, False)
        fails(errno.EBADF, posix.tree.flush, wrong)
    posix.tree.release_folder(folder)


def test_a_closed_store(opened):
    """A crash, or an old drive written to, by whoever still holds a handle."""
    store, posix = opened()
    handle = posix.tree.create(ROOT_INODE, b"a", 0o644, os.O_RDWR, posix.caller)[0].handle
    store.close()
    for operation in (
        lambda: posix.tree.write(handle, 0, b"x"),
        lambda: posix.tree.read(handle, 0, 1),
        lambda: posix.tree.lookup(ROOT_INODE, b"a"),
        lambda: posix.tree.make_folder(ROOT_INODE, b"d", 0o755, posix.caller),
        lambda: posix.tree.usage(),
    ):
        with pytest.raises(StoreClosed):
            operation()


def test_many_threads(posix, store):
    """Threads in each other's blocks: writers, a truncating one, a flushing one, and scratch files."""
    failures = []

    def work(number):
        try:
            name = b"file-%d" % number
            for turn in range(30):
                data = bytes([number * 30 + turn]) * (BLOCK * 5 + 7)
                posix.write(name, turn * 1000, data)
                assert posix.read(name, turn * 1000, len(data)) == data
                posix.write(b"scratch-%d" % number, 0, data * 4)
                posix.unlink(b"scratch-%d" % number)
                if turn % 7 == 0:
                    posix.set(name, size=turn * 1000 + 1)
                if turn % 5 == number:
                    store.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(posix.listdir()) == 4


def test_readers_never_see_another_files_data(posix, store):
    """A block that was freed and written anew between finding and reading it."""
    stop = threading.Event()
    wrong = []

    def read():
        while not stop.is_set():
            try:
                data = posix.read(b"a", 0, 64 * BLOCK)
            except FileError:
                continue
            if set(data) - {1, 0}:
                wrong.append(set(data))

    posix.write(b"a", 0, b"\x01" * 64 * BLOCK)
    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(60):
        posix.set(b"a", size=0)
        store.flush()
        posix.write(b"b", 0, b"\x02" * 64 * BLOCK)
        posix.unlink(b"b")
        posix.write(b"a", 0, b"\x01" * 64 * BLOCK)
    stop.set()
    thread.join()
    assert wrong == []
