"""The worker pool: every unit once, an end for every range, and a close that loses nothing."""

import os
import threading
from itertools import chain

import pytest

from accel.worker_pool import WorkerPool
from accel.workers import UnitRange

PATIENCE = 60  # seconds until a hang is a failure


class Range:
    """A submitted range: the units computed, and what was still under way when it ended."""

    def __init__(self, num_units, first_unit=0, before=None):
        self.units = UnitRange(first_unit, first_unit + num_units)
        self.wanted = list(range(first_unit, first_unit + num_units))
        self.taken = []  # appending is atomic
        self.ends = []  # computes under way at each end
        self.ended = threading.Event()
        self._before = before  # called by each compute before it takes units
        self._lock = threading.Lock()
        self._under_way = 0

    def compute(self, units):
        assert units is self.units
        with self._lock:
            self._under_way += 1
        if self._before is not None:
            self._before()
        self.taken.extend(units)
        with self._lock:
            self._under_way -= 1

    def end(self):
        with self._lock:
            self.ends.append((self._under_way, len(self.taken)))
        self.ended.set()

    def submit(self, pool):
        pool.submit(self.units, self.compute, self.end)

    def check(self):
        assert sorted(self.taken) == self.wanted
        assert self.ends == [(0, len(self.wanted))]


@pytest.fixture(params=[1, 2, 5])
def pool(request):
    pool = WorkerPool(request.param)
    yield pool
    pool.close()


def test_every_unit_once(pool):
    """A unit left out is attention that lacks tokens; one done twice only costs time, until it races."""
    ranges = [Range(1 + 37 * number % 200, first_unit=number) for number in range(100)]
    for each in ranges:
        each.submit(pool)
    for each in ranges:
        assert each.ended.wait(PATIENCE)
        each.check()


@pytest.mark.parametrize("num_units", [1, 2, 5, 1000])
def test_one_range(pool, num_units):
    one = Range(num_units)
    one.submit(pool)
    assert one.ended.wait(PATIENCE)
    one.check()


def test_several_submitters(pool):
    """Ranges from several threads at once: none is lost between them."""
    start = threading.Barrier(4)
    ranges = [[Range(1 + number % 7) for number in range(100)] for _ in range(4)]

    def submit(own):
        start.wait(PATIENCE)
        for each in own:
            each.submit(pool)

    threads = [threading.Thread(target=submit, args=(own,)) for own in ranges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for each in chain.from_iterable(ranges):
        assert each.ended.wait(PATIENCE)
        each.check()


def test_one_after_the_other(pool):
    """The pool asleep between ranges, as between decode steps: each submit wakes it."""
    for number in range(100):
        one = Range(1 + number % 3)
        one.submit(pool)
        assert one.ended.wait(PATIENCE)
        one.check()


def test_all_threads_share_a_range(pool):
    """All are in compute at once before a unit is taken; only the last one out calls `ended`."""
    together = threading.Barrier(pool.num_workers)
    shared = Range(100, before=lambda: together.wait(PATIENCE))
    shared.submit(pool)
    assert shared.ended.wait(PATIENCE)
    shared.check()


def test_ended_waits_for_the_slowest():
    """A thread still at its unit when the others find none left: an early end would merge half results."""
    pool = WorkerPool(2)
    together, go = threading.Barrier(2), threading.Event()
    units = UnitRange(0, 2)
    done, found_at_end = [], []
    first_is_done, ended = threading.Event(), threading.Event()

    def compute(units):
        together.wait(PATIENCE)  # each takes one of the two
        for unit in units:
            together.wait(PATIENCE)
            if unit == 0:
                go.wait(PATIENCE)
            done.append(unit)
            if unit == 1:
                first_is_done.set()

    def end():
        found_at_end.append(list(done))
        ended.set()

    pool.submit(units, compute, end)
    assert first_is_done.wait(PATIENCE)
    assert len(units) == 0
    go.set()
    assert ended.wait(PATIENCE)
    pool.close()
    assert found_at_end == [[1, 0]]


def test_oldest_first():
    """One thread: ranges end in the order of their submission, and submitting never waits for it."""
    pool = WorkerPool(1)
    entered, gate, order = threading.Event(), threading.Event(), []

    def hold():
        entered.set()
        gate.wait(PATIENCE)

    ranges = [Range(3, before=hold)] + [Range(number) for number in (5, 1, 4)]
    for number, each in enumerate(ranges):
        pool.submit(
            each.units, each.compute, lambda number=number, each=each: (order.append(number), each.end())
        )
    assert entered.wait(PATIENCE)
    assert order == []
    gate.set()
    pool.close()
    assert order == [0, 1, 2, 3]
    for each in ranges:
        each.check()


def test_a_held_range_does_not_hold_the_others():
    """A slow command's last unit: the free thread goes on to the next command."""
    pool = WorkerPool(2)
    slow, quick = Range(1), Range(10)
    started, gate = threading.Event(), threading.Event()

    def compute(units):
        for unit in units:  # one thread takes the unit, then is held
            started.set()
            gate.wait(PATIENCE)
            slow.taken.append(unit)

    pool.submit(slow.units, compute, slow.end)
    assert started.wait(PATIENCE)
    quick.submit(pool)
    assert quick.ended.wait(PATIENCE)
    assert not slow.ended.is_set()
    gate.set()
    assert slow.ended.wait(PATIENCE)
    pool.close()
    quick.check()
    slow.check()


def test_submit_from_ended(pool):
    """A job's end may start the next one, on the pool's own thread."""
    ranges = [Range(4) for _ in range(20)]

    def submit(number):
        def end():
            if number + 1 < len(ranges):
                submit(number + 1)
            ranges[number].end()

        pool.submit(ranges[number].units, ranges[number].compute, end)

    submit(0)
    for each in ranges:
        assert each.ended.wait(PATIENCE)
        each.check()


def test_units_taken_elsewhere(pool):
    """A cancelled job takes its own units so that nobody computes them; the range still ends."""
    one = Range(50)

    def compute(units):
        for _ in units:
            pass

    pool.submit(one.units, compute, one.end)
    assert one.ended.wait(PATIENCE)
    assert one.ends == [(0, 0)]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_close_computes_what_was_submitted(num_workers):
    pool = WorkerPool(num_workers)
    entered, gate = threading.Semaphore(0), threading.Event()

    def hold():
        entered.release()
        gate.wait(PATIENCE)

    held = Range(num_workers, before=hold)
    held.submit(pool)
    for _ in range(num_workers):  # all threads are busy
        assert entered.acquire(timeout=PATIENCE)
    ranges = [Range(1 + number) for number in range(20)]
    for each in ranges:
        each.submit(pool)
    closing = threading.Thread(target=pool.close)
    closing.start()
    gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    for each in [held, *ranges]:
        each.check()


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
def test_empty_pool_closes(num_workers):
    pool = WorkerPool(num_workers)
    pool.close()
    assert not any(thread.is_alive() for thread in pool._threads)
    pool.close()  # again: nothing left to do


def cpus_of(num_workers):
    """The CPUs that each thread of a pool may run on."""
    pool = WorkerPool(num_workers)
    together, found = threading.Barrier(num_workers), []

    def look():
        together.wait(PATIENCE)
        found.append(os.sched_getaffinity(0))

    one = Range(num_workers, before=look)
    one.submit(pool)
    assert one.ended.wait(PATIENCE)
    pool.close()
    return found


def test_each_thread_on_its_own_cpu():
    own = os.sched_getaffinity(0)
    found = cpus_of(len(own))
    assert sorted(cpu for cpus in found for cpu in cpus) == sorted(own)
    assert os.sched_getaffinity(0) == own  # the caller is left alone


def test_more_threads_than_cpus():
    """Two threads bound to one CPU while another idles would be worse than none bound."""
    own = os.sched_getaffinity(0)
    assert cpus_of(len(own) + 1) == [own] * (len(own) + 1)


def test_a_range_without_units_ends_at_once():
    pool = WorkerPool(2)
    ended = []
    pool.submit(UnitRange(3, 3), lambda units: None, lambda: ended.append(True))
    assert ended == [True]
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(UnitRange(0, 1), lambda units: None, lambda: None)
