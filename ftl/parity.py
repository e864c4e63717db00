"""Parity across dies: in every row of a superblock, one page per plane of a die is the XOR of the other dies'.

A row loses one page per group with a die, and the group gives it back. The parity page moves from die to die
with the row, as in RAID 5 (Patterson, Gibson, Katz, 1988). The OOB of a parity page holds the XOR of its
members' fields, so a lost page comes back with the LBA and version that it had; its checksum follows from
theirs.
"""

from dataclasses import dataclass

import numpy as np

from ftl.direct_io.api import crc32c_pages, xor_pages
from ftl.geometry import Geometry
from ftl.layout import PAGE_OOB, PageKind
from spdk_glue import dma

LOWER_HALF, HALF = np.uint64(0xFFFF_FFFF), np.uint64(32)
SPREAD_1, SPREAD_2 = np.uint64(0x9E37_79B9_7F4A_7C15), np.uint64(0xC2B2_AE3D_27D4_EB4F)  # odd, of even bit mix
# fields of PAGE_OOB: of a member, and of the parity page where their XOR is kept
SUMMED = {
    "lba": "lba",
    "sequence_number": "sequence_number",
    "program_number": "xor_program_number",
    "kind": "xor_kind",
    "stream": "xor_stream",
}


def parity_planes(geometry: Geometry, bad_planes: np.ndarray) -> np.ndarray:
    """int64 [pages_per_erase_block, planes_per_die]: the plane of each row's parity page for each group, -1
    where a group has fewer than two good planes. A group is the same plane of every die.
    """
    rows = np.arange(geometry.pages_per_erase_block)
    found = np.full((len(rows), geometry.planes_per_die), -1, np.int64)
    for plane_in_die in range(geometry.planes_per_die):
        planes = plane_in_die * geometry.num_dies + np.arange(geometry.num_dies)
        good = planes[~bad_planes[planes]]
        if len(good) >= 2:
            found[:, plane_in_die] = good[rows % len(good)]
    return found


@dataclass
class ParityPages:
    """Parity to be programmed: int64 [n] pages, PAGE_OOB [n], their payload."""

    pages: np.ndarray
    oob: np.ndarray
    payload: np.ndarray

    @property
    def addresses(self) -> np.ndarray:
        return dma.page_addresses(self.payload, self.payload.shape[1])

    def of(self, chosen: np.ndarray) -> "ParityPages":
        """Some of them. chosen: bool [n]."""
        return ParityPages(self.pages[chosen], self.oob[chosen], self.payload[chosen])


class ParityRows:
    """Running sums of the rows of a superblock that is being written."""

    def __init__(self, geometry: Geometry, bad_planes: np.ndarray):
        self.num_planes = geometry.num_planes
        self._num_dies = geometry.num_dies
        self._num_groups = geometry.planes_per_die
        self._page_size = geometry.page_size
        self._planes = parity_planes(geometry, bad_planes)
        self.is_parity = np.zeros(geometry.pages_per_superblock, bool)
        row, group = np.nonzero(self._planes >= 0)
        self.is_parity[row * self.num_planes + self._planes[row, group]] = True
        self._last_data = self._last_data_of_rows(bad_planes)
        self._sums = dma.allocate(self._num_groups * self._page_size).reshape(self._num_groups, -1)
        self._oob_sums = np.zeros(self._num_groups, PAGE_OOB)
        self._row = -1  # being summed; -1 for none
        self.first_number = 0  # program number of its first member
        self._before = self._row, self.first_number, self._sums, self._oob_sums  # what `undo` goes back to

    def _last_data_of_rows(self, bad_planes: np.ndarray) -> np.ndarray:
        """int64 [rows]: index of the last page for data in each row, -1 in a row without any."""
        usable = np.tile(~bad_planes, len(self._planes)) & ~self.is_parity
        by_row = usable.reshape(-1, self.num_planes)
        last = self.num_planes - 1 - np.argmax(by_row[:, ::-1], axis=1)
        return np.where(by_row.any(axis=1), np.arange(len(by_row)) * self.num_planes + last, -1)

    def add(self, indices: np.ndarray, addresses: np.ndarray, oob: np.ndarray) -> ParityPages | None:
        """Sum data pages, ascending indices in the superblock; the parity of rows that they complete."""
        self._remember()
        rows = indices // self.num_planes
        first_row = int(rows[0])
        if self._row != first_row:
            self._start(first_row)
        num_rows = int(rows[-1]) - first_row + 1
        groups, dies = np.divmod(indices % self.num_planes, self._num_dies)
        slots = (rows - first_row) * self._num_groups + groups
        sums = dma.allocate(num_rows * self._num_groups * self._page_size).reshape(-1, self._page_size)
        oob_sums = np.zeros(num_rows * self._num_groups, PAGE_OOB)
        sums[: self._num_groups] = self._sums
        oob_sums[: self._num_groups] = self._oob_sums
        xor_pages(dma.page_addresses(sums, self._page_size)[slots], addresses, self._page_size)
        for member, parity in SUMMED.items():
            np.bitwise_xor.at(oob_sums[parity], slots, oob[member].astype(PAGE_OOB[parity]))
        np.bitwise_xor.at(oob_sums["members_check"], slots, _identity(oob))
        np.bitwise_or.at(oob_sums["member_dies"], slots, _bits(dies))
        is_complete = indices[-1] >= self._last_data[rows[-1]]
        complete_rows = num_rows if is_complete else num_rows - 1
        cut = complete_rows * self._num_groups
        if is_complete:
            self._row = -1
        else:
            if self._row != int(rows[-1]) or self.first_number == 0:
                self.first_number = int(oob["program_number"][np.searchsorted(rows, rows[-1])])
            self._row = int(rows[-1])
            self._sums[:], self._oob_sums[:] = sums[cut:], oob_sums[cut:]
        return self._pages(first_row, sums[:cut], oob_sums[:cut]) if complete_rows else None

    def end_row(self) -> ParityPages | None:
        """The parity of a row that is left with fewer members."""
        if not self.is_begun:
            return None
        self._remember()
        found = self.unwritten()
        self._row = -1
        return found

    def _remember(self) -> None:
        self._before = self._row, self.first_number, self._sums.copy(), self._oob_sums.copy()

    def undo(self) -> None:
        """What was summed or ended last could not be programmed."""
        self._row, self.first_number, self._sums, self._oob_sums = self._before

    @property
    def is_begun(self) -> bool:
        """Whether a row is under way."""
        return self._row >= 0

    def unwritten(self) -> ParityPages | None:
        """The parity of the row under way, as far as it goes."""
        return self._pages(self._row, self._sums, self._oob_sums) if self.is_begun else None

    def _start(self, row: int) -> None:
        self._row, self.first_number = row, 0
        self._sums[:] = 0
        self._oob_sums[:] = np.zeros((), PAGE_OOB)

    def _pages(self, first_row: int, sums: np.ndarray, oob: np.ndarray) -> ParityPages | None:
        rows = first_row + np.arange(len(sums)) // self._num_groups
        planes = self._planes[rows, np.arange(len(sums)) % self._num_groups]
        kept = (planes >= 0) & (oob["member_dies"] != 0)
        if not kept.any():
            return None
        payload = dma.allocate(np.count_nonzero(kept) * self._page_size).reshape(-1, self._page_size)
        payload[:] = sums[kept]
        return ParityPages(rows[kept] * self.num_planes + planes[kept], oob[kept].copy(), payload)


def with_unwritten(
    geometry: Geometry, records: np.ndarray, pages: np.ndarray, unwritten: ParityPages | None
) -> tuple[np.ndarray, np.ndarray]:
    """Records that hold and their pages, with parity that is in memory only in place of the flash's."""
    if unwritten is None:
        return records, pages
    here = np.isin(pages // geometry.num_dies, unwritten.pages // geometry.num_dies)
    kept = ~(here & (records["kind"] == PageKind.PARITY))
    return np.concatenate([records[kept], unwritten.oob]), np.concatenate([pages[kept], unwritten.pages])


def _bits(dies: np.ndarray) -> np.ndarray:
    return np.uint32(1) << dies.astype(np.uint32)


def _identity(oob: np.ndarray) -> np.ndarray:
    """uint32 [n]: a hash of what a page is, and when it was programmed."""
    mixed = oob["sequence_number"] * SPREAD_1 + oob["lba"]
    mixed = (mixed ^ mixed >> HALF) * SPREAD_2 + oob["program_number"]
    return ((mixed ^ mixed >> HALF) * SPREAD_1 >> HALF).astype(np.uint32)


def _without_strangers(records, parity, member, place, bits) -> np.ndarray:
    """bool [n]: members that are what their parity summed.

    Where a group is complete but does not add up, a page of an earlier life (an erase that a power cut undid in
    part) stands where a lost member was: the one that was programmed first.
    """
    found = np.zeros(len(parity), np.uint32)
    np.bitwise_or.at(found, place, bits)
    check = np.zeros(len(parity), np.uint32)
    np.bitwise_xor.at(check, place, _identity(records[member]))
    complete = (found == records["member_dies"][parity]) & (found != 0)  # only a forged one names no members
    wrong = complete & (check != records["members_check"][parity])
    current = np.ones(len(member), bool)
    for group in np.flatnonzero(wrong):
        own = np.flatnonzero(place == group)
        current[own[np.argmin(records["program_number"][member[own]])]] = False
    return current


def _has_strayed(geometry: Geometry, numbers, pages, record: int, parity_number) -> bool:
    """Whether a page that is newer than the parity of its row came there by mistake.

    Otherwise the row is of a later life than the parity, which a bad block or an undone erase has left: then
    all of the page's block is, in ascending order.
    """
    per_superblock, num_planes = geometry.pages_per_superblock, geometry.num_planes
    first, index = divmod(int(pages[record]), per_superblock)
    own = (pages // per_superblock == first) & (pages % per_superblock % num_planes == index % num_planes)
    later = own & (pages > pages[record])
    return bool((numbers[own] < parity_number).any() or (numbers[later] < numbers[record]).any())


@dataclass
class _Membership:
    """groups: int64 [n], those with a parity page; parity: int64 [n], its record; lacking: uint32 [n], a bit
    for each die whose member is not there
    member: int64 [m], records of members; place: int64 [m], whose
    """

    groups: np.ndarray
    parity: np.ndarray
    lacking: np.ndarray
    member: np.ndarray
    place: np.ndarray


def _membership(geometry: Geometry, records: np.ndarray, pages: np.ndarray) -> _Membership:
    num_dies = geometry.num_dies
    group = pages // num_dies  # neighbours: a plane's page on every die, in one row
    is_parity = records["kind"] == PageKind.PARITY
    # the newest: a block that went bad may keep one of an earlier life
    parity = np.flatnonzero(is_parity)
    parity = parity[np.argsort(records["program_number"][parity])[::-1]]
    groups, newest = np.unique(group[parity], return_index=True)
    parity = parity[newest]
    member = np.flatnonzero(~is_parity & np.isin(group, groups))
    place = np.searchsorted(groups, group[member])
    wanted = records["member_dies"][parity].copy()
    # members come before their parity
    numbers = records["program_number"]
    older = numbers[member] < numbers[parity][place]
    is_stale = np.zeros(len(groups), bool)
    for newer in np.flatnonzero(~older).tolist():
        if not _has_strayed(geometry, numbers, pages, member[newer], numbers[parity[place[newer]]]):
            is_stale[place[newer]] = True
    wanted[is_stale] = 0
    bits = _bits(pages[member] % num_dies)
    counted = older & (bits & wanted[place] != 0)  # what a bad block kept of an earlier life is no member
    member, place, bits = member[counted], place[counted], bits[counted]
    current = _without_strangers(records, parity, member, place, bits)
    member, place, bits = member[current], place[current], bits[current]
    present = np.zeros(len(groups), np.uint32)
    np.bitwise_or.at(present, place, bits)
    lacking = wanted & ~present
    lacking[is_stale] = ~np.uint32(0)
    return _Membership(groups, parity, lacking, member, place)


def unprotected_groups(geometry: Geometry, records: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """int64: groups (page // num_dies) with a page, but not all that is needed to give it back."""
    found = _membership(geometry, records, pages)
    return np.setdiff1d(pages // geometry.num_dies, found.groups[found.lacking == 0])


def lost_records(geometry: Geometry, records: np.ndarray, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(PAGE_OOB [n], int64 [n] pages) of the pages whose OOB is lost and follows from their group.

    records, pages: all that hold, PAGE_OOB [m] and int64 [m]. A checksum follows from the others' because CRCs
    are affine: crc(a ^ b) = crc(a) ^ crc(b) ^ crc(0).
    """
    known = _membership(geometry, records, pages)
    groups, parity, lacking, member, place = vars(known).values()
    lost = np.flatnonzero((lacking != 0) & (lacking & (lacking - np.uint32(1)) == 0))
    if not len(lost):
        return np.empty(0, PAGE_OOB), np.empty(0, np.int64)
    found = np.zeros(len(lost), PAGE_OOB)
    row = np.full(len(groups), -1)
    row[lost] = np.arange(len(lost))
    kept = row[place] >= 0
    member, place = member[kept], row[place[kept]]
    chosen = records[parity[lost]]
    for name, summed in SUMMED.items():
        total = chosen[summed].copy()
        np.bitwise_xor.at(total, place, records[name][member].astype(total.dtype))
        found[name] = total
    # members come before their parity, so the upper half is known too
    number = chosen["program_number"]
    found["program_number"] += number & ~LOWER_HALF
    found["program_number"] -= np.where(
        found["program_number"] > number, LOWER_HALF + np.uint64(1), np.uint64(0)
    )
    found["payload_crc32c"] = chosen["payload_crc32c"]
    np.bitwise_xor.at(found["payload_crc32c"], place, records["payload_crc32c"][member])
    count = 1 + np.bincount(place, minlength=len(lost))
    zeros = dma.allocate(geometry.page_size)
    crc_of_zeros = crc32c_pages(dma.page_addresses(zeros, geometry.page_size), geometry.page_size)
    found["payload_crc32c"] ^= np.where(count % 2 == 0, crc_of_zeros, np.uint32(0))
    for name in ("magic", "session", "durable_program_number"):
        found[name] = chosen[name]
    # an erase that a power cut undid in part mixes lives: parity and members must belong together
    check = _identity(found)
    np.bitwise_xor.at(check, place, _identity(records[member]))
    fits = check == chosen["members_check"]
    die = np.log2(lacking[lost]).astype(np.int64)
    return found[fits], (groups[lost] * geometry.num_dies + die)[fits]
