"""The check of map against flash: every way in which they can disagree is found, and nothing else is."""

import numpy as np
import pytest

from ftl.check import Kind
from ftl.geometry import Geometry
from ftl.media_memory import MemoryMedia
from ftl.superblocks import State
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma

NUM_LBAS = 300


@pytest.fixture(params=[0, 1], ids=["plain", "parity"])
def ftl(request):
    geometry = Geometry(pages_per_erase_block=16, num_superblocks=48, parity=request.param)
    ftl = FlashTranslationLayer.format(MemoryMedia(geometry))
    for turn in range(3):  # older versions lie about
        write(ftl, np.arange(NUM_LBAS), turn)
    ftl.deallocate([(10, 5)])
    ftl.flush()
    assert ftl.check() == []
    return ftl


def write(ftl, lbas, seed=0, stream=0):
    data = dma.allocate(len(lbas) * ftl.page_size)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.size, np.uint8)
    ftl.write(lbas, dma.page_addresses(data, ftl.page_size), stream)


def entries(ftl):
    return ftl._state.mapping.entries


def kinds(ftl):
    return {finding.kind for finding in ftl.check()}


def test_whole_after_collection_and_reopening(ftl):
    """A healthy drive: no false alarm, however old its flash is."""
    random = np.random.default_rng(5)
    for turn in range(60):
        write(ftl, random.integers(0, ftl.num_lbas, 200), turn, stream=turn % 3)
    assert ftl.counters.gc_pages_written
    assert ftl.check() == []
    ftl.close()
    again = FlashTranslationLayer.open(ftl.media)
    assert again.check() == []
    write(again, random.integers(0, again.num_lbas, 200))
    assert again.check() == []


def test_wrong_lba(ftl):
    """Two LBAs swapped in the map: each would read the other's data."""
    found = entries(ftl)
    found[[50, 60]] = found[[60, 50]]
    findings = ftl.check()
    wrong = {(f.lba, f.found) for f in findings if f.kind == Kind.WRONG_LBA}
    assert wrong == {(50, 60), (60, 50)}


def test_mapped_twice(ftl):
    entries(ftl)[60] = entries(ftl)[50]
    twice = [f for f in ftl.check() if f.kind == Kind.MAPPED_TWICE]
    assert [(f.expected, f.found) for f in twice] == [(50, 60)]


def test_superseded(ftl):
    """An LBA mapped to an older version: the next opening would bring other data."""
    state = ftl._state
    for superblock in state.media.programmed_superblocks().tolist():
        records = state.media.read_oob(superblock)
        old = np.flatnonzero((records["lba"] == 77) & (records["kind"] == 1))
        for index in old.tolist():
            page = superblock * state.pages_per_superblock + index
            if page != int(entries(ftl)[77]) - 1:
                newest, entries(ftl)[77] = int(entries(ftl)[77]) - 1, page + 1
                found = [f for f in ftl.check() if f.kind == Kind.SUPERSEDED]
                assert [(f.lba, f.page, f.found) for f in found] == [(77, page, newest)]
                return
    raise AssertionError("no older version of the LBA is left")


def test_valid_pages(ftl):
    state = ftl._state
    superblock = int(np.argmax(state.mapping.valid_pages))
    state.mapping.valid_pages[superblock] += 3
    (finding,) = ftl.check()
    assert (finding.kind, finding.superblock, finding.found - finding.expected) == (
        Kind.VALID_PAGES,
        superblock,
        3,
    )


def test_outside_data(ftl):
    """A mapped page in a superblock that is free, and one that was never programmed."""
    state = ftl._state
    superblock = int(np.argmax(state.mapping.valid_pages))
    state.superblocks.states[superblock] = State.FREE
    assert {Kind.OUTSIDE_DATA, Kind.NOT_ERASED} <= kinds(ftl)


def test_oob_lost(ftl):
    """A mapped page whose OOB is gone: with parity it follows from its row."""
    ftl.close()
    page = int(entries(ftl)[42]) - 1
    media = ftl.media
    superblock, index = divmod(page, ftl.geometry.pages_per_superblock)
    plain_read = media.read_oob

    def damaged(wanted):
        records = plain_read(wanted).copy()
        if wanted == superblock:
            records["lba"][index] ^= 1
        return records

    again = FlashTranslationLayer.open(media)
    media.read_oob = damaged
    lost = [(f.kind, f.lba, f.page) for f in again.check()]
    assert lost == ([] if ftl.geometry.parity else [(Kind.OOB_LOST, 42, page)])


def test_not_erased(ftl):
    """A free superblock with programmed pages: the next program in it would fail."""
    state = ftl._state
    superblock = int(np.flatnonzero(state.superblocks.fill)[0])
    if state.superblocks.states[superblock] == State.OPEN:
        ftl._writer.close({superblock})
    held = np.flatnonzero((entries(ftl).astype(np.int64) - 1) // state.pages_per_superblock == superblock)
    held = held[entries(ftl)[held] != 0]
    for lba in held.tolist():
        state.mapping.unmap(lba, 1)
    state.superblocks.states[superblock] = State.FREE
    finding = next(f for f in ftl.check() if f.kind == Kind.NOT_ERASED)
    assert finding.superblock == superblock and finding.found > 0
