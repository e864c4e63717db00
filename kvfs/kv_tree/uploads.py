"""Files that are being written into the KV tree: what they become, they become when they are closed.

Until then their bytes wait in a nameless file beside the drive's, which a crash leaves nothing of.
"""

import errno
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from kvfs.kv_tree.nodes import OpenContent
from kvfs.kv_tree.transfer import SafetensorsReader
from kvfs.tree import FileError

COPY_BYTES = 4 << 20


class Upload(OpenContent):
    """finish: called with the whole file once; what it raises, closing the file raises.

    fork: makes the same of a snapshot of which all bytes were copied here, without any byte being copied.
    """

    def __init__(
        self,
        drive_path: str,
        finish: Callable,
        fork: Callable[[SafetensorsReader], None] | None = None,
    ):
        folder = Path(drive_path).resolve().parent
        folder = folder if os.access(folder, os.W_OK) else None
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by release
        self._finish, self._fork = finish, fork
        self._lock = threading.Lock()
        self._source: SafetensorsReader | None = None  # its first bytes, up to size, are this file's
        self._num_open = 0
        self.size = 0
        self.is_finished = False

    def opened(self) -> None:
        with self._lock:
            self._check_open()
            self._num_open += 1

    def write(self, offset: int, data: memoryview | bytes) -> int:
        with self._lock:
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
        with self._lock:
            self._check_open()
            self._materialise()
            return os.pread(self._file.fileno(), size, offset)

    def allocate(self, length: int) -> None:
        """Room is found while writing."""

    def truncate(self, size: int) -> None:
        with self._lock:
            self._check_open()
            self._materialise()
            self._file.truncate(size)
            self.size = size

    def take_over(self, source: SafetensorsReader, source_offset: int, offset: int, length: int) -> int | None:
        """Note that the next bytes are the source's; how many. None where they have to be copied."""
        with self._lock:
            self._check_open()
            is_next = source_offset == offset == self.size and self._source in (None, source)
            if self._fork is None or not is_next or (self._source is None and offset):
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

    def flush(self) -> None:
        """The file is whole, or a shell has closed one of several descriptors before it wrote anything."""
        with self._lock:
            if self.is_finished or self.size == 0:
                return
            if self._source is not None and self.size == self._source.size:
                self._fork(self._source)
            else:
                self._materialise()
                self._finish(self._file)
            self.is_finished = True
            self._file.close()

    sync = flush

    def release(self) -> None:
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0:
                self.is_finished = True
                self._file.close()

    def cancel(self) -> None:
        """The file was removed: it becomes nothing."""
        with self._lock:
            self.is_finished = True
            self._file.close()

    def _check_open(self) -> None:
        if self.is_finished:
            raise FileError(errno.ESTALE, "this file was closed, and is what it held now: write it anew")
