"""The bound on what is on its way to flash."""

import pytest

from kvfs.spilling import SpillQueue
from kvfs.tail import Spill


class RecordingSequence:
    """Ends its spills when it is told to, and notes it."""

    def __init__(self):
        self.spills: list[Spill] = []

    def spill(self, queue: SpillQueue, num_bytes: int) -> None:
        queue.make_room(num_bytes)
        spill = Spill(None, 0, num_bytes)
        self.spills.append(spill)
        queue.note(self, 0, spill)

    def _complete_oldest_spill(self, layer: int) -> None:
        self.spills.pop(0).is_under_way = False


@pytest.fixture
def queue():
    return SpillQueue(limit_bytes=100)


def test_memory_is_bounded(queue):
    """A prefill faster than the disk would take all memory: the oldest are waited for, no more than needed."""
    first, second = RecordingSequence(), RecordingSequence()
    first.spill(queue, 60)
    second.spill(queue, 40)
    assert (len(first.spills), len(second.spills)) == (1, 1)
    second.spill(queue, 30)
    assert (len(first.spills), len(second.spills)) == (0, 2)
    second.spill(queue, 30)
    assert len(second.spills) == 3


def test_what_has_ended_makes_room(queue):
    """Decoding would wait for a write that has just begun, because others that have long ended still count."""
    sequence = RecordingSequence()
    for _ in range(20):
        sequence.spill(queue, 40)
        if len(sequence.spills) > 1:
            sequence._complete_oldest_spill(0)  # as attention does
        assert len(sequence.spills) == 1
    sequence.spill(queue, 60)
    assert len(sequence.spills) == 2


def test_one_that_is_larger_than_all(queue):
    """A batch beyond the limit goes out alone instead of never."""
    sequence = RecordingSequence()
    sequence.spill(queue, 10)
    sequence.spill(queue, 500)
    assert len(sequence.spills) == 1
