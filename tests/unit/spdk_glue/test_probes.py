"""Histograms, spans and request identifiers: what all that is seen of kvfs is made of."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from spdk_glue.probes import (
    BOUNDS_NS,
    LATENCY_RECORD,
    MAX_PROBES,
    MAX_UNCOUNTED,
    NUM_BUCKETS,
    Probe,
    Probes,
    from_log_page,
)
from spdk_glue.request_id import carried, current, new_request, request_name
from spdk_glue.trace import TRACE, Trace


@pytest.mark.parametrize("bucket", [0, 1, 12, NUM_BUCKETS - 2])
def test_bounds(bucket):
    """A duration in the wrong bucket makes every quantile wrong: both sides of each bound."""
    probe = Probe("host", "attend")
    probe.between(5, 5 + BOUNDS_NS[bucket] - 1)
    probe.between(5, 5 + BOUNDS_NS[bucket])
    counts = probe.as_dict()["counts"]
    assert counts[bucket] == counts[bucket + 1] == 1 and sum(counts) == 2


def test_the_longest_and_the_shortest():
    """Nothing is left out: what took no time, and what took days."""
    probe = Probe("host", "attend")
    for duration in (0, 1, 10**15):
        probe.between(0, duration)
    found = probe.as_dict()
    assert found["counts"][0] == 2 and found["counts"][-1] == 1 and found["sum_ns"] == 10**15 + 1


def test_many_threads():
    """Nothing is lost or counted twice, whoever counts meanwhile."""
    probe = Probe("host", "attend")
    each = 3 * MAX_UNCOUNTED + 17
    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(lambda: [probe.between(0, 2000) for _ in range(each)])
        seen = [sum(probe.as_dict()["counts"]) for _ in range(50)]
    assert seen == sorted(seen)
    assert probe.as_dict()["sum_ns"] == 4 * each * 2000 and probe.as_dict()["counts"][1] == 4 * each


def test_several_at_once():
    """Commands that were sent together each took as long as all."""
    probe = Probe("queue", "read")
    probe.between(0, 3000, count=7)
    assert probe.as_dict()["sum_ns"] == 21000 and sum(probe.as_dict()["counts"]) == 7


def test_memory_is_bounded():
    """Nobody reads the histogram of a drive that is never scraped."""
    probe = Probe("host", "attend")
    for _ in range(10 * MAX_UNCOUNTED):
        probe.between(0, 1)
    assert len(probe._durations) < MAX_UNCOUNTED


def test_log_page():
    """A drive elsewhere tells the same by its log page; unused records are nobody's."""
    probes = [Probe("media", "read"), Probe("queue", "worker_wait", is_wait=True)]
    probes[1].between(0, 1 << 40)
    page = Probes(*probes).log_page()
    assert page.shape == (MAX_PROBES,)
    assert from_log_page(np.frombuffer(page.tobytes(), LATENCY_RECORD)) == Probes(*probes).as_dicts()


def test_a_trace_that_is_off_keeps_nothing():
    """Its cost is one branch, and its memory none."""
    assert not TRACE.is_on
    Probe("host", "attend").between(0, 1)
    assert TRACE.stop() == []


def test_trace():
    """A ring: of too many spans the newest, and one trace at a time."""
    trace = Trace()
    assert trace.start(max_spans=3) and not trace.start()
    for number in range(5):
        trace.add("host", str(number), number, number + 1)
    assert [span.name for span in trace.stop()] == ["2", "3", "4"]
    assert trace.start() and trace.stop() == []


def test_requests_go_along():
    """A span on another thread belongs to the request that caused it; the thread's next work does not."""
    found = []
    with ThreadPoolExecutor(1) as threads:
        current.request = new_request()
        own = current.request
        threads.submit(carried(lambda: found.append(current.request))).result()
        current.request = None
        threads.submit(carried(lambda: found.append(current.request))).result()
    assert found == [own, None]
    assert request_name(own).endswith(f"-{own & 0xFFFFFFFF}") and request_name(None) is None


def test_threads_have_requests_of_their_own():
    current.request = new_request()
    try:
        found = []
        thread = threading.Thread(target=lambda: found.append(current.request))
        thread.start()
        thread.join()
        assert found == [None]
    finally:
        current.request = None
