"""What ordinary files must hold, and what they may hold: told of every change before the store is.

Names, sizes and which blocks a file has are one history, as the catalogue's are: what is found after a power
cut must be one of its moments, at or after the last sync. What is in a block is written in place, so each block
may be as it was at any time since then, whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvfs.errors import OutOfSpace

BLOCK_BYTES = 4096


class Mismatch(AssertionError):
    """What was found is not what may be."""


class FileState:
    """One file, whatever its names."""

    def __init__(self, content: bytes = b""):
        self.content = bytearray(content)
        self._may_hold: dict[
            int, list[bytes]
        ] = {}  # by block, padded with zeros: what it held since the last sync
        self.note()

    def note(self, zeroed: range = range(0)) -> None:
        """The content has changed. Behind the end a block may keep what it held, but for what was zeroed there,
        until the end moves up."""
        for block, data in enumerate(_blocks(self.content)):
            held = self._may_hold.setdefault(block, [])
            end = min(BLOCK_BYTES, len(self.content) - block * BLOCK_BYTES)
            kept = [_zero(other, zeroed, block * BLOCK_BYTES) for other in held] if zeroed else held
            for behind in {data[end:], *(other[end:] for other in kept)}:
                if data[:end] + behind not in held:
                    held.append(data[:end] + behind)

    def promise(self) -> None:
        self._may_hold = {block: [data] for block, data in enumerate(_blocks(self.content))}

    def write(self, offset: int, data: bytes) -> None:
        self.extend(offset)
        self.content[offset : offset + len(data)] = data
        self.note()

    def extend(self, size: int) -> None:
        self.content += bytes(max(0, size - len(self.content)))
        self.note()  # the rest of the last block is zeroed before anything else

    def truncate(self, size: int) -> None:
        del self.content[size:]
        self.extend(size)

    def zero(self, offset: int, length: int) -> None:
        stop = min(offset + length, len(self.content))
        self.content[offset:stop] = bytes(max(0, stop - offset))
        self.note(zeroed=range(offset, offset + length))

    def check(self, name: str, found: bytes, size: int) -> None:
        """Raises Mismatch unless a file of this size may hold this."""
        if len(found) != size:
            raise Mismatch(f"file {name!r} has {len(found)} bytes where it had {size}")
        for block, data in enumerate(_blocks(found)):
            end = min(BLOCK_BYTES, size - block * BLOCK_BYTES)
            if not any(data[:end] == held[:end] for held in self._may_hold.get(block, [bytes(BLOCK_BYTES)])):
                raise Mismatch(f"block {block} of file {name!r} holds what it never held")


def _blocks(content) -> Iterator[bytes]:
    for start in range(0, len(content), BLOCK_BYTES):
        yield bytes(content[start : start + BLOCK_BYTES]).ljust(BLOCK_BYTES, b"\0")


@dataclass(frozen=True)
class FileMoment:
    """The names of one instant, and how long the files were. folders have no size."""

    files: dict[str, FileState]
    folders: frozenset[str]
    sizes: dict[FileState, int]


class FileOracle:
    """Names to states as they are now, and every moment since the last sync."""

    def __init__(self) -> None:
        self.files: dict[str, FileState] = {}
        self.folders: frozenset[str] = frozenset()
        self._history = [self._moment()]

    def _moment(self) -> FileMoment:
        sizes = {state: len(state.content) for state in self.files.values()}
        return FileMoment(dict(self.files), self.folders, sizes)

    @contextmanager
    def attempt(
        self, files: dict[str, FileState] | None = None, folders: frozenset[str] | None = None
    ) -> Iterator[None]:
        """A change of names: the next moment, not to be if the store refuses it."""
        before = self.files, self.folders
        self.files = self.files if files is None else files
        self.folders = self.folders if folders is None else folders
        length = len(self._history)
        self._history.append(self._moment())
        try:
            yield
        except OutOfSpace:
            self.files, self.folders = before
            del self._history[length:]
            raise

    def note(self) -> None:
        """A file may have another size."""
        self._history.append(self._moment())

    def take_back(self) -> None:
        """What was noted last was refused."""
        self._history.pop()

    def promise(self) -> None:
        """A sync has completed."""
        for state in self.files.values():
            state.promise()
        self._history = [self._moment()]

    def check(self, found: dict[str, bytes | None]) -> FileMoment:
        """The moment that a reopened store has come back to. found: content by path, None of folders."""
        reasons = []
        for moment in reversed(self._history):
            try:
                _compare(moment, found)
            except Mismatch as reason:
                reasons.append(str(reason))
            else:
                return moment
        reasons = "\n  ".join(dict.fromkeys(reasons))
        raise Mismatch(f"no moment of the files since the last sync fits:\n  {reasons}")

    def settle(self, found: dict[str, bytes | None]) -> None:
        """As check; what was found is all there is from now on."""
        moment = self.check(found)
        self.files, self.folders = dict(moment.files), moment.folders
        for name, state in self.files.items():
            state.content = bytearray(found[name])
        self.promise()


def _zero(data: bytes, zeroed: range, start: int) -> bytes:
    """A block that begins at `start`, without what lies in a range of the file."""
    first, stop = (min(max(0, offset - start), len(data)) for offset in (zeroed.start, zeroed.stop))
    return data[:first] + bytes(stop - first) + data[stop:]


def _compare(moment: FileMoment, found: dict[str, bytes | None]) -> None:
    wanted = {*moment.files, *moment.folders}
    if found.keys() != wanted:
        raise Mismatch(f"names {sorted(found)} where there were {sorted(wanted)}")
    for name, state in moment.files.items():
        if found[name] is None:
            raise Mismatch(f"{name!r} is a folder")
        state.check(name, found[name], moment.sizes[state])
