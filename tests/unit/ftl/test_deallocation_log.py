"""Log pages: records back as they went in, bad pages refused, the right snapshot chosen."""

import numpy as np
import pytest

from ftl import deallocation_log
from ftl.layout import DEALLOCATION, LOG_HEADER, LOG_MAGIC, PageKind
from spdk_glue import dma

PER_PAGE = 168  # of 4096 bytes


def records(count, seed=0):
    random = np.random.default_rng(seed)
    made = np.zeros(count, DEALLOCATION)
    for field in DEALLOCATION.names:
        made[field] = random.integers(0, 1 << 63, count, np.uint64)
    return made


def decoded(pages, kind=PageKind.DEALLOCATE):
    return [deallocation_log.decode(kind, page) for page in pages]


def snapshot(number, count, kind=PageKind.MAPPING_SNAPSHOT):
    """A snapshot's pages as recovery finds them."""
    return decoded(deallocation_log.encode(4096, records(count, seed=number), number), kind)


@pytest.mark.parametrize(("page_size", "count"), [(4096, PER_PAGE), (8192, 338), (16384, 680), (65536, 2728)])
def test_records_per_page(page_size, count):
    assert deallocation_log.records_per_page(page_size) == count
    assert 64 + 24 * count <= page_size < 64 + 24 * (count + 1)


@pytest.mark.parametrize("page_size", [4096, 65536])
@pytest.mark.parametrize(
    ("count", "num_pages"),
    [
        (lambda per: 0, 1),
        (lambda per: 1, 1),
        (lambda per: per, 1),
        (lambda per: per + 1, 2),
        (lambda per: 3 * per, 3),
        (lambda per: 3 * per + 5, 4),
    ],
)
def test_roundtrip(page_size, count, num_pages):
    made = records(count(deallocation_log.records_per_page(page_size)))
    pages = deallocation_log.encode(page_size, made, snapshot_sequence_number=77)
    assert (pages.shape, pages.dtype) == ((num_pages, page_size), np.uint8)
    assert dma.address_of(pages) % dma.ALIGNMENT == 0
    found = decoded(pages)
    np.testing.assert_array_equal(np.concatenate([page.records for page in found]), made)
    for part, page in enumerate(found):
        header = page.header
        assert (header["part"], header["num_parts"]) == (part, num_pages)
        assert header["snapshot_sequence_number"] == 77
        assert page.kind is PageKind.DEALLOCATE
    end = LOG_HEADER.itemsize + found[-1].records.nbytes
    assert not pages[-1, end:].any()  # nothing of other memory goes to flash


def test_bytes():
    """As FORMAT.md draws them."""
    made = np.array([(5, 6, 7), (1 << 40, 1, (1 << 64) - 1)], DEALLOCATION)
    page = deallocation_log.encode(4096, made, 9)[0].tobytes()
    assert page[:16] == b"KVLG" + bytes([2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0])
    assert page[16:24] == bytes([9]) + bytes(7)
    words = [int.from_bytes(page[start : start + 8], "little") for start in range(64, 112, 8)]
    assert words == [5, 6, 7, 1 << 40, 1, (1 << 64) - 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("magic", 0), ("magic", LOG_MAGIC + 1), ("num_records", PER_PAGE + 1), ("num_records", (1 << 32) - 1)],
)
def test_malformed_pages(field, value):
    """Whatever the page says, decoding reads nothing outside it."""
    page = deallocation_log.encode(4096, records(3))[0]
    page[:64].view(LOG_HEADER)[field] = value
    assert deallocation_log.decode(PageKind.DEALLOCATE, page) is None


@pytest.mark.parametrize("byte", [0, 255])
def test_pages_that_are_no_log(byte):
    assert deallocation_log.decode(PageKind.DEALLOCATE, np.full(4096, byte, np.uint8)) is None


def test_a_full_page_is_well_formed():
    page = deallocation_log.encode(4096, records(PER_PAGE))[0]
    assert len(deallocation_log.decode(PageKind.DEALLOCATE, page).records) == PER_PAGE


def test_no_snapshot():
    assert deallocation_log.newest_snapshot([]) == (0, [])
    assert deallocation_log.newest_snapshot(snapshot(5, 400, PageKind.DEALLOCATE)) == (0, [])


@pytest.mark.parametrize("count", [0, 1, PER_PAGE, 500])
def test_snapshot(count):
    number, pages = deallocation_log.newest_snapshot(snapshot(12, count))
    assert number == 12
    np.testing.assert_array_equal(np.concatenate([page.records for page in pages]), records(count, seed=12))


def test_parts_in_any_order():
    parts = snapshot(12, 500)
    assert len(parts) == 3
    number, pages = deallocation_log.newest_snapshot([parts[2], parts[0], parts[1]])
    assert (number, pages) == (12, parts)


def test_newest_of_several():
    old, new = snapshot(12, 500), snapshot(13, 10)
    for pages in (old + new, new + old):
        assert deallocation_log.newest_snapshot(pages) == (13, new)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_incomplete_snapshot(lost):
    """Power went while a snapshot was written: the one before it counts, in full."""
    old, new = snapshot(12, 200), snapshot(30, 500)
    del new[lost]
    assert deallocation_log.newest_snapshot(old + new) == (12, old)
    assert deallocation_log.newest_snapshot(new) == (0, [])


def test_deallocations_between():
    """Pages of both kinds in one log: only snapshots are parts of a snapshot."""
    parts = snapshot(12, 300)
    others = snapshot(12, 300, PageKind.DEALLOCATE)
    assert deallocation_log.newest_snapshot([others[0], parts[0], others[1]]) == (0, [])
    assert deallocation_log.newest_snapshot([others[0], parts[0], others[1], parts[1]]) == (12, parts)
