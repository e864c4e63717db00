"""What simulation found in recovery, each on the smallest drive that shows it."""

import numpy as np
import pytest

from ftl.errors import CorruptPage, OutOfFlash
from ftl.geometry import Geometry
from ftl.layout import OOB_MAGIC, PAGE_OOB, PageKind
from ftl.mapping import PAGE_NONE
from ftl.media_memory import MemoryMedia
from ftl.oob import holds, known_records
from ftl.page_writer import GC_STREAM, LOG_RESERVE
from ftl.parity import SUMMED, _identity, lost_records
from ftl.recovery import recover
from ftl.superblocks import State
from ftl.translation import FlashTranslationLayer
from tests.crash.pages import make_pages, read_page, write_pages


def format_drive(parity):
    media = MemoryMedia(
        Geometry(num_channels=4, pages_per_erase_block=8, num_superblocks=24, spare_percent=25, parity=parity)
    )
    return media, FlashTranslationLayer.format(media)


def begin_log_anew(ftl):
    with ftl._state.lock:
        ftl._log._rotate()
    return ftl._log._log.superblocks[-1]


def lose_oob(media, pages):
    media.oob[pages] = np.zeros((), PAGE_OOB)


def old_record(lba):
    """Of a data page that was programmed before anything else."""
    record = np.zeros(1, PAGE_OOB)
    record["magic"], record["kind"], record["lba"] = OOB_MAGIC, PageKind.DATA, lba
    record["sequence_number"] = record["program_number"] = record["session"] = 1
    return record


def put_earlier_life(media, page, record, value):
    """Where an erase has left it; its checksums hold."""
    _buffer, addresses = make_pages([value], media.geometry.page_size)
    elsewhere = int(np.flatnonzero(media.oob["magic"] == 0)[-32])
    media.program(np.array([elsewhere]), addresses, record)
    media.pages[page], media.oob[page] = media.pages[elsewhere], media.oob[elsewhere]
    media.erase(elsewhere // media.geometry.pages_per_superblock)


def pages_of(media, kind):
    return np.flatnonzero(media.oob["kind"] == kind)


def test_a_log_that_only_parity_has():
    """Its superblock would pass for one of data, and what was deallocated be back once it is erased."""
    media, ftl = format_drive(parity=1)
    write_pages(ftl, range(9), 100)
    ftl.deallocate([[3, 2]])
    ftl.flush()
    superblock = begin_log_anew(ftl)
    lost = pages_of(media, PageKind.MAPPING_SNAPSHOT)
    lost = lost[lost // media.geometry.pages_per_superblock == superblock]
    lose_oob(media, lost)
    found = recover(media)
    assert superblock in found.log_superblocks
    assert (found.mapping.resolve(np.array([3, 4])) == PAGE_NONE).all()


def test_a_new_log_has_its_parity_before_the_old_one_goes():
    media, ftl = format_drive(parity=1)
    write_pages(ftl, range(9), 100)
    ftl.deallocate([[3, 2]])
    ftl.flush()
    begin_log_anew(ftl)
    snapshot = pages_of(media, PageKind.MAPPING_SNAPSHOT)[-1]
    row = np.arange(4) + snapshot // 4 * 4
    assert (media.oob["kind"][row] == PageKind.PARITY).any()


def test_what_a_checkpoint_appends_to_the_log_has_its_parity():
    """It is called durable with the rest, and so is no more looked after."""
    media, ftl = format_drive(parity=1)
    write_pages(ftl, range(9), 100)
    ftl.flush()
    ftl.deallocate([[3, 2]])
    with ftl._state.lock:
        ftl._log.checkpoint()
    row = np.arange(4) + pages_of(media, PageKind.DEALLOCATE)[-1] // 4 * 4
    assert (media.oob["kind"][row] == PageKind.PARITY).any()


def test_what_a_checkpoint_knows_has_its_parity():
    """Rows that were begun, and that recovery would not complete, since the checkpoint calls them durable."""
    media, ftl = format_drive(parity=1)
    write_pages(ftl, [5, 6], 100)
    with ftl._state.lock:
        ftl._log.checkpoint()
    page = int(ftl.resolve(np.array([5]))[0])
    assert recover(media).checkpoint is not None
    lose_oob(media, [page])
    media.pages[page] = 0
    assert read_page(FlashTranslationLayer.open(media), 5) == 105


def test_versions_of_what_only_parity_has_are_not_given_again():
    """The newest version would be that of two LBAs, and an older one of the same LBA as new."""
    media, ftl = format_drive(parity=1)
    write_pages(ftl, range(12), 100)
    ftl.flush()
    newest = int(np.argmax(np.where(media.oob["kind"] == PageKind.DATA, media.oob["sequence_number"], 0)))
    wanted = int(media.oob["sequence_number"][newest]) + 1
    lose_oob(media, newest)
    media.pages[newest] = 0
    assert recover(media).next_sequence_number >= wanted


def test_an_old_log_is_erased_at_opening():
    """A power cut between a new log and the erase of the old one, again and again, would use up the drive."""
    media, ftl = format_drive(parity=0)
    write_pages(ftl, range(9), 100)
    ftl.deallocate([[3, 2]])
    ftl.flush()
    old = ftl._log._log.superblocks[0]
    new = begin_log_anew(ftl)
    found = recover(media)
    assert (found.log_superblocks, found.superseded_log) == ([new], [old])
    again = FlashTranslationLayer.open(media)
    assert not len(np.flatnonzero(media.oob["magic"][old * 32 : (old + 1) * 32]))
    assert [read_page(again, lba) for lba in (2, 3, 5)] == [102, 0, 105]


def test_what_no_page_calls_durable_is_written_anew_at_opening():
    """Its last page would be taken for one that a power cut tore, however long ago that was."""
    media, ftl = format_drive(parity=0)
    write_pages(ftl, range(4), 100)
    ftl.flush()
    write_pages(ftl, range(4), 200)
    ftl.flush()
    again = FlashTranslationLayer.open(media)  # the power was cut
    again.close()
    media.pages[int(again._state.mapping.resolve(np.array([3]))[0]), 7] ^= 1
    with pytest.raises(CorruptPage, match="LBA 3 "):
        read_page(FlashTranslationLayer.open(media), 3)


def test_what_an_earlier_session_made_durable_stays_so():
    """Its mark is erased with the log; without another, damage would pass for a write that was torn."""
    media, ftl = format_drive(parity=0)
    for value in (100, 200):
        write_pages(ftl, range(4), value)
        ftl.close()
        ftl = FlashTranslationLayer.open(media)
    page = int(ftl.resolve(np.array([3]))[0])
    for _ in range(3):
        begin_log_anew(ftl)
        ftl.flush()
        ftl.close()
        ftl = FlashTranslationLayer.open(media)
    assert int(ftl.resolve(np.array([3]))[0]) == page
    ftl.close()
    media.pages[page, 7] ^= 1
    with pytest.raises(CorruptPage, match="LBA 3 "):
        read_page(FlashTranslationLayer.open(media), 3)


@pytest.mark.parametrize("life", ["same LBA", "another LBA"])
def test_a_page_of_an_earlier_life_beside_parity_of_this_one(life):
    """An erase that was half undone: its old content has a checksum of its own, and that may not count."""
    media, ftl = format_drive(parity=1)
    write_pages(ftl, range(9), 100)
    ftl.flush()
    page = int(ftl.resolve(np.array([4]))[0])
    put_earlier_life(media, page, old_record(4 if life == "same LBA" else 7), 55)
    again = FlashTranslationLayer.open(media)
    assert [read_page(again, lba) for lba in range(9)] == [100 + lba for lba in range(9)]


def test_a_page_of_an_earlier_life_and_a_lost_one_give_back_nothing():
    """What the parity and they come to is no page that ever was."""
    media, ftl = format_drive(parity=1)
    write_pages(ftl, range(9), 100)
    ftl.flush()
    first = int(ftl.resolve(np.array([4]))[0]) // 4 * 4
    strange, lost = [page for page in range(first, first + 4) if media.oob[page]["kind"] == PageKind.DATA][:2]
    put_earlier_life(media, strange, old_record(7), 55)
    lose_oob(media, [lost])
    pages = np.flatnonzero(holds(media.oob))
    assert not len(lost_records(media.geometry, media.oob[pages], pages)[0])


def test_parity_of_an_earlier_life_beside_pages_of_this_one():
    """On a block that went bad. Collection would take what it speaks of for what lies there."""
    media, ftl = format_drive(parity=1)
    write_pages(ftl, range(9), 100)
    ftl.flush()
    first = int(ftl.resolve(np.array([4]))[0]) // 4 * 4
    row = range(first, first + 4)
    (parity,) = [page for page in row if media.oob[page]["kind"] == PageKind.PARITY]
    page = next(page for page in row if page != parity)
    old = old_record(7)
    record = old_record(0)
    record["kind"], record["program_number"] = PageKind.PARITY, 2
    for name, summed in SUMMED.items():
        record[summed] = old[name]
    record["member_dies"], record["members_check"] = 1 << page % 4, _identity(old)
    put_earlier_life(media, parity, record, 55)
    superblock = page // media.geometry.pages_per_superblock
    records, pages, is_lost = known_records(media, superblock, media.read_oob(superblock), None)
    assert records["lba"][pages == page].tolist() == [media.oob[page]["lba"]]
    assert not is_lost.any()


def test_a_superblock_without_a_good_block_is_moved():
    """What it holds can be read, and is somebody's until it has been copied."""
    media, ftl = format_drive(parity=0)
    write_pages(ftl, range(9), 100)
    superblock = int(ftl.resolve(np.array([4]))[0]) // media.geometry.pages_per_superblock
    ftl.close()
    media.mark_bad(superblock, np.arange(media.geometry.num_planes))
    again = FlashTranslationLayer.open(media)
    assert not again.check()
    assert [read_page(again, lba) for lba in range(9)] == [100 + lba for lba in range(9)]
    again.collect()
    assert not again.valid_pages()[superblock]
    assert [read_page(again, lba) for lba in range(9)] == [100 + lba for lba in range(9)]


def test_collection_leaves_the_log_a_superblock():
    """Without one nothing could be erased any more, however much collection had emptied."""
    _media, ftl = format_drive(parity=0)
    with ftl._state.lock:
        while ftl._state.superblocks.count(State.FREE) > LOG_RESERVE:
            ftl._writer.take_free(State.OPEN)
        _buffer, addresses = make_pages([1], ftl.page_size)
        with pytest.raises(OutOfFlash):
            list(ftl._writer.append(GC_STREAM, np.array([1]), addresses))
        assert ftl._writer.take_free(State.LOG) is not None


class OrderedMedia(MemoryMedia):
    """Fails where something is programmed before the erase of its superblock was synced."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self._erased: set[int] = set()
        self.num_erases = 0

    def erase(self, superblock):
        super().erase(superblock)
        self._erased.add(superblock)
        self.num_erases += 1

    def sync(self):
        super().sync()
        self._erased.clear()

    def program(self, pages, addresses, oob, stream=0):
        assert not self._erased & set((pages // self.geometry.pages_per_superblock).tolist())
        super().program(pages, addresses, oob)


@pytest.mark.parametrize("parity", [0, 1])
def test_an_erase_is_durable_before_anything_is_programmed_there(parity):
    """A cut could leave the head of an earlier life, by which a checkpoint knows it, beside newer pages."""
    media = OrderedMedia(Geometry(num_channels=4, pages_per_erase_block=8, num_superblocks=24, parity=parity))
    ftl = FlashTranslationLayer.format(media, checkpoint_pages=200)
    random = np.random.default_rng(1)
    for number in range(400):
        first = int(random.integers(ftl.num_lbas - 12))
        write_pages(ftl, range(first, first + 12), number)
        if number % 9 == 0:
            ftl.deallocate([[first, 5]])
            ftl.flush()
    assert media.num_erases > 100


def test_streams_go_on_with_the_superblocks_that_have_most_room():
    """Collection that got one with a page left, and another begun, found no room after that page."""
    media, ftl = format_drive(parity=0)
    per_superblock = media.geometry.pages_per_superblock
    for count in (per_superblock - 1, 3):
        write_pages(ftl, range(count), 100)
        with ftl._state.lock:
            ftl._writer.close({found.superblock for found in ftl._writer._open.values()})
    ftl.close()
    opened = FlashTranslationLayer.open(media)._writer._open
    assert [opened[stream].num_left for stream in (0, GC_STREAM)] == [per_superblock - 3, 1]


def test_a_checkpoint_beside_what_a_bad_block_kept_of_a_log():
    """An erase does not touch a bad block. As one of the log and of the checkpoint, it was erased twice."""
    media, ftl = format_drive(parity=0)
    write_pages(ftl, range(40), 100)
    ftl.deallocate([[3, 2]])
    ftl.flush()
    with ftl._state.lock:
        ftl._log.checkpoint()
    ftl.close()
    log_page = pages_of(media, PageKind.DEALLOCATE)[0]
    head, *others = pages_of(media, PageKind.CHECKPOINT)
    superblock = int(head) // media.geometry.pages_per_superblock
    kept = int(head) + len(others) + 1
    media.oob[kept], media.pages[kept] = media.oob[log_page], media.pages[log_page]
    media.mark_bad(superblock, np.array([kept % media.geometry.num_planes]))
    write_pages(FlashTranslationLayer.open(media), range(40), 200)  # so that the superblock is scanned
    found = recover(media)
    assert superblock not in found.log_superblocks + found.superseded_log


class LimitedMedia(MemoryMedia):
    """Fails where more superblocks are partly programmed, and not closed, than it takes."""

    def __init__(self, geometry, limit):
        super().__init__(geometry)
        self.max_open_superblocks = limit
        self.begun: set[int] = set()
        self.num_closed = 0

    def program(self, pages, addresses, oob, stream=0):
        size = self.geometry.pages_per_superblock
        self.begun |= set((pages // size).tolist())
        assert len(self.begun) <= self.max_open_superblocks
        super().program(pages, addresses, oob, stream)
        self.begun -= set((pages[pages % size == size - 1] // size).tolist())

    def closed(self, superblock):
        self.num_closed += superblock in self.begun
        self.begun.discard(superblock)

    def erase(self, superblock):
        super().erase(superblock)
        self.begun.discard(superblock)


@pytest.mark.parametrize("limit", [4, 5, 7])
def test_no_more_superblocks_are_begun_than_the_media_take(limit):
    """Zones that are neither empty nor full are few; a layer that begins more is refused in the middle of a
    write."""
    media = LimitedMedia(
        Geometry(num_channels=1, pages_per_erase_block=16, num_superblocks=48, spare_percent=30), limit
    )
    ftl = FlashTranslationLayer.format(media, checkpoint_pages=1 << 30)
    random = np.random.default_rng(limit)
    for number in range(300):
        first = int(random.integers(ftl.num_lbas - 9))
        write_pages(ftl, range(first, first + 9), number, stream=int(random.integers(5)))
        choice = random.random()
        with ftl._state.lock:
            if choice < 0.1:
                ftl._log.checkpoint()
            elif choice < 0.2:
                ftl._log._rotate()
            elif choice < 0.25:
                ftl._writer.close(set(list(ftl._writer.superblocks)[:1]))
        ftl.flush()  # erases what is replaced
        if choice > 0.9:  # the host is gone, and another opens the drive
            ftl = FlashTranslationLayer.open(media, checkpoint_pages=1 << 30)
        elif choice > 0.8:
            ftl.deallocate([[first, 3]])
            ftl.collect(1)
    assert media.num_closed > 30
