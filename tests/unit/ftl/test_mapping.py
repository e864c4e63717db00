"""The map against a dict; recovery against "the newest version wins"."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftl.mapping import PAGE_NONE, Mapping

NUM_LBAS, NUM_SUPERBLOCKS, PER_SUPERBLOCK = 40, 6, 10


def array(values):
    return np.array(values, np.int64)


def new_map():
    return Mapping(NUM_LBAS, NUM_SUPERBLOCKS, PER_SUPERBLOCK)


def contents(mapping, num_lbas=NUM_LBAS):
    pages = mapping.resolve(np.arange(num_lbas))
    return {lba: page for lba, page in enumerate(pages.tolist()) if page != PAGE_NONE}


def check(mapping, wanted):
    """The map is `wanted`, and its counters and ranges agree."""
    assert contents(mapping) == wanted
    valid = np.bincount([page // PER_SUPERBLOCK for page in wanted.values()], minlength=NUM_SUPERBLOCKS)
    np.testing.assert_array_equal(mapping.valid_pages, valid)
    assert mapping.mapped_pages == len(wanted)
    ranges = mapping.unmapped_ranges().tolist()
    assert [lba for first, count in ranges for lba in range(first, first + count)] == [
        lba for lba in range(NUM_LBAS) if lba not in wanted
    ]
    assert all(a + n < b for (a, n), (b, _) in pairwise(ranges))  # runs are whole
    assert all(count > 0 for _, count in ranges)


def test_empty():
    mapping = new_map()
    check(mapping, {})
    assert mapping.unmapped_ranges().tolist() == [[0, NUM_LBAS]]
    assert mapping.resolve(array([3, 39])).tolist() == [PAGE_NONE] * 2
    assert len(mapping.resolve(array([]))) == 0
    assert mapping.unmap(0, NUM_LBAS) == 0


def test_full():
    mapping = new_map()
    mapping.assign(np.arange(NUM_LBAS), np.arange(NUM_LBAS)[::-1].copy())
    check(mapping, {lba: NUM_LBAS - 1 - lba for lba in range(NUM_LBAS)})
    assert mapping.unmapped_ranges().shape == (0, 2)


def test_page_zero_is_a_page():
    """Entries are page + 1: without it, the drive's first page would read as never written."""
    mapping = new_map()
    mapping.assign(array([7]), array([0]))
    check(mapping, {7: 0})
    assert mapping.unmap(7, 1) == 1
    check(mapping, {})


def test_resolve_in_any_order():
    mapping = new_map()
    mapping.assign(array([5, 6, 7]), array([50, 51, 52]))
    assert mapping.resolve(array([7, 5, 5, 8, 6])).tolist() == [52, 50, 50, PAGE_NONE, 51]


def test_overwrite():
    mapping = new_map()
    mapping.assign(array([1, 2]), array([3, 13]))
    mapping.assign(array([1]), array([25]))
    check(mapping, {1: 25, 2: 13})


def test_one_lba_twice_in_a_batch():
    """The later page counts; the earlier one is garbage at once."""
    mapping = new_map()
    mapping.assign(array([4, 4, 4]), array([9, 10, 20]))
    check(mapping, {4: 20})


def test_move():
    mapping = new_map()
    mapping.assign(array([1, 2, 3]), array([0, 1, 2]))
    mapping.move(array([1, 3]), array([0, 2]), array([55, 54]))
    check(mapping, {1: 55, 2: 1, 3: 54})


@pytest.mark.parametrize(
    ("first", "count", "forgotten"),
    [(0, 40, 3), (10, 1, 1), (10, 3, 2), (11, 0, 0), (11, 1, 0), (11, 5, 1), (13, 26, 0), (39, 1, 1)],
)
def test_unmap(first, count, forgotten):
    mapping = new_map()
    pages = {10: 1, 12: 2, 39: 59}
    mapping.assign(array(list(pages)), array(list(pages.values())))
    assert mapping.unmap(first, count) == forgotten
    check(mapping, {lba: page for lba, page in pages.items() if not first <= lba < first + count})
    assert mapping.unmap(first, count) == 0


@pytest.mark.parametrize(
    ("num_superblocks", "per_superblock", "entry"),
    [(65537, 65535, np.uint32), (65536, 65536, np.uint64), (1 << 17, 1 << 20, np.uint64)],
)
def test_entry_width(num_superblocks, per_superblock, entry):
    """The last page of flash just below and above 2**32 pages: it must not come back as another."""
    mapping = Mapping(4, num_superblocks, per_superblock)
    assert mapping.entries.dtype == entry
    last = num_superblocks * per_superblock - 1
    mapping.assign(array([0, 3]), array([last, 0]))
    assert mapping.resolve(np.arange(4)).tolist() == [last, PAGE_NONE, PAGE_NONE, 0]
    assert (mapping.valid_pages[-1], mapping.valid_pages[0], mapping.mapped_pages) == (1, 1, 2)
    mapping.move(array([0]), array([last]), array([last - 1]))
    assert mapping.resolve(array([0])).tolist() == [last - 1]
    assert mapping.unmap(0, 4) == 2
    assert mapping.mapped_pages == 0
    versions = mapping.start_recovery()
    mapping.recover_pages(versions, array([2]), np.array([5], np.uint64), array([last]))
    mapping.finish_recovery()
    assert mapping.resolve(array([2])).tolist() == [last]
    assert mapping.valid_pages[-1] == 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("assign"), st.lists(st.integers(0, NUM_LBAS - 1), max_size=6)),
        st.tuples(st.just("move"), st.integers(0, 60)),
        st.tuples(st.just("unmap"), st.tuples(st.integers(0, NUM_LBAS - 1), st.integers(0, 20))),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(STEPS)
def test_against_a_dict(steps):
    mapping, wanted = new_map(), {}

    def free_pages():
        return sorted(set(range(NUM_SUPERBLOCKS * PER_SUPERBLOCK)) - set(wanted.values()))

    for verb, argument in steps:
        if verb == "assign":
            pages = free_pages()[: len(argument)]
            mapping.assign(array(argument), array(pages))
            wanted.update(zip(argument, pages, strict=True))
        elif verb == "move":
            lbas = list(wanted)[argument % 7 :: 3]
            old, new = [wanted[lba] for lba in lbas], free_pages()[: len(lbas)]
            mapping.move(array(lbas), array(old), array(new))
            wanted.update(zip(lbas, new, strict=True))
        else:
            first, count = argument
            count = min(count, NUM_LBAS - first)
            gone = [lba for lba in wanted if first <= lba < first + count]
            assert mapping.unmap(first, count) == len(gone)
            for lba in gone:
                del wanted[lba]
        check(mapping, wanted)


def recovered(found, deallocations=()):
    """A map recovered from (lba, sequence number, page) records and (first, count, sequence number) ranges."""
    mapping = new_map()
    versions = mapping.start_recovery()
    lbas, numbers, pages = zip(*found, strict=True) if found else ((), (), ())
    mapping.recover_pages(versions, array(lbas), np.array(numbers, np.uint64), array(pages))
    for deallocation in deallocations:
        mapping.recover_deallocation(versions, *deallocation)
    mapping.finish_recovery()
    return mapping


def test_recovery_of_nothing():
    check(recovered([]), {})
    check(recovered([], [(0, NUM_LBAS, 9)]), {})


def test_newest_version_wins():
    check(recovered([(1, 5, 10), (1, 7, 11), (1, 6, 12), (2, 9, 0)]), {1: 11, 2: 0})


def test_a_copy_of_the_same_version():
    """Collection was cut: two pages of one version, equally good. The last one, as the map had it."""
    check(recovered([(1, 5, 10), (1, 5, 31)]), {1: 31})


def test_version_zero():
    check(recovered([(3, 0, 8)]), {3: 8})


def test_large_versions():
    """Numbers beyond 2**63 are numbers, not negative."""
    big = (1 << 64) - 2
    check(recovered([(1, big, 10), (1, 5, 11), (1, big - 1, 12)]), {1: 10})
    check(recovered([(1, 5, 11)], [(0, 5, big)]), {})


@pytest.mark.parametrize(("number", "survives"), [(4, True), (5, True), (6, False)])
def test_deallocation_drops_what_is_older(number, survives):
    """Versions below its number: a write of the same number came later."""
    check(recovered([(1, 5, 10), (3, 5, 11)], [(1, 1, number)]), {1: 10, 3: 11} if survives else {3: 11})


def test_deallocation_beyond_the_end():
    """Ranges of a snapshot may reach past the drive's last block."""
    check(recovered([(38, 1, 10), (39, 1, 11)], [(39, 1000, 2), (NUM_LBAS + 5, 3, 2)]), {38: 10})


FOUND = st.lists(st.tuples(st.integers(0, NUM_LBAS - 1), st.integers(0, 30)), max_size=50, unique=True)
RANGES = st.lists(
    st.tuples(st.integers(0, NUM_LBAS - 1), st.integers(0, 20), st.integers(0, 31)),
    max_size=6,
)


@settings(deadline=None)
@given(FOUND, RANGES, st.randoms(use_true_random=False))
def test_recovery_in_any_order(found, ranges, random):
    """Superblocks are scanned in the order of their numbers, which is not that of writing."""
    found = [(lba, number, page) for page, (lba, number) in enumerate(found)]
    wanted = {}
    for lba, number, page in sorted(found, key=lambda record: record[1]):
        dead = any(first <= lba < first + count and number < limit for first, count, limit in ranges)
        wanted.pop(lba, None)
        if not dead:
            wanted[lba] = page
    for _ in range(3):
        check(recovered(found, ranges), wanted)
        random.shuffle(found)
        random.shuffle(ranges)
