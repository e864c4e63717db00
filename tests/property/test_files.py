"""A file system of the drive and a folder of the operating system, used alike, are alike."""

import ctypes
import os
import shutil
import stat
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import kvfs
from kvfs.files.file_system import FileSystem
from kvfs.tree import FileError
from tests.unit.kvfs.files.posix import Posix

# few names, so that operations meet; both files and folders come by each
PATHS = st.sampled_from([b"a", b"b", b"c", b"d", b"d/a", b"d/b", b"d/e", b"d/e/a", b"c/a"])
SYMLINKS = st.sampled_from([b"l", b"d/l"])  # apart: the system follows them, we leave that to the kernel
OFFSETS = st.one_of(st.integers(0, 40_000), st.sampled_from([0, 4095, 4096, 4097, 8192, 12_288, 1 << 20]))
LENGTHS = st.one_of(st.integers(1, 20_000), st.sampled_from([1, 4096, 8192]))
ALLOCATIONS = st.sampled_from([0, 1, 3, 0x10, 0x11])


def fallocate(fd, mode, offset, length):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


class Alike(RuleBasedStateMachine):
    """Each operation is done to both; what it gives, or its errno, and all files afterwards are compared."""

    def __init__(self):
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp())
        self.folder = self.scratch / "folder"
        self.folder.mkdir()
        self.path = self.scratch / "drive.kvfs"
        kvfs.format(self.path, "16MiB")
        self.content = 0
        self.open()

    def open(self):
        self.store = kvfs.open(self.path, cache_bytes="8MiB", num_workers=1, worker="reference")
        self.files = Posix(FileSystem(self.store))

    def teardown(self):
        problems = self.store.check()
        self.store.close()
        shutil.rmtree(self.scratch)
        assert problems == []

    def both(self, theirs, ours):
        """Results, or errno, are equal."""
        outcomes = []
        for operation in (theirs, ours):
            try:
                outcomes.append(operation())
            except (OSError, FileError) as error:
                outcomes.append(f"errno {error.errno}")
        assert outcomes[0] == outcomes[1], f"the system's {outcomes[0]}, ours {outcomes[1]}"

    def at(self, path: bytes) -> bytes:
        return os.fsencode(self.folder) + b"/" + path

    @rule(path=PATHS, offset=OFFSETS, length=LENGTHS)
    def write(self, path, offset, length):
        self.content += 1
        data = (b"%07d " % self.content) * (length // 8 + 1)

        def theirs():
            fd = os.open(self.at(path), os.O_RDWR | os.O_CREAT, 0o644)
            os.pwrite(fd, data[:length], offset)
            os.close(fd)

        self.both(theirs, lambda: self.files.write(path, offset, data[:length]))

    @rule(path=PATHS, size=OFFSETS)
    def truncate(self, path, size):
        self.both(lambda: os.truncate(self.at(path), size), lambda: self.files.set(path, size=size) and None)

    @rule(path=PATHS, mode=ALLOCATIONS, offset=OFFSETS, length=LENGTHS)
    def allocate(self, path, mode, offset, length):
        def theirs():
            fd = os.open(self.at(path), os.O_RDWR)
            try:
                fallocate(fd, mode, offset, length)
            finally:
                os.close(fd)

        self.both(theirs, lambda: self.files.fallocate(path, mode, offset, length))

    @rule(path=PATHS)
    def mkdir(self, path):
        self.both(lambda: os.mkdir(self.at(path)), lambda: self.files.mkdir(path) and None)

    @rule(path=PATHS)
    def rmdir(self, path):
        self.both(lambda: os.rmdir(self.at(path)), lambda: self.files.rmdir(path))

    @rule(path=PATHS | SYMLINKS)
    def unlink(self, path):
        self.both(lambda: os.unlink(self.at(path)), lambda: self.files.unlink(path))

    @rule(path=PATHS, new=PATHS)
    def link(self, path, new):
        def theirs():
            if stat.S_ISDIR(os.lstat(self.at(path)).st_mode):
                os.lstat(os.path.dirname(self.at(new)))  # errno of the path before that of the rule
            os.link(self.at(path), self.at(new), follow_symlinks=False)

        if not (self.files.exists(path) and self.files.exists(new)):  # which errno comes first is free
            self.both(theirs, lambda: self.files.link(path, new) and None)

    @rule(path=SYMLINKS, text=st.binary(min_size=1, max_size=100).filter(lambda b: b"\0" not in b))
    def symlink(self, path, text):
        self.both(lambda: os.symlink(text, self.at(path)), lambda: self.files.symlink(text, path) and None)

    @rule(path=PATHS, new=PATHS)
    def rename(self, path, new):
        self.both(lambda: os.rename(self.at(path), self.at(new)), lambda: self.files.rename(path, new))

    @rule()
    def flush(self):
        self.store.flush()

    @rule()
    def reopen(self):
        self.store.close()
        self.open()

    @invariant()
    def alike(self):
        def compare(path: bytes):
            theirs, ours = os.lstat(self.at(path)), self.files.stat(path)
            assert (theirs.st_mode, theirs.st_nlink) == (ours.mode, ours.num_links) or not path
            if stat.S_ISDIR(theirs.st_mode):
                names = os.listdir(self.at(path))
                assert sorted(names) == sorted(self.files.listdir(path))
                for name in names:
                    compare(path + b"/" + name if path else name)
            elif stat.S_ISLNK(theirs.st_mode):
                assert os.readlink(self.at(path)) == self.files.readlink(path)
            else:
                assert theirs.st_size == ours.size
                data = Path(os.fsdecode(self.at(path))).read_bytes()
                assert data == self.files.read(path)
                self.check_seek(path, data)

        compare(b"")

    def check_seek(self, path: bytes, data: bytes):
        """Data and holes take turns up to the end, and what is not data is zero."""
        position = 0
        while position < len(data):
            try:
                start = self.files.seek(path, position, os.SEEK_DATA)
            except FileError:
                start = len(data)
            assert start >= position and not any(data[position:start])
            position = self.files.seek(path, start, os.SEEK_HOLE) if start < len(data) else start
            assert position > start or position == len(data)


Alike.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestAlike = Alike.TestCase


class AlikeBehind(Alike):
    """Every write is accepted first, and done when somebody waits for it."""

    def open(self):
        super().open()
        behind = self.files.tree._behind
        behind.is_in_background, behind.min_bytes = False, 1


AlikeBehind.TestCase.settings = Alike.TestCase.settings
TestAlikeBehind = AlikeBehind.TestCase
