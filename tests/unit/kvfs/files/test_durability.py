"""What survives: closing, killing, a catalogue that is full or fails, and drives of the first version."""

import errno
import os
import shutil
import stat

import apsw
import pytest

import kvfs
from kvfs.errors import CatalogueFull, InvalidArgument
from kvfs.files.file_system import FileSystem
from kvfs.formatting import format_volume
from kvfs.inspection import Inspection
from kvfs.objects.object_catalogue import OBJECT_TABLES
from kvfs.prefix.prefix_catalogue import PREFIX_TABLES
from kvfs.sealing.derived_catalogue import DERIVED_TABLES, DERIVED_TRIGGERS
from kvfs.tree import ROOT_INODE, FileError
from tests.unit.kvfs.conftest import add_model
from tests.unit.kvfs.files.posix import Posix
from tests.unit.kvfs.files.test_data import BLOCK, content
from tests.unit.kvfs.files.test_names import fails


def kill(store):
    """The end of the process, without the ceremony."""
    store._catalogue.abandon()
    store._stack.close()
    store._closed = True


def test_everything_is_there_after_closing(opened):
    """State that lives in memory only."""
    store, posix = opened()
    posix.mkdir(b"d", 0o700)
    posix.write(b"d/f", 5 * BLOCK + 1, content(3 * BLOCK))
    posix.fallocate(b"d/f", 3, 6 * BLOCK, BLOCK)
    posix.symlink(b"target", b"d/l")
    posix.link(b"d/f", b"g")
    posix.set(b"d/f", mode=0o4711, uid=1, gid=2, mtime_ns=12345)
    posix.mknod(b"dev", stat.S_IFCHR | 0o600, rdev=0x0103)
    paths = [b"", b"d", b"d/f", b"d/l", b"g", b"dev"]
    before = [posix.stat(path) for path in paths], posix.read(b"g"), posix.listdir()
    store.close()
    store, posix = opened()
    assert ([posix.stat(path) for path in paths], posix.read(b"g"), posix.listdir())[1:] == before[1:]
    for found, wanted in zip([posix.stat(path) for path in paths], before[0], strict=True):
        found.atime_ns = wanted.atime_ns
        assert found == wanted
    assert posix.mkdir(b"new").inode > max(attributes.inode for attributes in before[0])


def test_fsync_survives_a_kill(opened):
    """The promise of fsync: data, size and name, of the file and of all that was done before."""
    store, posix = opened()
    posix.mkdir(b"d")
    posix.write(b"d/a", 0, content(50_000))
    posix.sync(b"d/a")
    posix.write(b"d/b", 0, content(10_000, 1))
    posix.rename(b"d/b", b"d/a")
    posix.sync(b"d/a")
    posix.write(b"d/c", 0, b"not synced")
    posix.write(b"d/a", 0, b"in place")
    kill(store)
    _, posix = opened()
    assert posix.read(b"d/a")[8:] == content(10_000, 1)[8:]
    assert posix.exists(b"d/c") is False and posix.listdir(b"d") == [b"a"]


def test_a_folder_can_be_synced(opened):
    """Databases make a name durable through its folder."""
    store, posix = opened()
    posix.mkdir(b"d")
    posix.mknod(b"d/f", stat.S_IFREG)
    with posix.inode(b"d") as inode:
        handle = posix.tree.open_folder(inode, posix.caller)
        posix.tree.sync_folder(handle, False)
    kill(store)
    _, posix = opened()
    assert posix.listdir(b"d") == [b"f"]


def test_a_kill_at_any_time_leaves_one_state(opened, path, tmp_path):
    """Names without files, sizes without blocks, blocks of two files: the drive as each operation leaves it."""
    store, posix = opened()
    operations = [
        lambda: posix.mkdir(b"d"),
        lambda: posix.write(b"d/a", 0, content(30_000)),
        lambda: posix.link(b"d/a", b"b"),
        lambda: store.flush(),
        lambda: posix.set(b"b", size=5000),
        lambda: posix.write(b"c", 0, content(100_000)),
        lambda: posix.rename(b"c", b"b"),
        lambda: add_model(store, name="m"),  # a transaction of another kind
        lambda: posix.unlink(b"d/a"),
        lambda: posix.fallocate(b"b", 3, 0, 8192),
        lambda: store.flush(),
        lambda: posix.rmdir(b"d"),
        lambda: posix.unlink(b"b"),
        lambda: store._sync(),
    ]
    for number, operation in enumerate(operations):
        operation()
        copy = tmp_path / f"copy-{number}"
        shutil.copyfile(path, copy)
        with kvfs.open(copy, cache_bytes="8MiB", num_workers=1, worker="reference") as after:
            files = FileSystem(after)
            assert after.check() == []
            seen = Posix(files)
            for name in seen.listdir():
                attributes = seen.stat(name)
                if stat.S_ISREG(attributes.mode):
                    assert len(seen.read(name)) == attributes.size
    assert posix.listdir() == []


def test_files_deleted_while_open_go_after_a_kill(opened, path):
    """Space that is lost for ever, a little with each crash."""
    store, posix = opened()
    free = posix.tree.usage().free_blocks
    handle = posix.tree.create(ROOT_INODE, b"a", 0o644, os.O_RDWR, posix.caller)[0].handle
    posix.tree.write(handle, 0, content(50_000))
    posix.unlink(b"a")
    posix.tree.sync(handle, False)
    kill(store)
    with Inspection(path) as inspection:
        (problem,) = inspection.check().problems
        assert problem.kind == "orphans" and not problem.is_damage
    store, posix = opened()
    assert posix.tree.usage().free_blocks == free
    assert posix.tree.usage().num_inodes - posix.tree.usage().free_inodes == 1


def test_freed_blocks_wait(opened):
    """A file that was durable, deleted and overwritten by another's data before the deletion was durable."""
    store, posix = opened()
    posix.write(b"a", 0, content(20 * BLOCK))
    store.flush()
    posix.unlink(b"a")
    for number in range(20):
        posix.write(b"b%d" % number, 0, b"\xff" * BLOCK)
    kill(store)
    _, posix = opened()
    assert posix.read(b"a") == content(20 * BLOCK)


def test_nothing_to_do_is_cheap(opened):
    """Each fsync of a file that is durable would write the catalogue again."""
    store, posix = opened()
    posix.write(b"a", 0, b"x")
    posix.sync(b"a")
    written = store._drive.transport.counters.bytes_to_drive
    with posix.open(b"a", os.O_RDONLY) as handle:
        for _ in range(10):
            posix.tree.sync(handle, True)
    assert store._drive.transport.counters.bytes_to_drive - written < 10 * BLOCK


# a full or failing catalogue


@pytest.fixture
def small(tmp_path):
    """A drive whose catalogue holds some hundred files."""
    path = tmp_path / "small.kvfs"
    kvfs.format(path, "48MiB")
    with Inspection(path, read_only=False) as inspection:
        format_volume(inspection._drive, path, (64, 64))
        inspection.namespace.flush()
        inspection.catalogue = None  # of the volume before
    return path


def open_small(path):
    store = kvfs.open(path, cache_bytes="8MiB", num_workers=1, worker="reference")
    return store, Posix(FileSystem(store))


def fill(make, limit=10_000):
    """How many could be made; fewer than the limit."""
    with pytest.raises(CatalogueFull):
        for number in range(limit):
            make(number)
    return number


def test_a_full_catalogue(small):
    """Files that were made and then could not be stored, or a drive so full that nothing can be deleted."""
    store, posix = open_small(small)
    count = fill(lambda number: posix.mknod(b"file-%06d" % number, stat.S_IFREG))
    assert count > 100
    assert len(posix.listdir()) == count
    store.flush()
    for name in posix.listdir()[: count // 2]:
        posix.unlink(name)
    posix.mkdir(b"again")
    store.close()
    store, posix = open_small(small)
    assert len(posix.listdir()) == count - count // 2 + 1 and store.check() == []
    store.close()


def test_each_kind_of_row_can_fill_it(small):
    """A limit that one operation forgets ends in a failed commit, which takes back all of a batch."""
    store, posix = open_small(small)
    inode = posix.mknod(b"f", stat.S_IFREG).inode

    kinds = (
        lambda number: posix.tree.set_xattr(inode, b"user.%d" % number, b"v" * 1000, 0),
        lambda number: posix.symlink(b"t" * 4000, b"link-%d" % number),
        lambda number: posix.link(b"f", b"%0200d" % number),
        lambda number: posix.fallocate(b"whole", 3, (2 * number + 1) * BLOCK, BLOCK),
    )
    for number, make in enumerate(kinds):
        posix.write(b"whole", 0, b"x" * (500 * BLOCK))
        if number == 3:
            fill(lambda number: posix.link(b"f", b"%0200d" % number))
        fill(make, 1000)
        store.flush()
        for name in posix.tree.list_xattrs(inode):
            posix.tree.remove_xattr(inode, name)
        for name in posix.listdir():
            if name != b"f":
                posix.unlink(name)
        store.flush()
    store.close()
    store, posix = open_small(small)
    assert posix.listdir() == [b"f"] and store.check() == []
    store.close()


def test_sequences_leave_room_for_deleting_files(small):
    """A catalogue filled by the one cannot be relieved by the other."""
    store, posix = open_small(small)
    model = add_model(store)
    for number in range(50):
        posix.mknod(b"file-%d" % number, stat.S_IFREG)
    fill(lambda number: store.create_sequence(model, f"sequence {number} " + "n" * 200))
    for number in range(50):
        posix.unlink(b"file-%d" % number)
    store.delete_sequence("sequence 0 " + "n" * 200)
    store.close()
    store, posix = open_small(small)
    assert posix.listdir() == [] and store.check() == []
    store.close()


def test_a_failing_catalogue(opened, monkeypatch):
    """Names that the kernel believes in and the drive has lost: every call has to say so."""
    store, posix = opened()
    posix.mkdir(b"durable")
    store.flush()
    posix.mkdir(b"lost")

    def broken(rows):
        raise apsw.IOError("the drive is gone")

    monkeypatch.setattr(store._catalogue.files, "store_inodes", broken)
    with pytest.raises(FileError) as raised:
        store.flush()
    assert raised.value.errno == errno.EIO
    fails(errno.EIO, posix.mkdir, b"more")
    store.close()  # sequences are not concerned
    _, posix = opened()
    assert posix.listdir() == [b"durable"]


def test_one_file_system_a_store(store):
    """Two would hand out the same inode numbers."""
    with pytest.raises(InvalidArgument, match="already"):
        FileSystem(store)


# the first version


def to_version_1(path):
    with Inspection(path, read_only=False) as inspection:
        execute = inspection.catalogue._db.execute
        prefix_triggers = ("prefix_entry_of_no_group", "prefix_publication_of_no_sequence")
        for trigger in (*prefix_triggers, *DERIVED_TRIGGERS):
            execute(f"DROP TRIGGER {trigger}")
        execute("DROP INDEX sequence_group_by_group")
        for table in (
            *DERIVED_TABLES,
            *OBJECT_TABLES,
            *PREFIX_TABLES,
            "entry",
            "xattr",
            "file_extent",
            "inode",
            "sequence_attribute",
        ):
            execute(f"DROP TABLE {table}")
        execute("PRAGMA user_version = 1")
        inspection.catalogue.sync()


def test_a_drive_of_version_1(path, opened):
    """Sequences of years ago; a check of an old drive changes nothing on it."""
    with kvfs.open(path, cache_bytes="8MiB", worker="reference") as store:
        store.create_sequence(add_model(store), "old")
    to_version_1(path)
    before = path.read_bytes()
    with Inspection(path) as inspection:
        assert inspection.check().problems == []
    assert path.read_bytes() == before
    store, posix = opened()
    posix.write(b"a", 0, b"x")
    store.close()
    store, posix = opened()
    assert posix.read(b"a") == b"x" and store.sequence("old").num_tokens == 0
