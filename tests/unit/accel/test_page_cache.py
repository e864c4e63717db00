"""The page cache: pins, validity, replacement, and memory that is where it says."""

import ctypes
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.page_cache import (
    _FRONT,
    _LENGTH,
    _LINE,
    _PINNED,
    _PINS,
    _PROTECTED,
    LINE_BYTES,
    NONE,
    PageCache,
)
from spdk_glue import dma

PAGE, LINE_PAGES = 4096, 16
PATIENCE = 60  # seconds until a hang is a failure


class Waiting(threading.Condition):
    """Says when somebody waits. It is set under the lock, so whoever changes the cache next comes later."""

    def __init__(self):
        super().__init__()
        self.seen = threading.Event()

    def wait(self, timeout=None):
        self.seen.set()
        return super().wait(timeout)


class NeverWaiting(threading.Condition):
    """For one thread: waiting would be for ever."""

    def wait(self, timeout=None):
        raise AssertionError("acquire waits though there is room")


def new_cache(num_lines, num_pages=1 << 14, page_size=PAGE, changed=NeverWaiting):
    cache = PageCache(num_lines * max(LINE_BYTES, page_size), page_size, num_pages)
    cache._changed = changed()
    return cache


def array(pages):
    return np.array(pages, np.int64)


def line(number, count=LINE_PAGES):
    """The pages of a line."""
    return array(range(number * LINE_PAGES, number * LINE_PAGES + count))


def word(address):
    return ctypes.c_uint64.from_address(int(address))


def touch(cache, pages):
    """Acquire, bring in what is missing, compare contents, release; returns the missing pages."""
    addresses, missing = cache.acquire(pages)
    bring_in(cache, pages, addresses, missing)
    found = [word(address).value for address in addresses]
    cache.release(pages)
    assert found == pages.tolist()
    return pages[missing].tolist()


def bring_in(cache, pages, addresses, missing):
    for position in missing:
        word(addresses[position]).value = pages[position]
    cache.mark_valid(pages[missing])


@pytest.mark.parametrize(
    ("capacity", "page_size", "line_pages", "found"),
    [
        (0, 4096, 16, 65536),
        (65535, 4096, 16, 65536),
        (200_000, 4096, 16, 3 * 65536),
        (1 << 20, 16384, 4, 1 << 20),
        (1 << 20, 65536, 1, 1 << 20),
        (300_000, 131072, 1, 2 * 131072),
    ],
)
def test_capacity(capacity, page_size, line_pages, found):
    """Whole lines, and at least one."""
    cache = PageCache(capacity, page_size, 100)
    assert (cache.line_pages, cache.capacity_bytes, cache.bytes_used) == (line_pages, found, 0)


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_addresses(page_size):
    """Inside the arena, aligned, one place per page: direct I/O and kernels go there unchecked."""
    cache = new_cache(8, page_size=page_size)
    pages = array([3, 4, 5, 200, 17, 1000, 6])
    addresses, missing = cache.acquire(pages)
    start = dma.address_of(cache._arena)
    assert addresses.dtype == np.uint64
    assert (addresses >= start).all()
    assert (addresses + np.uint64(page_size) <= start + cache.capacity_bytes).all()
    assert not (addresses % np.uint64(page_size if page_size == PAGE else dma.ALIGNMENT)).any()
    assert len(set(addresses.tolist())) == len(pages)
    np.testing.assert_array_equal(missing, range(len(pages)))
    if page_size == PAGE:
        assert np.diff(addresses[:3].astype(np.int64)).tolist() == [PAGE, PAGE]
    again, _ = cache.acquire(pages[::-1].copy())
    np.testing.assert_array_equal(again, addresses[::-1])
    for _ in range(2):
        cache.release(pages)
    assert not cache._slots[:, 1].any()


def test_last_page():
    """A drive whose last line is not whole."""
    cache = new_cache(2, num_pages=35)
    assert touch(cache, array([34, 0])) == [34, 0]
    assert touch(cache, array([34, 0])) == []
    cache.drop(32, 3)
    assert touch(cache, array([34, 0])) == [34]


def test_nothing_asked():
    cache = new_cache(1)
    addresses, missing = cache.acquire(array([]))
    assert (len(addresses), len(missing), cache.bytes_used) == (0, 0, 0)
    cache.release(array([]))
    cache.mark_valid(array([]))


def test_missing_until_marked():
    """A page is served from the cache only when it was read: page by page, not by the line."""
    cache = new_cache(4)
    pages = line(0)
    addresses, missing = cache.acquire(pages)
    assert len(missing) == LINE_PAGES
    cache.mark_valid(pages[3:5])
    again, missing = cache.acquire(pages)
    np.testing.assert_array_equal(again, addresses)
    assert missing.tolist() == [0, 1, 2, *range(5, LINE_PAGES)]
    bring_in(cache, pages, again, missing)
    assert len(cache.acquire(pages)[1]) == 0


def test_a_page_released_unread_stays_missing():
    """A failed read: the next reader must not be told that the page is there."""
    cache = new_cache(2)
    pages = array([5, 6])
    for _ in range(3):
        _, missing = cache.acquire(pages)
        assert missing.tolist() == [0, 1]
        cache.release(pages)


def test_a_page_named_twice():
    cache = new_cache(2)
    pages = array([5, 6, 5, 7, 6])
    addresses, missing = cache.acquire(pages)
    assert missing.tolist() == [0, 1, 2, 3, 4]
    assert addresses[0] == addresses[2]
    assert addresses[1] == addresses[4]
    cache.mark_valid(pages)
    cache.release(pages)
    assert not cache._slots[:, 1].any()
    assert touch(cache, array([17])) == [17]


def test_bytes_used():
    cache = new_cache(3)
    for number in range(6):
        touch(cache, line(number, count=1))
        assert cache.bytes_used == min(number + 1, 3) * LINE_BYTES


def test_pins_protect():
    """Under a scan of many times the cache, pinned pages stay, and stay where they are."""
    cache = new_cache(4)
    pinned = array([100, 101, 205])
    addresses, missing = cache.acquire(pinned)
    bring_in(cache, pinned, addresses, missing)
    for number in range(20, 120):
        touch(cache, line(number))
    again, missing = cache.acquire(pinned)
    np.testing.assert_array_equal(again, addresses)
    assert len(missing) == 0
    assert [word(address).value for address in addresses] == pinned.tolist()


def test_pins_are_counted():
    """Pinned by two commands, released by one: still pinned."""
    cache = new_cache(2)
    held, other = line(0, count=2), array([1])
    addresses, missing = cache.acquire(held)
    bring_in(cache, held, addresses, missing)
    cache.acquire(other)
    cache.release(held)
    for number in range(1, 20):
        touch(cache, line(number))
    assert cache.acquire(other)[0][0] == addresses[1]
    cache.release(other)
    cache.release(other)
    for number in [*range(1, 5)] * 3:
        touch(cache, line(number))
    assert touch(cache, held) == held.tolist()


def acquire_in_thread(cache, pages, log):
    def work():
        try:
            addresses, _ = cache.acquire(pages)
            log.append(("acquired", addresses.tolist()))
        except MemoryError:
            log.append("does not fit")

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_acquire_waits_for_pins():
    """All pinned: the next command waits, and goes on when enough is released."""
    cache = new_cache(2, changed=Waiting)
    first, second, log = line(0, count=1), line(1, count=1), []
    cache.acquire(first)
    place = cache.acquire(second)[0].tolist()
    thread = acquire_in_thread(cache, line(2, count=1), log)
    assert cache._changed.seen.wait(PATIENCE)
    log.append("released")
    cache.release(second)
    thread.join(PATIENCE)
    assert log == ["released", ("acquired", place)]


def test_a_waiting_acquire_holds_nothing():
    """Pins kept while waiting for more: two commands that wait for each other for ever."""
    cache = new_cache(2, changed=Waiting)
    held, log = line(0, count=1), []
    cache.acquire(held)
    thread = acquire_in_thread(cache, np.concatenate([line(1), line(2)]), log)
    assert cache._changed.seen.wait(PATIENCE)
    cache.acquire(line(3))  # takes the slot that the other one wanted
    cache.release(line(3))
    log.append("released")
    cache.release(held)
    thread.join(PATIENCE)
    assert [entry[0] for entry in log if entry != "released"] == ["acquired"]
    assert log[0] == "released"


def test_pages_in_the_cache_never_wait():
    """All pinned, but the wanted pages are there."""
    cache = new_cache(2)
    pages = np.concatenate([line(0), line(1)])
    addresses, missing = cache.acquire(pages)
    bring_in(cache, pages, addresses, missing)
    for part in (line(0), line(1)[3:7], pages):
        assert len(cache.acquire(part)[1]) == 0


@pytest.mark.parametrize("num_lines", [1, 4])
def test_larger_than_the_cache(num_lines):
    """An error rather than a wait for ever; nothing stays pinned, and what fits still goes."""
    cache = new_cache(num_lines)
    too_many = array(range((num_lines + 1) * LINE_PAGES))
    for _ in range(2):
        with pytest.raises(MemoryError, match=f"{len(too_many)} pages"):
            cache.acquire(too_many)
        assert not cache._slots[:, 1].any()
    assert len(touch(cache, too_many[:-LINE_PAGES])) == num_lines * LINE_PAGES
    scattered = array(range(0, (num_lines + 1) * LINE_PAGES, LINE_PAGES))
    with pytest.raises(MemoryError):
        cache.acquire(scattered)


def test_larger_than_the_cache_with_pins():
    """No release can make it fit, so it does not wait for one."""
    cache = new_cache(2)
    cache.acquire(line(7, count=1))
    with pytest.raises(MemoryError):
        cache.acquire(array(range(3 * LINE_PAGES)))


def test_more_lines_than_allowed():
    """Lines are counted, not pages or runs of them, whether they are there or not; nothing is evicted."""
    cache = new_cache(8)
    for number in range(8):
        touch(cache, line(number))
    interleaved = array([0, 16, 1, 17, 2, 800, 3, 801])
    for _ in range(2):
        with pytest.raises(MemoryError, match="more than 2 lines"):
            cache.acquire(interleaved, max_lines=2)
    assert not cache._slots[:, 1].any()
    assert touch(cache, array(range(8 * LINE_PAGES))) == []
    assert len(cache.acquire(interleaved, max_lines=3)[1]) == 2


def test_waiting_evicts_nothing():
    """What is to be evicted for a command is decided when it has room."""
    cache = new_cache(4, changed=Waiting)
    for number in range(4):
        touch(cache, line(number))
    held = array(range(2 * LINE_PAGES))
    cache.acquire(held)
    thread = acquire_in_thread(cache, array(range(8 * LINE_PAGES, 11 * LINE_PAGES)), [])
    assert cache._changed.seen.wait(PATIENCE)
    for number in range(4):
        assert touch(cache, line(number)) == []
    cache.release(held)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_hit_lines_survive_a_scan():
    """What is used again and again stays though a scan is 25 times the cache; LRU would lose it."""
    cache = new_cache(8)
    hot = [line(number) for number in range(4)]
    for _ in range(2):
        for each in hot:
            touch(cache, each)
    for number in range(10, 210):
        assert touch(cache, line(number)) == line(number).tolist()
    assert [touch(cache, each) for each in hot] == [[]] * 4


def decode(cache, num_lines, base=0, span=1, spans_pinned=1):
    """One round over lines [base, base + num_lines), pinned in spans; hits in lines."""
    hits, pinned = 0, []
    for first in range(base, base + num_lines, span):
        pages = array(range(first * LINE_PAGES, min(first + span, base + num_lines) * LINE_PAGES))
        if len(pinned) == spans_pinned:
            cache.release(pinned.pop(0))
        _, missing = cache.acquire(pages)
        cache.mark_valid(pages[missing])
        hits += len(pages) - len(missing)
        pinned.append(pages)
    for pages in pinned:
        cache.release(pages)
    return hits / LINE_PAGES


def rounds(count, *arguments, **options):
    return [decode(*arguments, **options) for _ in range(count)]


@pytest.mark.parametrize("num_lines", [9, 12, 16, 80])
def test_a_loop_larger_than_the_cache(num_lines):
    """Decoding a long context: all slots but one are hit in every round, where LRU and SIEVE hit nothing."""
    assert rounds(30, new_cache(8), num_lines) == [0] + [7] * 29


@pytest.mark.parametrize("spans_pinned", [1, 2])
@pytest.mark.parametrize("span", [8, 32, 85])
@pytest.mark.parametrize("num_lines", [257, 300, 512, 1000])
def test_a_loop_in_spans(num_lines, span, spans_pinned):
    """Pinned slots serve nothing else; what is left of the cache, and of probation, is hit."""
    hits = rounds(40, new_cache(256, num_pages=1 << 15), num_lines, span=span, spans_pinned=spans_pinned)
    assert min(hits[1:]) >= 0.8 * (256 - max(span * spans_pinned, 16))


@pytest.mark.parametrize(("span", "spans_pinned"), [(1, 1), (8, 2), (20, 2)])
@pytest.mark.parametrize("num_lines", [32, 60, 64, 80, 200])
def test_a_loop_that_moves_on(num_lines, span, spans_pinned):
    """Another sequence is decoded: it has the cache from its third round on, as if it were the first."""
    cache = new_cache(64)
    options = {"span": span, "spans_pinned": spans_pinned}
    rounds(20, cache, 100, **options)
    hits = rounds(20, cache, num_lines, base=300, **options)
    best = num_lines if num_lines <= 64 else 64 - max(span * spans_pinned, 4)
    assert min(hits[2:]) >= 0.8 * best
    if num_lines == 32:
        assert hits[2:] == [32] * 18


def test_pins_of_a_large_command_are_passing():
    """Probation that grew to two thirds of the cache gives it back."""
    cache = new_cache(64)
    rounds(5, cache, 200, span=21, spans_pinned=2)
    assert rounds(4, cache, 200, base=300)[-1] >= 56
    rounds(5, cache, 200, span=21, spans_pinned=2)
    assert rounds(100, cache, 200)[-1] >= 56


def test_lines_of_two_layers():
    """Lines shared by layers, each of which wants its half soon after the other: that is no reuse."""
    cache = new_cache(16)
    for _ in range(30):
        hits = 0
        for first in range(0, 40, 4):
            for half in (slice(0, 8), slice(8, 16)):
                hits += sum(not touch(cache, line(number)[half]) for number in range(first, first + 4))
    assert hits >= 2 * 12


def test_other_pages_of_the_same_lines():
    """A loop moves on to pages that share lines with those of the last one."""
    cache = new_cache(16)
    rounds(5, cache, 10, base=100)
    for page in (0, 8):
        for _ in range(20):
            rounds(1, cache, 10, base=200)  # another sequence, so that all lines are evicted
        for _ in range(20):
            hits = sum(not touch(cache, line(number)[page : page + 8]) for number in range(40))
        assert hits >= 14


def test_a_line_missed_twice_outlives_idle_ones():
    cache = new_cache(3)
    for number in (0, 1, 2):  # 0 and 1 are protected, 2 is on probation
        touch(cache, line(number))
    for number in (3, 4, 3):  # 3 was away for less long than 0 and 1 have been idle
        touch(cache, line(number))
    for number in (5, 6, 7):
        touch(cache, line(number))
    assert touch(cache, line(3)) == []


def test_lines_with_priority_stay_beside_a_stream():
    """Sketches are read whole for every token; chosen pages, which change, would drive them out."""

    def turn(cache, random, has_priority):
        """Lines of the loop that were missing, with more others in between than the cache has."""
        num_missing = 0
        for number in range(40):
            _, missing = cache.acquire(line(number, 2), None, has_priority)
            cache.mark_valid(line(number, 2)[missing])
            cache.release(line(number, 2))
            num_missing += len(missing) > 0
            for other in random.integers(100, 400, 4).tolist():
                touch(cache, line(other, 1))
        return num_missing

    missing = {}
    for has_priority in (False, True):
        cache, random = new_cache(64), np.random.default_rng(0)
        missing[has_priority] = [turn(cache, random, has_priority) for _ in range(8)][-1]
    assert missing[True] <= 10 and 2 * missing[True] < missing[False]


def test_a_line_on_probation_goes_in_order_of_arrival():
    cache = new_cache(32)
    for number in range(40):
        touch(cache, line(number))
    # of the two slots on probation; the others are protected
    assert [number for number in range(40) if cache._index[number] > 0] == [*range(30), 38, 39]


def test_drop():
    """Erased pages are forgotten, those beside them are not."""
    cache = new_cache(8)
    for number in range(6):
        touch(cache, line(number))
    cache.drop(2 * LINE_PAGES, 2 * LINE_PAGES)
    for number in (0, 1, 4, 5):
        assert touch(cache, line(number)) == []
    for number in (2, 3):
        assert touch(cache, line(number)) == line(number).tolist()
    cache.drop(100 * LINE_PAGES, LINE_PAGES)  # nothing of it is there
    cache.drop(0, 1 << 14)
    assert touch(cache, line(0)) == line(0).tolist()


@pytest.mark.parametrize(
    ("first_page", "num_pages"), [(24, 24), (20, 5), (31, 1), (16, 16), (10, 30), (17, 14)]
)
def test_drop_of_parts_of_lines(first_page, num_pages):
    """Superblocks that end within lines: only what was erased is forgotten, and pins of the rest hold."""
    cache = new_cache(8)
    everything = array(range(6 * LINE_PAGES))
    touch(cache, everything)
    erased = set(range(first_page, first_page + num_pages))
    rest = array([page for page in range(6 * LINE_PAGES) if page not in erased])
    addresses, _ = cache.acquire(rest)
    cache.drop(first_page, num_pages)
    again, missing = cache.acquire(rest)
    np.testing.assert_array_equal(again, addresses)
    assert len(missing) == 0
    for _ in range(2):
        cache.release(rest)
    assert not cache._slots[:, 1].any()
    assert set(touch(cache, everything)) == erased


def test_drop_beside_a_read_under_way():
    """A neighbour's page is pinned and on its way from flash."""
    cache = new_cache(4)
    pages = array([20])
    addresses, missing = cache.acquire(pages)
    cache.drop(24, 24)
    bring_in(cache, pages, addresses, missing)
    cache.release(pages)
    assert not cache._slots[:, 1].any()
    assert touch(cache, pages) == []


def test_slots_of_dropped_lines_are_used_again():
    cache = new_cache(3)
    for turn in range(10):
        for number in range(3):
            assert len(touch(cache, line(number))) == LINE_PAGES, turn
        cache.drop(0, 3 * LINE_PAGES)
    assert touch(cache, array(range(3 * LINE_PAGES))) == list(range(3 * LINE_PAGES))


def test_drop_leaves_pins_of_others():
    cache = new_cache(2)
    addresses, missing = cache.acquire(line(0))
    bring_in(cache, line(0), addresses, missing)
    touch(cache, line(1))
    cache.drop(LINE_PAGES, LINE_PAGES)
    assert touch(cache, line(5)) == line(5).tolist()
    again, missing = cache.acquire(line(0))
    np.testing.assert_array_equal(again, addresses)
    assert len(missing) == 0


def test_clear():
    """Cold again, except for what is in use."""
    cache = new_cache(4)
    addresses, missing = cache.acquire(line(0))
    bring_in(cache, line(0), addresses, missing)
    for number in (1, 2):
        touch(cache, line(number))
    cache.clear()
    again, missing = cache.acquire(line(0))
    np.testing.assert_array_equal(again, addresses)
    assert len(missing) == 0
    for number in (1, 2):
        assert touch(cache, line(number)) == line(number).tolist()
    for _ in range(2):
        cache.release(line(0))
    cache.clear()
    cache.clear()
    assert touch(cache, array(range(4 * LINE_PAGES))) == list(range(4 * LINE_PAGES))


def test_acquire_resident():
    """All or nothing: each page mapped, valid, and in few enough lines; the pins are counted and released."""
    cache = new_cache(4)
    entries = np.zeros(100, np.uint32)
    entries[10:42] = np.arange(32) + 1  # LBAs 10 to 41: lines 0 and 1
    entries[50:52] = [33, 5]
    pages, addresses = np.empty(4, np.int64), np.empty(4, np.uint64)

    def acquire(lbas, offset=0, max_lines=4):
        lbas = array(lbas)
        return cache.acquire_resident(
            entries, lbas, offset, max_lines, pages[: len(lbas)], addresses[: len(lbas)]
        )

    assert not acquire([10])  # not there
    places, missing = cache.acquire(array(range(32)))
    bring_in(cache, array(range(32)), places, missing)
    cache.release(array(range(32)))
    assert acquire([10, 11, 41, 51])
    assert pages.tolist() == [0, 1, 31, 4]
    np.testing.assert_array_equal(addresses, places[pages])
    assert cache._slots[:, _PINS].sum() == 4
    assert acquire([0, 1], offset=10)
    assert pages[:2].tolist() == [0, 1]
    assert not acquire([10, 41], max_lines=1)
    assert not acquire([10, 49])  # not mapped
    assert not acquire([10, 50])  # a line that is not there
    assert cache._slots[:, _PINS].sum() == 6
    cache.drop(31, 1)
    assert not acquire([10, 41])
    cache.release(array([0, 1, 31, 4]))
    cache.release(array([0, 1]))
    assert not cache._slots[:, _PINS].any()
    assert cache._state[_PINNED] == 0


def test_acquire_if_here():
    """All or nothing; nothing is touched where a page is missing, or replacement would take it for used."""
    cache = new_cache(4)
    places, missing = cache.acquire(array(range(32)))
    bring_in(cache, array(range(32)), places, missing)
    cache.release(array(range(32)))
    before = cache._slots.copy(), cache._state.copy()
    assert cache.acquire_if_here(array([0, 1, 33]), 4) is None  # a line that is not there
    cache.drop(20, 1)
    before[0][:] = cache._slots
    assert cache.acquire_if_here(array([0, 19, 20]), 4) is None  # a page that is not
    for now, then in zip((cache._slots, cache._state), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert cache.acquire_if_here(array([0, 21]), 1) is None  # too many lines
    assert not cache._slots[:, _PINS].any()
    pages = array([21, 22, 3])
    np.testing.assert_array_equal(cache.acquire_if_here(pages, 2), places[pages])
    assert cache._slots[:, _PINS].sum() == 3
    cache.release(pages)
    assert not cache._slots[:, _PINS].any()


class Model:
    """A cache of six lines beside plain sets: which pages are pinned, and which may be or must be valid."""

    NUM_LINES, NUM_PAGES = 6, 12 * LINE_PAGES

    def __init__(self):
        self.cache = new_cache(self.NUM_LINES, self.NUM_PAGES)
        self.holds = []  # pages, addresses, missing
        self.valid = set()  # pages that were read, and may have been evicted since
        self.place = {}  # address of each pinned page

    def pins(self):
        return Counter(page for pages, _, _ in self.holds for page in pages.tolist())

    def pinned_lines(self):
        return {page // LINE_PAGES for page in self.pins()}

    def acquire(self, pages):
        lines = {page // LINE_PAGES for page in pages.tolist()}
        if len(lines) > self.NUM_LINES:
            with pytest.raises(MemoryError):
                self.cache.acquire(pages)
            return
        if len(lines | self.pinned_lines()) > self.NUM_LINES:
            return  # it would wait
        pinned = self.pins()
        addresses, missing = self.cache.acquire(pages)
        missing_pages = set(pages[missing].tolist())
        for page, address in zip(pages.tolist(), addresses.tolist(), strict=True):
            if page in missing_pages:
                assert not (pinned[page] and page in self.valid), "a pinned page was evicted"
            else:
                assert page in self.valid, "a page that was never read is served"
                assert word(address).value == page
            if pinned[page]:
                assert address == self.place[page], "a pinned page moved"
            self.place[page] = address
        # what is missing was evicted, if it was there
        self.valid -= missing_pages
        self.holds.append((pages, addresses, missing))
        assert len({self.place[page] for page in self.pins()}) == len(self.pins())

    def acquire_resident(self, pages):
        entries = np.zeros(self.NUM_PAGES + 5, np.uint32)
        entries[5:] = np.arange(self.NUM_PAGES) + 1
        taken, addresses = np.full(len(pages), -7, np.int64), np.empty(len(pages), np.uint64)
        pinned = self.cache._slots[:, _PINS].sum()
        if not self.cache.acquire_resident(entries, pages, 5, self.NUM_LINES, taken, addresses):
            assert self.cache._slots[:, _PINS].sum() == pinned
            return
        assert taken.tolist() == pages.tolist()
        for page, address in zip(pages.tolist(), addresses.tolist(), strict=True):
            assert page in self.valid, "a page that was never read is served"
            assert word(address).value == page
            self.place[page] = address
        self.holds.append((pages, addresses, array([])))

    def read(self, number):
        pages, addresses, missing = self.holds[number % len(self.holds)]
        missing = missing[: len(missing) - number % 3]  # some reads fail
        bring_in(self.cache, pages, addresses, missing)
        self.valid |= set(pages[missing].tolist())

    def release(self, number):
        self.cache.release(self.holds.pop(number % len(self.holds))[0])

    def drop(self, first_page, num_pages):
        erased = range(first_page, min(first_page + num_pages, self.NUM_PAGES))
        if self.pins().keys() & set(erased):
            return
        self.cache.drop(first_page, len(erased))
        self.valid -= set(erased)

    def clear(self):
        self.cache.clear()
        pinned = self.pinned_lines()
        self.valid = {page for page in self.valid if page // LINE_PAGES in pinned}

    def check(self):
        for pages, addresses, _ in self.holds:
            for page, address in zip(pages.tolist(), addresses.tolist(), strict=True):
                assert page not in self.valid or word(address).value == page
        slots, state, index = self.cache._slots, self.cache._state, self.cache._index
        pins = slots[:, _PINS]
        assert pins.sum() == self.pins().total()
        assert (pins >= 0).all()
        assert state[_PINNED] == (pins > 0).sum()
        # each slot is protected or once on probation, and the index knows its line
        waiting = np.roll(self.cache._probation, -state[_FRONT])[: state[_LENGTH]]
        assert sorted(waiting) == np.flatnonzero(slots[:, _PROTECTED] == 0).tolist()
        lines = {int(number): slot for slot, number in enumerate(slots[:, _LINE]) if number != NONE}
        assert lines == {number: entry - 1 for number, entry in enumerate(index.tolist()) if entry > 0}


PAGES = st.one_of(
    st.lists(st.integers(0, Model.NUM_PAGES - 1), min_size=1, max_size=8),
    st.tuples(st.integers(0, Model.NUM_PAGES - 1), st.integers(1, 40)).map(
        lambda run: list(range(run[0], min(run[0] + run[1], Model.NUM_PAGES)))
    ),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["acquire", "acquire_resident"]), PAGES.map(array)),
        st.tuples(st.sampled_from(["read", "release"]), st.integers(0, 20)),
        st.tuples(st.just("drop"), st.integers(0, Model.NUM_PAGES - 1), st.integers(1, 4 * LINE_PAGES)),
        st.tuples(st.just("clear")),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(STEPS)
def test_against_a_model(steps):
    """Pins, places and validity through any sequence; then all released, the whole cache is free."""
    model = Model()
    for verb, *arguments in steps:
        if verb in ("read", "release") and not model.holds:
            continue
        getattr(model, verb)(*arguments)
        model.check()
    while model.holds:
        model.release(0)
    model.check()
    model.acquire(array(range(Model.NUM_LINES * LINE_PAGES)))
    assert len(model.holds) == 1


def test_several_threads():
    """More wanted than the cache holds, from four threads: contents are right and nobody is stuck."""
    cache = new_cache(4, changed=threading.Condition)
    start, wrong = threading.Barrier(4), []

    def work(seed):
        random = np.random.default_rng(seed)
        start.wait(PATIENCE)
        for _ in range(300):
            first = int(random.integers(0, 12 * LINE_PAGES - 40))
            pages = array(range(first, first + int(random.integers(1, 33))))
            addresses, missing = cache.acquire(pages)
            bring_in(cache, pages, addresses, missing)
            if [word(address).value for address in addresses] != pages.tolist():
                wrong.append(pages)
            cache.release(pages)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert wrong == []
    assert not cache._slots[:, 1].any()
