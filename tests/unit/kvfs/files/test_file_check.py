"""Looking into a drive with files and mending it: damage is named by path, and what is safe is mended."""

import stat

import pytest

import kvfs
from kvfs.files.file_system import FileSystem
from kvfs.inspection import Inspection
from kvfs.repair import repair
from tests.unit.kvfs.files.posix import Posix
from tests.unit.kvfs.files.test_data import BLOCK, content
from tests.unit.kvfs.test_check import check, flip, sql, texts


@pytest.fixture
def filled(path):
    """/d/a of ten blocks, /d/b of two names (/b), /d/e/f in a folder, an empty file and a hole."""
    with kvfs.open(path, cache_bytes="8MiB", num_workers=1, worker="reference") as store:
        posix = Posix(FileSystem(store))
        posix.mkdir(b"d")
        posix.mkdir(b"d/e")
        posix.write(b"d/a", 0, content(10 * BLOCK, 1))
        posix.write(b"d/b", 0, content(3 * BLOCK, 2))
        posix.link(b"d/b", b"b")
        posix.write(b"d/e/f", 20 * BLOCK, content(BLOCK, 3))
        posix.mknod(b"empty", stat.S_IFREG)
        posix.tree.set_xattr(posix.stat(b"empty").inode, b"user.a", b"x", 0)
    return path


def mend(path):
    """(what was done, what is left)."""
    with Inspection(path, read_only=False) as inspection:
        done = repair(inspection, inspection.check())
        left = inspection.check()
    return done, texts(left)


def read_all(path, names):
    with kvfs.open(path, cache_bytes="8MiB", num_workers=1, worker="reference") as store:
        posix = Posix(FileSystem(store))
        assert store.check() == []
        return [posix.read(name) for name in names]


def test_a_healthy_drive(filled):
    """False alarms."""
    assert check(filled).problems == []
    assert mend(filled) == ([], [])


def test_a_lost_block_has_a_path(filled):
    """An administrator has to know what to restore; a block that is written anew is whole."""

    def second_block_of_a(store):
        (lba,) = store._catalogue._db.execute("SELECT lba FROM file_extent WHERE num_blocks = 10").fetchone()
        return [lba + 1]

    (lba,) = flip(filled, second_block_of_a)
    with Inspection(filled) as inspection:
        owner = inspection.owner(lba)
        assert (owner.area, owner.offset) == ("file", BLOCK)
        assert "file '/d/a', bytes 4096 to 8191" in owner.text
        (problem,) = (problem for problem in inspection.check().problems if problem.kind == "lost")
        assert problem.is_damage and "'/d/a'" in problem.text
    with kvfs.open(filled, cache_bytes="8MiB", num_workers=1, worker="reference") as store:
        posix = Posix(FileSystem(store))
        with pytest.raises(kvfs.errors.NvmeStatusError):
            posix.read(b"d/a")
        assert posix.read(b"d/a", 2 * BLOCK) == content(10 * BLOCK, 1)[2 * BLOCK :]
        posix.write(b"d/a", BLOCK, bytes(BLOCK))
        assert store.check() == []


DAMAGE = [
    ("UPDATE inode SET num_links = 7 WHERE size = 12288", "counts 7 links but has 2", "counted the links"),
    ("UPDATE inode SET num_links = 9 WHERE id = 1", "file '/' counts 9 links but has 3", "counted the links"),
    ("DELETE FROM inode WHERE size = 40960", "1 names that lead to no file", "removed 1 names that lead"),
    ("INSERT INTO entry VALUES (99, x'61', 1, 99)", "1 names in no folder", "removed 1 names in no folder"),
    ("DELETE FROM entry WHERE name = x'61'", "has no name", "named 1 files without a name in /lost+found"),
    ("DELETE FROM entry WHERE name = x'65'", "has no name", "named 1 files without a name in /lost+found"),
    ("UPDATE xattr SET inode = 99", "1 extended attributes of no file", "removed 1 extended attributes"),
    ("UPDATE file_extent SET inode = 99 WHERE num_blocks = 10", "1 extents of no file", "removed 1 extents"),
    ("UPDATE inode SET num_blocks = 3 WHERE size = 40960", "'/d/a' counts 3 blocks but has 10", "counted the"),
    ("UPDATE inode SET parent = 99 WHERE parent = 2", "'/d/e' is in another folder", "corrected the parents"),
    ("DELETE FROM inode WHERE id = 1", "there is no root folder", "made a new root folder"),
    (
        "INSERT INTO file_extent SELECT inode, 5, 1, 5000 FROM file_extent WHERE num_blocks = 10",
        "'/d/a' has two blocks in one place",
        "removed 1 extents of files with two blocks",
    ),
    (
        "UPDATE file_extent SET lba = (SELECT lba + 1 FROM file_extent WHERE num_blocks = 10)"
        " WHERE num_blocks = 1",
        "overlap",
        "made a hole of blocks",
    ),
    ("UPDATE file_extent SET lba = 3 WHERE num_blocks = 1", "outside the data area", "made a hole of blocks 3"),
]


@pytest.mark.parametrize("statement, found, done", DAMAGE, ids=[wanted for _, wanted, _ in DAMAGE])
def test_damage(filled, statement, found, done):
    """Each contradiction is found, mended and then gone; files that are not concerned are as they were."""
    sql(filled, statement)
    problems = texts(check(filled))
    assert any(found in text for text in problems), problems
    was_done, left = mend(filled)
    assert any(done in text for text in was_done), was_done
    assert left == []
    assert read_all(filled, [b"b"]) == [content(3 * BLOCK, 2)]


def test_a_file_that_lost_its_name(filled):
    """fsck that deletes what it cannot name loses data."""
    sql(filled, "DELETE FROM entry WHERE name = x'61'")
    mend(filled)
    with kvfs.open(filled, cache_bytes="8MiB", num_workers=1, worker="reference") as store:
        posix = Posix(FileSystem(store))
        (name,) = posix.listdir(b"lost+found")
        assert posix.read(b"lost+found/" + name) == content(10 * BLOCK, 1)


def test_a_circle_of_folders(filled):
    """A check that walks it for ever; folders that nobody can reach and nobody misses."""
    sql(
        filled,
        "UPDATE entry SET parent = (SELECT inode FROM entry WHERE name = x'65') WHERE name = x'64'",
        "UPDATE inode SET parent = (SELECT inode FROM entry WHERE name = x'65') WHERE id ="
        " (SELECT inode FROM entry WHERE name = x'64')",
    )
    problems = texts(check(filled))
    assert any("cannot be reached" in text for text in problems), problems
