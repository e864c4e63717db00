"""Files that are being written into the KV tree: what they become, they become when they are closed.

Until then their bytes wait in a nameless file beside the drive's, which a crash leaves nothing of.

Two locks: threads that hold the store's may wait for the one of the state, which nobody holds for long, but
never for the one of the bytes, under which the store is asked for tokens and given them.
"""

import errno
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvfs.kv_tree.nodes import OpenContent
from kvfs.kv_tree.transfer import SafetensorsReader
from kvfs.tree import FileError

COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class Purpose:
    """What a file becomes. finish: called with the whole file; what it raises, closing the file raises.

    fork: makes the same of a snapshot of which all bytes were copied here, without copying any.
    """

    finish: Callable
    fork: Callable[[SafetensorsReader], None] | None = None


class Upload(OpenContent):
    """purpose: None for a file that is to be renamed first, as tools do that write under a temporary name."""

    def __init__(self, drive_path: str, purpose: Purpose | None):
        folder = Path(drive_path).resolve().parent
        folder = folder if os.access(folder, os.W_OK) else None
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when it is finished
        self._purpose = purpose
        self._bytes_lock = threading.Lock()
        self._source: SafetensorsReader | None = None  # its first bytes, up to size, are this file's
        self.size = 0
        self._state_lock = threading.Lock()
        self._num_open = 0
        self._is_finishing = False
        self.is_finished = False

    # what is in it

    def write(self, offset: int, data: memoryview | bytes) -> int:
        with self._bytes_lock:
            self._check_open()
            self._materialise()
            return self._write(offset, data)

    def _write(self, offset: int, data: memoryview | bytes) -> int:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[written:], offset + written
        self.size = max(self.size, offset)
        return len(data)

    def read(self, offset: int, size: int) -> memoryview | bytes:
        with self._bytes_lock:
            self._check_open()
            self._materialise()
            return os.pread(self._file.fileno(), size, offset)

    def allocate(self, length: int) -> None:
        """Room is found while writing."""

    def truncate(self, size: int) -> None:
        with self._bytes_lock:
            self._check_open()
            self._materialise()
            self._file.truncate(size)
            self.size = size

    def take_over(self, source: SafetensorsReader, source_offset: int, offset: int, length: int) -> int | None:
        """Note that the next bytes are the source's; how many. None where they have to be copied."""
        with self._bytes_lock:
            self._check_open()
            is_next = source_offset == offset == self.size
            if not is_next or self._source is not (source if offset else None):
                return None
            self._source = source
            count = max(0, min(length, source.size - offset))
            self.size += count
            return count

    def _materialise(self) -> None:
        """Write what was only noted."""
        source, self._source = self._source, None
        offset = 0
        while source is not None and offset < self.size:
            piece = source.read(offset, min(COPY_BYTES, self.size - offset))
            offset += self._write(offset, piece)

    # what becomes of it

    def _check_open(self) -> None:
        if self.is_finished:
            raise FileError(errno.ESTALE, "this file was closed, and is what it held now: write it anew")

    def opened(self) -> None:
        with self._state_lock:
            self._check_open()
            self._num_open += 1

    def become(self, purpose: Purpose) -> None:
        """It is whole, and has its name now."""
        with self._state_lock:
            self._check_open()
            if self._is_finishing:
                raise FileError(errno.EBUSY)
            self._is_finishing = True
        self._run(purpose)

    def flush(self) -> None:
        """The file is whole, unless a shell has closed one of several descriptors before it wrote anything."""
        with self._state_lock:
            if self.is_finished or self._is_finishing or self.size == 0 or self._purpose is None:
                return
            self._is_finishing = True
        self._run(self._purpose)

    def _run(self, purpose: Purpose) -> None:
        try:
            with self._bytes_lock:
                self._finish(purpose)
            self._end()
        finally:
            self._is_finishing = False

    def _finish(self, purpose: Purpose) -> None:
        source = self._source
        if source is not None and self.size == source.size and purpose.fork is not None:
            purpose.fork(source)
        else:
            self._materialise()
            purpose.finish(self._file)

    sync = flush

    def release(self) -> None:
        """What is closed and has not become anything is gone, unless it waits for its name."""
        with self._state_lock:
            self._num_open -= 1
            is_over = self._num_open == 0 and self._purpose is not None
        if is_over:
            self._end()

    def remove(self) -> None:
        """It is to become nothing. Raises FileError EBUSY while it becomes something."""
        with self._state_lock:
            if self._is_finishing:
                raise FileError(errno.EBUSY)
        self._end()

    def _end(self) -> None:
        with self._state_lock:
            self.is_finished = True
            self._file.close()
