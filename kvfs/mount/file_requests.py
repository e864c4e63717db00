"""Requests for what is in a file: read, write, sync, allocate, seek, copy.

fuse_glue takes them from libfuse on the thread that reads from the kernel; worker threads answer, several at a
time, so that a request that waits for the drive holds up no other. Every `_answer` replies once, as the last
thing it does: an error before that is the reply.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from kvfs.mount.failures import errno_for
from kvfs.mount.fuse_glue import ffi, lib, pyfuse3
from kvfs.mount.trees import Trees

NUM_THREADS = 8
END_SECONDS = 60.0  # a seek may wait for a write that nobody takes any more
NOW_BYTES = 64 << 10  # a read that may be answered where it arrives
NOW_SECONDS = 1e-3  # and how long the last one may have taken
COPY_REQUEST_BYTES = 256 << 20  # then the caller asks again, and may be interrupted


class FileRequests:
    """Answers from its construction to `close`; there is one at a time, as there is one FUSE session.

    A seek for data or a hole in a file that somebody writes needs what the kernel has not yet sent (it asks
    without sending it). So that is called for first; as its writes are requests too, the seek waits on a
    thread of its own.
    """

    def __init__(self, trees: Trees):
        self._trees = trees
        self._queue: SimpleQueue = SimpleQueue()
        self._seeks: SimpleQueue = SimpleQueue()
        self._is_drive_quick = True
        answers: dict[str, Callable] = {
            "serve_write": self._answer_write,
            "serve_sync": self._answer_sync,
            "serve_sync_folder": self._answer_sync_folder,
            "serve_allocate": self._answer_allocate,
            "serve_seek": self._answer_seek,
            "serve_copy_range": self._answer_copy_range,
        }
        for name, answer in answers.items():
            ffi.def_extern(name=name)(partial(self._take, answer))
        ffi.def_extern(name="serve_read")(self._take_read)
        self._queues = [self._queue] * NUM_THREADS + [self._seeks]
        self._threads = [
            threading.Thread(target=self._work, args=(queue,), name=f"file-requests-{number}", daemon=True)
            for number, queue in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Answer what was asked, then end; no more may be asked."""
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join(END_SECONDS)

    def _take_read(self, request, handle: int, offset: int, size: int) -> None:
        if size > NOW_BYTES or not self._is_drive_quick or not self._is_read_now(request, handle, offset, size):
            self._queue.put((self._answer_read, request, (handle, offset, size)))

    def _is_read_now(self, request, handle: int, offset: int, size: int) -> bool:
        """Answer a small read on the thread that reads from the kernel, if the drive can at once.

        Handing it to another thread takes longer than reading. A drive that has become slow must not hold up
        everybody, so it is found out by workers when it is quick again.
        """
        began = time.perf_counter()
        try:
            tree, handle = self._trees.of_handle(handle)
            found = tree.read_now(handle, offset, size)
        except Exception:
            return False  # whatever it is, a worker will see it, too
        self._is_drive_quick = time.perf_counter() - began < NOW_SECONDS
        if found is None:
            return False
        data = ffi.from_buffer(found)
        lib.fuse_reply_buf(request, data, len(data))
        return True

    def _take(self, answer: Callable, request, *arguments) -> None:
        if answer == self._answer_write:
            handle, offset, data, size = arguments
            arguments = handle, offset, ffi.buffer(ffi.gc(data, lib.give_back_buffer, size), size)
        queue = self._seeks if answer == self._answer_seek else self._queue
        queue.put((answer, request, arguments))

    def _work(self, queue: SimpleQueue) -> None:
        while (work := queue.get()) is not None:
            answer, request, arguments = work
            try:
                answer(request, *arguments)
            except Exception as error:
                lib.fuse_reply_err(request, errno_for(error))
            del work, request, arguments  # a write's memory, while this waits

    def _answer_read(self, request, handle: int, offset: int, size: int) -> None:
        tree, handle = self._trees.of_handle(handle)
        began = time.perf_counter()
        data = ffi.from_buffer(tree.read(handle, offset, size))
        if size <= NOW_BYTES:
            self._is_drive_quick = time.perf_counter() - began < NOW_SECONDS
        lib.fuse_reply_buf(request, data, len(data))

    def _answer_write(self, request, handle: int, offset: int, data) -> None:
        tree, handle = self._trees.of_settled_handle(handle)
        lib.fuse_reply_write(request, tree.write(handle, offset, memoryview(data)))

    def _answer_sync(self, request, handle: int, data_only: bool) -> None:
        tree, handle = self._trees.of_settled_handle(handle)
        tree.sync(handle, data_only)
        lib.fuse_reply_err(request, 0)

    def _answer_sync_folder(self, request, handle: int, data_only: bool) -> None:
        tree, handle = self._trees.of_settled_handle(handle)
        tree.sync_folder(handle, data_only)
        lib.fuse_reply_err(request, 0)

    def _answer_allocate(self, request, handle: int, mode: int, offset: int, length: int) -> None:
        tree, handle = self._trees.of_handle(handle)
        tree.allocate(handle, mode, offset, length)
        lib.fuse_reply_err(request, 0)

    def _answer_seek(self, request, inode: int, handle: int, offset: int, whence: int) -> None:
        if self._trees.is_written(inode):
            pyfuse3.invalidate_inode(inode)
        tree, handle = self._trees.of_handle(handle)
        lib.fuse_reply_lseek(request, tree.seek(handle, offset, whence))

    def _answer_copy_range(
        self, request, source: int, source_offset: int, target: int, target_offset: int, length: int
    ) -> None:
        copied = self._trees.copy_range(
            source, source_offset, target, target_offset, min(length, COPY_REQUEST_BYTES)
        )
        lib.fuse_reply_write(request, copied)
