"""Reading ahead: each piece once, the right bytes, and nothing of what is gone."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvfs import read_ahead
from kvfs.kv_tree.early_content import EarlyContent
from kvfs.kv_tree.nodes import OpenContent
from kvfs.read_ahead import MIN_BYTES, NUM_PIECES, ReadAhead
from kvfs.tree import FileError

PIECE = MIN_BYTES
NUM = 9


class Content(OpenContent):
    """Bytes that say where they are. reads: how often each offset was asked for."""

    size = NUM * PIECE + 5

    def __init__(self):
        self.reads = Counter()
        self.lock = threading.Lock()
        self.is_gone = False

    def check(self):
        if self.is_gone:
            raise FileError(116)

    def read(self, offset, size):
        self.check()
        with self.lock:
            self.reads[offset] += 1
        return bytes([offset // PIECE]) * min(size, self.size - offset)


@pytest.fixture
def content():
    return Content()


@pytest.fixture
def ahead(content):
    return EarlyContent(content, content.check)


def is_right(data, number):
    return data == bytes([number]) * (PIECE if number < NUM else 5)


def wait_for_threads():
    """All that was asked of them is done: each has done one more thing."""
    barrier = threading.Barrier(read_ahead.NUM_THREADS + 1)
    for _ in range(read_ahead.NUM_THREADS):
        read_ahead._threads.submit(barrier.wait)
    barrier.wait(20)


def test_front_to_back(content, ahead):
    """Pieces are there before they are asked for, and read once."""
    for number in range(NUM + 1):
        assert is_right(ahead.read(number * PIECE, PIECE), number)
        wait_for_threads()
        last = min(number + NUM_PIECES, NUM)
        assert content.reads == {at * PIECE: 1 for at in range(last + 1)}
    assert ahead.read(content.size, PIECE) == b""


def test_several_requests_at_a_time(content, ahead):
    """As the kernel's read-ahead sends them: never the wrong piece."""
    with ThreadPoolExecutor(8) as readers:
        for number, data in enumerate(readers.map(lambda n: ahead.read(n * PIECE, PIECE), range(NUM + 1))):
            assert is_right(data, number)


def test_here_and_there(content, ahead):
    """Who jumps about, or reads little, has nothing read in vain."""
    for number in (5, 2, 7, 1):
        assert is_right(ahead.read(number * PIECE, PIECE), number)
    for at in range(0, 8 * 4096, 4096):
        assert ahead.read(at, 4096) == bytes(4096)
    wait_for_threads()
    assert all(count == 1 for count in content.reads.values()) and len(content.reads) == 4 + 8


def test_what_is_gone(content, ahead):
    """A sequence that lost tokens of the snapshot: also what was read before is an error."""
    ahead.read(0, PIECE)
    wait_for_threads()
    content.is_gone = True
    for number in (1, 2, 3):
        with pytest.raises(FileError):
            ahead.read(number * PIECE, PIECE)


@pytest.mark.parametrize("version", [2, None])
def test_what_has_changed(content, version):
    """Bytes from before a change that is under way, or has ended, are not what is there."""
    versions = [1]
    ahead = ReadAhead(content.read, lambda: content.size, lambda: versions[-1])
    assert is_right(ahead.read(0, PIECE), 0)
    wait_for_threads()
    versions.append(version)
    assert is_right(ahead.read(PIECE, PIECE), 1)
    assert content.reads[PIECE] == 2


def test_what_was_being_changed(content):
    """Nothing is read early, which would be worth nothing even if the change goes on."""
    ahead = ReadAhead(content.read, lambda: content.size, lambda: None)
    for number in range(NUM + 1):
        assert is_right(ahead.read(number * PIECE, PIECE), number)
    wait_for_threads()
    assert set(content.reads.values()) == {1}


def test_an_error_that_is_mended(content):
    """What could not be read early, and was written anew since, can be read."""
    versions = [1]
    ahead = ReadAhead(content.read, lambda: content.size, lambda: versions[-1])
    content.is_gone = True
    for number in (0, 1):
        with pytest.raises(FileError):
            ahead.read(number * PIECE, PIECE)
    wait_for_threads()
    content.is_gone = False
    versions.append(2)
    assert is_right(ahead.read(2 * PIECE, PIECE), 2)
