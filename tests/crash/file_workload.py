"""Random use of a store's ordinary files, told to the oracle before it is done; see workload.py."""

import os
import stat
from collections.abc import Callable

import numpy as np

from kvfs import errors
from kvfs.files.file_system import FileSystem
from kvfs.tree import ROOT_INODE, AttributeChanges, Caller

from .file_oracle import FileOracle, FileState
from .oracle import Lost

MAX_FILES = 6
LONGEST_FILE = 48 << 10
FOLDERS = ("d1", "d2")
KEEP_SIZE, PUNCH_HOLE = 0x01, 0x02
CALLER = Caller(0, 0, 0)


class FileWorkload:
    """Operations on the files of whatever store is open. note: told what is done."""

    def __init__(self, random: np.random.Generator, oracle: FileOracle, note: Callable[[str], None]):
        self._random = random
        self._oracle = oracle
        self._note = note
        self._next_name = 0
        self._unlinked: list[tuple[int, FileState]] = []  # handles of files that have no name any more
        self.files: FileSystem | None = None

    @property
    def operations(self) -> dict[Callable[[], None], int]:
        return {
            self._create: 2,
            self._write: 8,
            self._truncate: 2,
            self._punch: 1,
            self._rename_file: 2,
            self._link: 1,
            self._unlink: 2,
            self._use_unlinked: 1,
            self._folder: 1,
            self._read_file: 2,
            self._sync_file: 2,
        }

    def use(self, store) -> None:
        """Another process: what was open is not any more."""
        self.files = FileSystem(store)
        self.files._behind.is_in_background = False  # every run is the same, and all is written late
        self.files._behind.min_bytes = 1
        self._unlinked.clear()

    # choosing

    def _new_name(self) -> str:
        self._next_name += 1
        folder = self._random.choice(["", *(f"{folder}/" for folder in sorted(self._oracle.folders))])
        return f"{folder}f{self._random.integers(1, self._next_name + 1)}"

    def _pick(self) -> tuple[str, FileState]:
        if not self._oracle.files:
            self._create()
        names = sorted(self._oracle.files)
        name = names[self._random.integers(len(names))]
        return name, self._oracle.files[name]

    def _place(self, name: str) -> tuple[int, bytes]:
        """Inode of the folder, and the entry."""
        folder, _, entry = name.rpartition("/")
        return (self._inode(folder) if folder else ROOT_INODE), entry.encode()

    def _inode(self, name: str) -> int:
        inode = self.files.lookup(*self._place(name)).inode
        self.files.forget(inode, 1)
        return inode

    def _open(self, name: str) -> int:
        return self.files.open(self._inode(name), os.O_RDWR, CALLER).handle

    # operations

    def _create(self) -> None:
        if len(self._oracle.files) >= MAX_FILES:
            return self._unlink()
        name = self._new_name()
        if name in self._oracle.files:
            return
        self._note(f"create file {name}")
        with self._oracle.attempt({**self._oracle.files, name: FileState()}):
            created, attributes = self.files.create(*self._place(name), 0o644, os.O_RDWR | os.O_EXCL, CALLER)
            self.files.release(created.handle)
            self.files.forget(attributes.inode, 1)

    def _write(self) -> None:
        name, state = self._pick()
        offset = int(self._random.integers(0, min(len(state.content) + 9000, LONGEST_FILE)))
        length = int(self._random.choice([1, 100, 4096, 5000, 20_000]))
        if self._random.random() < 0.4:
            offset -= offset % 4096
        data = self._random.bytes(length)
        self._note(f"write file {name} [{offset}, {offset + length}) of {len(state.content)}")
        handle = self._open(name)
        try:
            self._change(handle, name, state, lambda: state.write(offset, data), self.files.write, offset, data)
        finally:
            self.files.release(handle)

    def _change(
        self, handle: int, name: str, state: FileState, tell: Callable, do: Callable, *arguments
    ) -> None:
        """Tell the oracle and do it. What is refused may have overwritten something, and has not grown."""
        size = len(state.content)
        tell()
        self._oracle.note()
        try:
            do(handle, *arguments)
        except errors.OutOfSpace:
            found = bytes(self.files.read(handle, 0, LONGEST_FILE * 2))
            self._oracle.take_back()
            state.check(name, found, size)
            state.content[:] = found
            state.note()
            raise

    def _truncate(self) -> None:
        name, state = self._pick()
        self._set_size(name, state)
        if self._random.random() < 0.5:  # what was cut off may not come back
            self._set_size(name, state)

    def _set_size(self, name: str, state: FileState) -> None:
        size = int(self._random.integers(0, min(len(state.content) + 9000, LONGEST_FILE)))
        self._note(f"truncate file {name} to {size} of {len(state.content)}")
        handle, inode = self._open(name), self._inode(name)

        def truncate(handle: int) -> None:
            self.files.set_attributes(inode, AttributeChanges(size=size), CALLER)

        try:
            self._change(handle, name, state, lambda: state.truncate(size), truncate)
        finally:
            self.files.release(handle)

    def _punch(self) -> None:
        name, state = self._pick()
        first, length = (int(number) for number in self._random.integers(1, 20_000, 2))
        self._note(f"punch file {name} [{first}, {first + length}) of {len(state.content)}")
        handle = self._open(name)
        mode = PUNCH_HOLE | KEEP_SIZE
        try:
            self._change(
                handle, name, state, lambda: state.zero(first, length), self.files.allocate, mode, first, length
            )
        finally:
            self.files.release(handle)

    def _rename_file(self) -> None:
        name, state = self._pick()
        new_name = self._new_name()
        if self._oracle.files.get(new_name) is state:
            return  # another name of the same file: nothing is done
        self._note(f"rename file {name} to {new_name}")
        files = {other: kept for other, kept in self._oracle.files.items() if other != name}
        with self._oracle.attempt({**files, new_name: state}):
            self.files.rename(*self._place(name), *self._place(new_name), 0)

    def _link(self) -> None:
        name, state = self._pick()
        new_name = self._new_name()
        if new_name in self._oracle.files or len(self._oracle.files) >= MAX_FILES:
            return
        self._note(f"link file {name} as {new_name}")
        with self._oracle.attempt({**self._oracle.files, new_name: state}):
            attributes = self.files.link(self._inode(name), *self._place(new_name))
            self.files.forget(attributes.inode, 1)

    def _unlink(self) -> None:
        name, state = self._pick()
        stays_open = self._random.random() < 0.5
        self._note(f"unlink file {name}" + ", which stays open" * stays_open)
        if stays_open:
            self._unlinked.append((self._open(name), state))
        with self._oracle.attempt({other: kept for other, kept in self._oracle.files.items() if other != name}):
            self.files.unlink(*self._place(name))

    def _use_unlinked(self) -> None:
        """A file without a name is there until it is closed."""
        if not self._unlinked:
            return
        handle, state = self._unlinked[0]
        if state in self._oracle.files.values():  # it had another name
            pass
        elif bytes(self.files.read(handle, 0, LONGEST_FILE * 2)) != state.content:
            raise Lost("a file that was unlinked while it was open holds something else")
        if self._random.random() < 0.2:
            del self._unlinked[0]
            self.files.release(handle)

    def _folder(self) -> None:
        """One that is not there is made, one that is there is removed if it is empty."""
        name = str(self._random.choice(FOLDERS))
        folders = self._oracle.folders
        if name not in folders:
            self._note(f"make folder {name}")
            with self._oracle.attempt(folders=folders | {name}):
                inode = self.files.make_folder(ROOT_INODE, name.encode(), 0o755, CALLER).inode
                self.files.forget(inode, 1)
        elif not any(file.startswith(f"{name}/") for file in self._oracle.files):
            self._note(f"remove folder {name}")
            with self._oracle.attempt(folders=folders - {name}):
                self.files.remove_folder(ROOT_INODE, name.encode())

    def _read_file(self) -> None:
        name, state = self._pick()
        self._note(f"read file {name}")
        handle = self._open(name)
        try:
            if bytes(self.files.read(handle, 0, LONGEST_FILE * 2)) != state.content:
                raise Lost(f"file {name!r} holds something else")
        finally:
            self.files.release(handle)

    def _sync_file(self) -> None:
        name, _ = self._pick()
        self._note(f"sync file {name}")
        handle = self._open(name)
        try:
            self.files.sync(handle, False)
        finally:
            self.files.release(handle)
        self._oracle.promise()

    def remove_all(self) -> None:
        """Everything, and what is open is closed."""
        for handle, _ in self._unlinked:
            self.files.release(handle)
        self._unlinked.clear()
        for name in sorted(self._oracle.files):
            self.files.unlink(*self._place(name))
        for folder in sorted(self._oracle.folders):
            self.files.remove_folder(ROOT_INODE, folder.encode())
        self._oracle.files, self._oracle.folders = {}, frozenset()


def read_files(files: FileSystem, folder: int = ROOT_INODE, prefix: str = "") -> dict[str, bytes | None]:
    """Content by path, None of folders."""
    found: dict[str, bytes | None] = {}
    handle = files.open_folder(folder, CALLER)
    entries = [(name.decode(), attributes) for name, attributes, _ in files.read_folder(handle, 0)]
    files.release_folder(handle)
    for name, attributes in entries:
        path = prefix + name
        if stat.S_ISDIR(attributes.mode):
            found[path] = None
            found |= read_files(files, attributes.inode, f"{path}/")
        else:
            opened = files.open(attributes.inode, os.O_RDONLY, CALLER).handle
            try:
                found[path] = bytes(files.read(opened, 0, attributes.size))
            finally:
                files.release(opened)
    return found
