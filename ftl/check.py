"""Does the map say what the flash holds? The invariants between map, OOB and superblocks, looked at.

Payloads are not read here: that is Verify's (scrub.py). Reads and writes may go on: a snapshot of the map is
compared with flash that a read guard keeps, and only with pages that were durable when it was taken.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from ftl import oob
from ftl.layout import PageKind
from ftl.mapping import PAGE_NONE
from ftl.state import FlashState
from ftl.superblocks import State
from spdk_glue import dma

HOLDS_DATA = (State.OPEN, State.FULL, State.QUARANTINED)


class Kind(StrEnum):
    """What was found, and what `expected` and `found` are."""

    OUTSIDE_DATA = "outside data"  # mapped to a page where no data can be
    MAPPED_TWICE = "mapped twice"  # two LBAs to one page: expected and found are the LBAs
    OOB_LOST = "oob lost"  # the OOB of a mapped page does not hold, and no parity gives it back
    WRONG_LBA = "wrong lba"  # the OOB of a mapped page names another LBA
    SUPERSEDED = "superseded"  # a newer version lies at page `found`: the next opening would choose that
    VALID_PAGES = "valid pages"  # counted for a superblock, and what its table says
    NOT_ERASED = "not erased"  # a free superblock holds `found` programmed pages


@dataclass(frozen=True)
class Finding:
    kind: Kind
    superblock: int
    page: int | None = None
    lba: int | None = None
    expected: int | None = None
    found: int | None = None


def check(state: FlashState) -> list[Finding]:
    """The lock is not held; what was written before has been flushed. Raises MediaIoError."""
    with state.guards.guard():
        with state.lock:
            pages = state.mapping.resolve(np.arange(len(state.mapping)))
            valid_pages = state.mapping.valid_pages.copy()
            states, fill = state.superblocks.states.copy(), state.superblocks.fill.copy()
            durable_program_number = state.durable_program_number
        lbas = np.flatnonzero(pages != PAGE_NONE)
        return [
            *_check_places(state, lbas, pages[lbas], states, fill),
            *_check_valid_pages(state, pages[lbas], valid_pages),
            *_check_records(state, lbas, pages[lbas], states, durable_program_number),
        ]


def _check_places(state: FlashState, lbas, pages, states, fill) -> list[Finding]:
    superblocks, indices = np.divmod(pages, state.pages_per_superblock)
    known = superblocks < len(states)
    good = known.copy()
    places, indices = superblocks[known], indices[known]
    # a block that went bad keeps what it holds; `fill` is of the others
    on_bad = state.superblocks.bad_planes[places, indices % state.geometry.num_planes]
    good[known] = np.isin(states[places], HOLDS_DATA) & (on_bad | (indices < fill[places]))
    found = [
        Finding(Kind.OUTSIDE_DATA, int(superblocks[i]), int(pages[i]), int(lbas[i]))
        for i in np.flatnonzero(~good).tolist()
    ]
    order = np.argsort(pages, kind="stable")
    for i in np.flatnonzero(np.diff(pages[order]) == 0).tolist():
        page, (first, second) = int(pages[order[i]]), lbas[order[i : i + 2]].tolist()
        place = page // state.pages_per_superblock
        found.append(Finding(Kind.MAPPED_TWICE, place, page, second, expected=first, found=second))
    return found


def _check_valid_pages(state: FlashState, pages, valid_pages) -> list[Finding]:
    counted = np.bincount(pages // state.pages_per_superblock, minlength=len(valid_pages))
    return [
        Finding(Kind.VALID_PAGES, s, expected=int(counted[s]), found=int(valid_pages[s]))
        for s in np.flatnonzero(counted[: len(valid_pages)] != valid_pages).tolist()
    ]


def _check_records(state: FlashState, lbas, pages, states, durable_program_number: int) -> list[Finding]:
    """Each mapped page's OOB, and whether another page holds a newer version of its LBA."""
    found: list[Finding] = []
    order = np.argsort(pages, kind="stable")  # mapped pages by superblock
    newest = _Newest(lbas, pages, durable_program_number)
    for superblock in state.media.programmed_superblocks().tolist():
        records = state.media.read_oob(superblock)
        if states[superblock] == State.FREE:
            found.extend(_check_erased(state, superblock, records))
        with state.lock:
            unwritten = state.unwritten_parity(superblock)
        records, physical, is_lost = oob.known_records(state.media, superblock, records, unwritten)
        data = (records["kind"] == PageKind.DATA) & (records["lba"] < state.num_lbas)
        records, physical, is_lost = records[data], physical[data], is_lost[data]
        first = superblock * state.pages_per_superblock
        low, high = np.searchsorted(pages, [first, first + state.pages_per_superblock], sorter=order)
        mapped, record_lbas = order[low:high], records["lba"].astype(np.int64)
        found.extend(_compare(superblock, lbas[mapped], pages[mapped], record_lbas, physical))
        newest.add(records, physical, is_lost)
    for position in newest.superseded().tolist():
        other = int(newest.pages[position])
        if _is_whole(state, other, newest.crc32c[position]):  # torn ones never count
            place, page = int(pages[position]) // state.pages_per_superblock, int(pages[position])
            found.append(Finding(Kind.SUPERSEDED, place, page, int(lbas[position]), found=other))
    return found


def _check_erased(state: FlashState, superblock: int, records: np.ndarray) -> list[Finding]:
    good = np.tile(~state.superblocks.bad_planes[superblock], state.geometry.pages_per_erase_block)
    programmed = int(np.count_nonzero(good & (records["magic"] != 0)))
    if not programmed or state.superblocks.states[superblock] != State.FREE:  # opened since the snapshot
        return []
    return [Finding(Kind.NOT_ERASED, superblock, expected=0, found=programmed)]


def _compare(superblock: int, lbas, pages, record_lbas, record_pages) -> list[Finding]:
    """A superblock's mapped pages with what its records say."""
    order = np.argsort(record_pages)
    record_lbas, record_pages = record_lbas[order], record_pages[order]
    place = np.searchsorted(record_pages, pages)
    known = place < len(record_pages)
    known[known] = record_pages[place[known]] == pages[known]
    found = [
        Finding(Kind.OOB_LOST, superblock, int(pages[i]), int(lbas[i])) for i in np.flatnonzero(~known).tolist()
    ]
    wrong = known.copy()
    wrong[known] = record_lbas[place[known]] != lbas[known]
    for i in np.flatnonzero(wrong).tolist():
        lba, named = int(lbas[i]), int(record_lbas[place[i]])
        found.append(Finding(Kind.WRONG_LBA, superblock, int(pages[i]), lba, expected=lba, found=named))
    return found


class _Newest:
    """The page with the newest version of each mapped LBA, of those that were durable or are mapped."""

    def __init__(self, lbas: np.ndarray, mapped: np.ndarray, durable_program_number: int):
        self._lbas, self._mapped = lbas, mapped
        self._durable_program_number = durable_program_number
        self._versions = np.zeros(len(lbas), np.uint64)
        self.pages = mapped.copy()
        self.crc32c = np.zeros(len(lbas), np.uint32)
        self._seen = np.zeros(len(lbas), bool)  # those whose mapped page has a record

    def add(self, records: np.ndarray, pages: np.ndarray, is_lost: np.ndarray) -> None:
        """is_lost: those that follow from parity only. Opening may have had good reason not to believe them."""
        if not len(self._lbas):
            return
        lbas = records["lba"].astype(np.int64)
        place = np.minimum(np.searchsorted(self._lbas, lbas), len(self._lbas) - 1)
        is_mapped = self._mapped[place] == pages
        durable = records["program_number"] <= self._durable_program_number
        wanted = (self._lbas[place] == lbas) & (is_mapped | durable & ~is_lost)
        records, pages, place, is_mapped = (array[wanted] for array in (records, pages, place, is_mapped))
        # ascending, so that the last assignment stands; copies keep their version, and the mapped one counts
        order = np.lexsort((is_mapped, records["sequence_number"]))
        records, pages, place, is_mapped = (array[order] for array in (records, pages, place, is_mapped))
        known = self._versions[place]
        better = (records["sequence_number"] > known) | (is_mapped & (records["sequence_number"] == known))
        self._versions[place[better]] = records["sequence_number"][better]
        self.pages[place[better]] = pages[better]
        self.crc32c[place[better]] = records["payload_crc32c"][better]
        self._seen[place[is_mapped]] = True

    def superseded(self) -> np.ndarray:
        """int64: positions of LBAs that are mapped to an older version."""
        return np.flatnonzero(self._seen & (self.pages != self._mapped))


def _is_whole(state: FlashState, page: int, crc32c: int) -> bool:
    buffer = dma.allocate(state.page_size)
    found = state.media.read(np.array([page]), dma.page_addresses(buffer, state.page_size))
    return int(found[0]) == int(crc32c)
