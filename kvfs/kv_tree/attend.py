"""A layer's `attend` file: attention for whoever can write and read a file.

Write one NPY array [num_queries, num_query_heads, head_dim] at offset 0, then read from offset 0: NPY arrays
`out` (of the queries' shape) and `lse` [num_queries, num_query_heads], float32, one behind the other. These are
queries of the layer's last tokens. Every open file has its own question and answer.
"""

import errno
import io
import threading

import numpy as np

from kvfs.arrays import float_array
from kvfs.errors import InvalidArgument
from kvfs.kv_tree.nodes import OpenContent
from kvfs.layout import NUMPY_DTYPE
from kvfs.sequence import Sequence
from kvfs.store import Store
from kvfs.tree import FileError

MAX_QUESTION_BYTES = 256 << 20
MAX_HEADER_BYTES = 65536


class AttendContent(OpenContent):
    size = 0

    def __init__(self, store: Store, sequence: Sequence, layer: int):
        self._store, self._sequence, self._layer = store, sequence, layer
        self._lock = threading.Lock()
        self._question = bytearray()
        self._question_bytes: int | None = None  # of the whole array, once its header has arrived
        self._answer = b""

    def write(self, offset: int, data: memoryview | bytes) -> int:
        """Takes the next part of a question; with its last, the question is answered."""
        with self._lock:
            if offset == 0:
                self._forget()
            if offset != len(self._question) or self._answer:
                raise FileError(
                    errno.EINVAL, "a question to an attend file is written in order, from offset 0 on"
                )
            if offset + len(data) > MAX_QUESTION_BYTES:
                raise FileError(
                    errno.EFBIG, f"a question to an attend file has at most {MAX_QUESTION_BYTES} bytes"
                )
            self._question += data
            try:
                if self._question_bytes is None:
                    self._question_bytes = _array_bytes(self._question)
                if self._question_bytes is not None and len(self._question) >= self._question_bytes:
                    self._answer = self._attend()
                    self._question = bytearray()
            except BaseException:
                self._forget()
                raise
            return len(data)

    def flush(self) -> None:
        with self._lock:
            self._check_whole()

    def _check_whole(self) -> None:
        if self._question:
            num_bytes = len(self._question)
            self._forget()
            raise FileError(errno.EINVAL, f"a question to an attend file ended after {num_bytes} bytes")

    def _forget(self) -> None:
        self._question, self._question_bytes, self._answer = bytearray(), None, b""

    def read(self, offset: int, size: int) -> memoryview | bytes:
        """Nothing before a question, so that tools which copy every file get on."""
        with self._lock:
            self._check_whole()
            return memoryview(self._answer)[offset : offset + size]

    def _attend(self) -> bytes:
        if len(self._question) > self._question_bytes:
            raise InvalidArgument("there are bytes behind the array of queries")
        queries = _array(self._question)
        geometry = self._sequence.model.geometry
        shape = (None, geometry.num_query_heads, geometry.head_dim)
        queries = float_array(queries, "queries", shape, "[num_queries, num_query_heads, head_dim]")
        out, lse = self._store.attend(self._layer, queries[None], self._sequence)
        answer = io.BytesIO()
        np.save(answer, out[0])
        np.save(answer, lse[0])
        return answer.getvalue()


def _header(data: bytearray) -> tuple[tuple[int, ...], bool, np.dtype, int] | None:
    """(shape, whether Fortran-ordered, dtype, where the data begin), or None if the header is not all there."""
    file = io.BytesIO(data[:MAX_HEADER_BYTES])
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return *read(file, max_header_size=MAX_HEADER_BYTES), file.tell()
    except ValueError as error:
        if "EOF" in str(error) and len(data) < MAX_HEADER_BYTES:
            return None
        raise InvalidArgument(f"a question to an attend file is an NPY array ({error})") from error


def _array_bytes(data: bytearray) -> int | None:
    """How long an NPY file is that begins like this."""
    header = _header(data)
    if header is None:
        return None
    shape, _, dtype, start = header
    if dtype.hasobject:
        raise InvalidArgument("queries are floats, not Python objects")
    size = start + int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    if size > MAX_QUESTION_BYTES:
        raise InvalidArgument(
            f"a question to an attend file has at most {MAX_QUESTION_BYTES} bytes, not {size}"
        )
    return size


def _array(data: bytearray) -> np.ndarray:
    shape, is_fortran, dtype, start = _header(data)
    if dtype == np.dtype("V2"):  # as NumPy saves bfloat16
        dtype = NUMPY_DTYPE["bfloat16"]
    try:
        return np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")
    except ValueError as error:
        raise InvalidArgument(f"queries are not an array: {error}") from error
