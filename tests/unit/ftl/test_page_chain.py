"""Pages that the drive claimed to have written and did not: told by the page behind them, without parity."""

import numpy as np
import pytest

from ftl.direct_io.api import crc32c_records
from ftl.errors import CorruptPage
from ftl.geometry import Geometry
from ftl.layout import MAX_DISTANCE, PAGE_OOB, PREVIOUS_PAGE, PageKind
from ftl.media_memory import MemoryMedia
from ftl.page_chain import PageChain, vanished
from ftl.translation import FlashTranslationLayer
from tests.crash.pages import read_page, write_pages

GEOMETRY = Geometry(num_channels=2, dies_per_channel=2, pages_per_erase_block=8, num_superblocks=24)


@pytest.fixture
def drive():
    """A layer with an old and a new version of LBAs 0 to 9."""
    media = MemoryMedia(GEOMETRY)
    ftl = FlashTranslationLayer.format(media)
    for generation in (100, 200):
        write_pages(ftl, range(10), generation)
    return media, ftl


def lose(media, pages):
    media.oob[pages] = np.zeros((), PAGE_OOB)
    media.pages[pages] = 0


def page_of(ftl, lba):
    return int(ftl.resolve(np.array([lba]))[0])


@pytest.mark.parametrize("lba", range(9))
def test_a_lost_write_is_an_error(drive, lba):
    """The version before the lost one would be served as if it were the newest."""
    media, ftl = drive
    lose(media, page_of(ftl, lba))
    ftl.close()
    ftl = FlashTranslationLayer.open(media)
    for other in range(10):
        if other != lba:
            assert read_page(ftl, other) == 200 + other
    with pytest.raises(CorruptPage, match=f"LBA {lba} "):
        read_page(ftl, lba)
    assert [(finding.kind, finding.lba) for finding in ftl.check()] == [("oob lost", lba)]
    write_pages(ftl, [lba], 300)
    ftl.close()
    ftl = FlashTranslationLayer.open(media)
    assert read_page(ftl, lba) == 300 + lba
    assert not ftl.check()


def test_a_dead_die_is_an_error_for_each_of_its_pages(drive):
    """A quarter of the drive would be a version too old."""
    media, ftl = drive
    dead = [lba for lba in range(10) if page_of(ftl, lba) % 4 == 2]
    lose(media, slice(2, None, 4))
    ftl.close()
    ftl = FlashTranslationLayer.open(media)
    for lba in range(9):
        if lba in dead:
            with pytest.raises(CorruptPage):
                read_page(ftl, lba)
        else:
            assert read_page(ftl, lba) == 200 + lba
    assert dead


def test_a_write_in_the_wrong_place_is_found(drive):
    """What was written is there, whole, and says itself what it is."""
    media, ftl = drive
    page = page_of(ftl, 4)
    media.oob[page + 20], media.pages[page + 20] = media.oob[page], media.pages[page]
    lose(media, page)
    with pytest.raises(CorruptPage):
        read_page(ftl, 4)
    ftl.close()
    ftl = FlashTranslationLayer.open(media)
    assert [read_page(ftl, lba) for lba in range(10)] == [200 + lba for lba in range(10)]
    assert not ftl.check()


def test_what_a_power_cut_took_is_no_damage(drive):
    """Pages that were not durable: the version before is the right one, though the page behind has survived."""
    media, ftl = drive
    ftl.flush()
    write_pages(ftl, range(10), 300)
    lose(media, page_of(ftl, 3))
    ftl = FlashTranslationLayer.open(media)
    assert [read_page(ftl, lba) for lba in range(5)] == [300, 301, 302, 203, 304]
    assert not ftl.check()


def test_a_lost_page_keeps_its_error(drive):
    """Collection and further openings must neither forget it nor bring the older version back."""
    media, ftl = drive
    lose(media, page_of(ftl, 4))
    ftl.close()
    for _ in range(3):
        ftl = FlashTranslationLayer.open(media)
        for _ in range(12):
            write_pages(ftl, range(20, 60), 500)
        ftl.collect()
        with pytest.raises(CorruptPage, match="LBA 4 "):
            read_page(ftl, 4)
        ftl.close()


def test_a_deallocated_page_is_no_loss(drive):
    """An error for an LBA that holds nothing."""
    media, ftl = drive
    lose(media, page_of(ftl, 4))
    ftl.deallocate([[4, 1]])
    ftl.close()
    ftl = FlashTranslationLayer.open(media)
    assert read_page(ftl, 4) == 0
    assert not ftl.check()


def test_what_is_gone_from_before_a_checkpoint_is_no_newer_than_it():
    """Half an erase: the page behind was programmed after the checkpoint, the one that it names long before."""
    media = MemoryMedia(GEOMETRY)
    ftl = FlashTranslationLayer.format(media)
    write_pages(ftl, [4], 100)
    gone = page_of(ftl, 4)
    write_pages(ftl, [4], 200, stream=1)
    ftl.flush()
    with ftl._state.lock:
        ftl._log.checkpoint()
    write_pages(ftl, [30], 300)
    write_pages(ftl, [31], 300, stream=1)
    ftl.flush()
    with ftl._state.lock:
        ftl._log.mark(after_pages=0)
        ftl._log.sync()
    assert page_of(ftl, 30) == gone + 1
    lose(media, gone)
    ftl = FlashTranslationLayer.open(media)
    assert [read_page(ftl, lba) for lba in (4, 30, 31)] == [204, 330, 331]


def test_distance():
    """To the page before, across batches; what is more than a field holds is given as the most that it does."""
    chain = PageChain()
    records = np.zeros(4, PAGE_OOB)
    records["program_number"] = [10, 11, 500, 1 << 40]
    chain.link(records[:2])
    chain.link(records[2:])
    assert records.view(PREVIOUS_PAGE)["distance"][1:].tolist() == [1, 489, MAX_DISTANCE]


@pytest.mark.parametrize(("number", "is_gone"), [(7, True), (10, False)])
def test_another_copy_is_not_the_one_that_is_gone(number, is_gone):
    """A power cut may have torn it. The very page that is named, in the wrong place, is not gone."""
    chain, records = PageChain(), np.zeros(4, PAGE_OOB)
    records["kind"], records["lba"], records["sequence_number"] = PageKind.DATA, [9, 1, 9, 3], [5, 2, 5, 6]
    records["program_number"] = [number, 9, 10, 11]
    chain.link(records[1:])
    holds = np.array([True, True, False, True])
    found, indices = vanished(records, holds, np.zeros(4, bool))
    assert found["lba"].tolist() == [9] * is_gone
    assert indices.tolist() == [2] * is_gone


@pytest.mark.parametrize("is_torn", [False, True])
def test_a_copy_that_is_whole_makes_up_for_one_that_is_gone(drive, is_torn):
    """Of a page that is gone, what else has its version is as good, unless a power cut tore it."""
    media, ftl = drive
    ftl.flush()
    page = page_of(ftl, 4)
    with ftl._state.lock:
        ftl._log.mark(after_pages=0)
        ftl._log.sync()
    spare = int(np.flatnonzero(media.oob["magic"] == 0)[-1])
    media.oob[spare], media.pages[spare] = media.oob[page], media.pages[page]
    record = media.oob[spare : spare + 1]
    record["program_number"] -= 15
    record.view(PREVIOUS_PAGE)["lba_plus_1"] = 0
    record["oob_crc32c"] = crc32c_records(record)
    lose(media, page)
    if is_torn:
        media.pages[spare] = 0
    again = FlashTranslationLayer.open(media)
    if is_torn:
        with pytest.raises(CorruptPage, match="LBA 4 "):
            read_page(again, 4)
    else:
        assert read_page(again, 4) == 204
