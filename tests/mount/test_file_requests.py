"""Which thread answers a read, without a kernel."""

import queue
import threading
from types import SimpleNamespace

import pytest

from kvfs.mount import file_requests
from kvfs.mount.file_requests import NOW_BYTES, NOW_SECONDS, FileRequests
from kvfs.mount.fuse_glue import ffi
from kvfs.tree import FileError

DATA = bytes(range(100))


class Tree:
    """A read takes `seconds` on a `clock`; cannot read at once where `is_busy`, and fails with `error`."""

    clock = 0.0
    seconds = 0.0
    is_busy = False
    error = None

    def read_now(self, handle, offset, size):
        return None if self.is_busy else self.read(handle, offset, size)

    def read(self, handle, offset, size):
        self.clock += self.seconds
        if self.error:
            raise self.error
        return memoryview(DATA)


@pytest.fixture
def tree():
    return Tree()


@pytest.fixture
def ask(tree, monkeypatch):
    """ask(size): (whether the read was answered where it arrived, the answer)."""
    answers = queue.SimpleQueue()

    def reply_data(request, data, size):
        answers.put((threading.current_thread(), ffi.buffer(data, size)[:]))

    def reply_error(request, error):
        answers.put((threading.current_thread(), error))

    lib = SimpleNamespace(fuse_reply_buf=reply_data, fuse_reply_err=reply_error)
    monkeypatch.setattr(file_requests, "lib", lib)
    monkeypatch.setattr(file_requests, "time", SimpleNamespace(perf_counter=lambda: tree.clock))
    requests = FileRequests(SimpleNamespace(of_handle=lambda handle: (tree, handle)))

    def ask(size):
        requests._take_read("request", 1, 0, size)
        thread, answer = answers.get(timeout=20)
        assert answers.empty(), "answered once"
        return thread is threading.current_thread(), answer

    yield ask
    requests.close()


def test_small_reads_of_a_quick_drive(tree, ask):
    """Are answered where they arrive; large ones, and those that would wait, by a worker."""
    assert ask(4096) == ask(NOW_BYTES) == (True, DATA)
    assert ask(NOW_BYTES + 1) == (False, DATA)
    tree.is_busy = True
    assert ask(4096) == (False, DATA)


def test_a_slow_drive_holds_up_nobody(tree, ask):
    """But for one read; and when it is quick again that is noticed."""
    tree.seconds = 1.5 * NOW_SECONDS
    assert [ask(4096)[0] for _ in range(3)] == [True, False, False]
    tree.seconds = 0.0
    assert [ask(4096)[0] for _ in range(3)] == [False, True, True]


@pytest.mark.parametrize("error", [FileError(5), RuntimeError("a bug")])
def test_errors(tree, ask, error):
    """A worker meets it again, and it is its answer."""
    tree.error = error
    assert ask(4096) == (False, 5)
