"""Opening a drive: the map from what the flash holds, with no help from anything that could be stale.

Every programmed page says in its OOB which LBA it holds, in which version, and how far programming was
durable when it was programmed. So:

1. Read the OOB of all superblocks that hold anything; a record counts if its own checksum holds.
2. Pages programmed after what their session knew to be durable may be torn: read them, and drop those
   whose payload does not match. An older version of their LBA shows through. Of durable pages that are gone it
   must not: parity or the page behind (page_chain.py) says what they were.
3. The highest version of each LBA wins; then the log's deallocations drop versions older than they are.

A checkpoint (checkpoint.py) saves most of step 1: superblocks that it knows and that were not written since are
not read, and the map starts from its own.

Sessions (one per opening that changed the drive) are told apart because a later session's durability
says nothing of an earlier one's torn pages, which lie on the flash until their superblock is erased.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ftl import checkpoint, deallocation_log, oob, page_chain
from ftl.checkpoint import Checkpoint
from ftl.deallocation_log import LogPage
from ftl.layout import PAGE_OOB, SESSION, PageKind
from ftl.mapping import Mapping
from ftl.media import FlashMedia
from ftl.parity import lost_records, unprotected_groups
from ftl.provisioning import num_lbas
from ftl.repair import repair_page
from spdk_glue import dma

log = logging.getLogger(__name__)

VERIFY_BYTES = 8 << 20  # payload read at a time while torn pages are looked for
PROTECTED_PAGES = 4096  # beyond those that are durable without a page that says so, nobody was promised them


@dataclass
class Recovered:
    """What was found out.

    fill: int64 [num_superblocks], pages up to the last programmed one; first, newest: their lowest and highest
    program number
    last_stream: stream of that page, where it is not all of the superblock's, by superblock
    superseded_log: superblocks of the log that are older than its newest snapshot, so not needed
    durable_numbers: the last program number that was durable in each earlier session
    checkpoint: the one that was built upon, None after a scan of everything
    unprotected_groups: int64, rows of dies (page // num_dies) that a cut has left without redundancy; without
        parity, those that no later page calls durable: damage would pass for a write that was torn
    is_log_unprotected: whether pages of the metadata log that say something are among them
    """

    mapping: Mapping
    fill: np.ndarray
    first: np.ndarray
    newest: np.ndarray
    last_stream: dict[int, int] = field(default_factory=dict)
    log_superblocks: list[int] = field(default_factory=list)
    superseded_log: list[int] = field(default_factory=list)
    checkpoint_superblocks: list[int] = field(default_factory=list)
    next_sequence_number: int = 1
    next_program_number: int = 1
    session: int = 1
    durable_numbers: dict[int, int] = field(default_factory=dict)
    torn_pages: int = 0
    scanned_superblocks: int = 0
    checkpoint: Checkpoint | None = None
    unprotected_groups: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    is_log_unprotected: bool = False


def recover(media: FlashMedia, progress: Callable[[int, int], None] | None = None) -> Recovered:
    """The map of a drive that was used before.

    progress: called with (superblocks scanned, superblocks to scan). Raises MediaIoError.
    """
    geometry = media.geometry
    mapping = Mapping(num_lbas(geometry), geometry.num_superblocks, geometry.pages_per_superblock)
    nothing = np.zeros(geometry.num_superblocks, np.int64)
    found = Recovered(mapping, nothing, nothing.copy(), nothing.copy())
    programmed = media.programmed_superblocks()
    heads = _heads(media, programmed)
    found.checkpoint_superblocks = programmed[heads["kind"] == PageKind.CHECKPOINT].tolist()
    found.checkpoint = _load_checkpoint(media, found.checkpoint_superblocks, mapping)
    known = _take_over_checkpoint(found, programmed, heads)
    records, pages, gone, gone_pages = _scan(media, programmed[~known], found, progress)
    versions = mapping.start_recovery()
    if found.checkpoint is not None:
        _take_over_map(found, geometry.pages_per_superblock, programmed[known], records, pages)
    if not len(records):
        mapping.finish_recovery()
        return found
    durable_numbers = _durable_numbers(media, records, pages, found)
    doubtful = _doubtful(records, durable_numbers)
    # rows that may have been cut short: by the power, or by a program that failed
    has_failed = media.bad_blocks().any(axis=1)[pages // geometry.pages_per_superblock]
    begun_groups = pages[doubtful | has_failed] // geometry.num_dies
    good = _whole(media, records, pages, doubtful, found)
    records, pages, doubtful = records[good], pages[good], doubtful[good]
    durable = ~_doubtful(gone, durable_numbers)
    lost, lost_pages = gone[durable], gone_pages[durable]
    if len(lost):  # a copy of the same version that is whole makes up for one that is gone
        is_lost = ~np.isin(page_chain.keys(lost), page_chain.keys(records))
        lost, lost_pages = lost[is_lost], lost_pages[is_lost]
    if geometry.parity:
        # all others had their parity before anything was called durable: what lacks there is damage
        weak = unprotected_groups(geometry, records, pages)
        found.unprotected_groups = np.intersect1d(begun_groups, weak)
        by_parity, places = lost_records(geometry, records, pages)
        _number_behind(found, by_parity)
        lost, lost_pages = np.concatenate([lost, by_parity]), np.concatenate([lost_pages, places])
        superblocks, indices = np.divmod(places, geometry.pages_per_superblock)
        np.maximum.at(found.fill, superblocks, indices + 1)
        with_log = set(superblocks[_of_log(by_parity)].tolist())
        found.log_superblocks += sorted(with_log - {*found.log_superblocks, *found.checkpoint_superblocks})
    else:
        untold = pages[doubtful][np.argsort(records["program_number"][doubtful], kind="stable")]
        found.unprotected_groups = np.unique(untold[:PROTECTED_PAGES] // geometry.num_dies)
    # of equals those that are there count
    records, pages = np.concatenate([lost, records]), np.concatenate([lost_pages, pages])
    # a copy is programmed after its original: of equal versions it comes last, and counts
    order = np.argsort(records["program_number"], kind="stable")
    records, pages = records[order], pages[order]
    data = (records["kind"] == PageKind.DATA) & (records["lba"] < len(mapping))
    if found.checkpoint is not None:
        # what was programmed before the checkpoint is in its map, or was superseded by then
        data &= records["program_number"] > found.checkpoint.program_number
    mapping.recover_pages(
        versions,
        records["lba"][data].astype(np.int64),
        records["sequence_number"][data].astype(np.uint64),
        pages[data],
    )
    of_log = _of_log(records) & (records["kind"] != PageKind.SESSIONS)  # which have been read
    log_records, log_pages = records[of_log], pages[of_log]
    log_content = _read_log(media, log_records, log_pages)
    needed = np.array([page for page, content in log_content.items() if content.says_something], np.int64)
    if geometry.parity:
        found.is_log_unprotected = bool(np.isin(needed // geometry.num_dies, found.unprotected_groups).any())
    else:
        found.is_log_unprotected = bool(np.isin(needed, untold).any())
    from_number = found.checkpoint.sequence_number if found.checkpoint else 0
    snapshot_number = _apply_log(mapping, versions, list(log_content.values()), from_number)
    mapping.finish_recovery()
    # An erase that a power cut undid in part leaves metadata of an earlier life beside new data. What is mapped
    # makes it a superblock of data: others are erased as a whole once their metadata are replaced.
    for superblocks in (found.log_superblocks, found.checkpoint_superblocks):
        superblocks[:] = [s for s in superblocks if not mapping.valid_pages[s]]
    _set_apart_superseded(found, log_records, log_pages // geometry.pages_per_superblock, snapshot_number)
    return found


def _set_apart_superseded(found: Recovered, records, superblocks: np.ndarray, snapshot_number: int) -> None:
    """Of the log's superblocks, those that are older than its newest snapshot. records: all of the log."""
    snapshot = (records["sequence_number"] == snapshot_number) & (records["kind"] == PageKind.MAPPING_SNAPSHOT)
    # one that lies in a superblock of data goes when that is collected
    if not snapshot.any() or not np.isin(superblocks[snapshot], found.log_superblocks).all():
        return
    first = records["program_number"][snapshot].min()
    found.superseded_log = [s for s in found.log_superblocks if found.newest[s] < first]
    found.log_superblocks = [s for s in found.log_superblocks if found.newest[s] >= first]


def _of_log(records: np.ndarray) -> np.ndarray:
    """bool: pages of the metadata log."""
    return np.isin(records["kind"], (PageKind.DEALLOCATE, PageKind.MAPPING_SNAPSHOT, PageKind.SESSIONS))


def _heads(media: FlashMedia, superblocks: np.ndarray) -> np.ndarray:
    """PAGE_OOB [n]: of each superblock's first page that is not parity; zeros where that does not hold."""
    geometry = media.geometry
    good = ~media.bad_blocks()[superblocks]
    # in the first row the first good plane of a die has the parity
    place = np.argmax(np.cumsum(good, axis=1) == 1 + geometry.parity, axis=1)
    heads = media.read_oob_pages(superblocks * geometry.pages_per_superblock + place)
    heads[~oob.holds(heads)] = np.zeros((), PAGE_OOB)
    return heads


def _load_checkpoint(media: FlashMedia, superblocks: list[int], mapping: Mapping) -> Checkpoint | None:
    page_size = media.geometry.page_size
    all_pages = []
    for superblock in superblocks:
        records = media.read_oob(superblock)
        chosen = np.flatnonzero(oob.holds(records) & (records["kind"] == PageKind.CHECKPOINT))
        pages = superblock * media.geometry.pages_per_superblock + chosen
        buffer = dma.allocate(max(1, len(pages)) * page_size).reshape(-1, page_size)
        crc32c = media.read(pages, dma.page_addresses(buffer, page_size)[: len(pages)])
        all_pages.append(buffer[: len(pages)][crc32c == records["payload_crc32c"][chosen]])
    if not all_pages:
        return None
    found = checkpoint.decode(
        np.concatenate(all_pages), len(mapping), media.geometry.num_superblocks, mapping.entry_dtype
    )
    if found is None:
        log.info("no whole checkpoint: every page's OOB is read")
    return found


def _take_over_checkpoint(found: Recovered, programmed: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """bool: which of the programmed superblocks hold what the checkpoint says, and nothing newer."""
    if found.checkpoint is None:
        return np.zeros(len(programmed), bool)
    table = found.checkpoint.superblocks[programmed]
    numbers = heads["program_number"]
    same = (table["fill"] > 0) & (heads["magic"] != 0)
    same &= (table["first_program_number"] <= numbers) & (numbers <= table["newest_program_number"])
    known = same & (table["is_closed"] != 0)
    superblocks = programmed[known]
    found.fill[superblocks] = table["fill"][known]
    found.first[superblocks] = table["first_program_number"][known]
    found.newest[superblocks] = table["newest_program_number"][known]
    found.log_superblocks.extend(superblocks[_of_log(heads[known])].tolist())
    found.next_sequence_number = found.checkpoint.sequence_number
    found.next_program_number = found.checkpoint.program_number + 1
    found.session = found.checkpoint.session + 1
    return known


def _take_over_map(found: Recovered, per_superblock: int, known: np.ndarray, records, pages) -> None:
    """The checkpoint's map, without what has been erased since."""
    taken = found.checkpoint
    table = taken.superblocks
    alive = np.zeros(len(table), bool)
    alive[known] = True
    # one that was being written is still the same if it shows a page of that life
    superblocks = pages // per_superblock
    numbers = records["program_number"]
    same = (table["first_program_number"][superblocks] <= numbers) & (table["fill"][superblocks] > 0)
    same &= numbers <= table["newest_program_number"][superblocks]
    alive[superblocks[same]] = True
    found.mapping.take_over(taken.entries, alive)


def _scan(
    media: FlashMedia, superblocks: np.ndarray, found: Recovered, progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All OOB records that hold, and their pages; those of pages that are gone, without parity; notes counters
    and fill in `found`."""
    per_superblock = media.geometry.pages_per_superblock
    bad_planes = media.bad_blocks()
    all_records, all_pages = [np.empty(0, PAGE_OOB)], [np.empty(0, np.int64)]
    all_gone, all_gone_pages = [np.empty(0, PAGE_OOB)], [np.empty(0, np.int64)]
    for number, superblock in enumerate(superblocks.tolist()):
        if progress is not None:
            progress(number, len(superblocks))
        records = media.read_oob(superblock)
        programmed = np.flatnonzero(records["magic"] != 0)
        if not len(programmed):
            continue
        # a block that could not be erased shows what it held in an earlier life
        is_bad = np.tile(bad_planes[superblock], media.geometry.pages_per_erase_block)
        on_good = programmed[~is_bad[programmed]]
        found.fill[superblock] = on_good[-1] + 1 if len(on_good) else 0
        holds = oob.holds(records)
        gone, indices = page_chain.vanished(records, holds, is_bad)
        all_gone.append(gone)
        all_gone_pages.append(superblock * per_superblock + indices)
        records, holds = records[programmed], holds[programmed]
        all_records.append(records[holds])
        all_pages.append(superblock * per_superblock + programmed[holds])
        if not holds.any():
            continue
        records = records[holds]
        found.first[superblock] = records["program_number"].min()
        found.newest[superblock] = records["program_number"].max()
        if superblock in found.checkpoint_superblocks:
            pass  # whatever a bad block has kept of an earlier life
        elif _of_log(records).any():
            found.log_superblocks.append(superblock)
        elif (records["kind"] == PageKind.CHECKPOINT).any():
            found.checkpoint_superblocks.append(superblock)
        elif found.fill[superblock] < per_superblock:
            data = records[records["kind"] == PageKind.DATA]
            if len(data):
                found.last_stream[superblock] = int(data["stream"][-1])
    found.scanned_superblocks = len(superblocks)
    records, pages = np.concatenate(all_records), np.concatenate(all_pages)
    _number_behind(found, records)
    gone = np.concatenate(all_gone)
    page_chain.complete_versions(gone, found.next_sequence_number)
    return records, pages, gone, np.concatenate(all_gone_pages)


def _number_behind(found: Recovered, records) -> None:
    """What comes next has higher numbers than these."""
    versions = records["sequence_number"][records["kind"] != PageKind.PARITY]  # there it is an XOR
    found.next_sequence_number = max(found.next_sequence_number, int(versions.max(initial=0)) + 1)
    found.next_program_number = max(
        found.next_program_number, int(records["program_number"].max(initial=0)) + 1
    )
    found.session = max(found.session, int(records["session"].max(initial=0)) + 1)


def _doubtful(records, durable: dict[int, int]) -> np.ndarray:
    """bool: the records of pages that no later one of their session calls durable."""
    sessions, which = np.unique(records["session"], return_inverse=True)
    newest = np.array([durable[session] for session in sessions.tolist()], np.uint64)
    return records["program_number"] > newest[which]


def _durable_numbers(media: FlashMedia, records, pages, found: Recovered) -> dict[int, int]:
    """By session, the last program number that is known to have been durable; in `found` those still needed."""
    sessions, which = np.unique(records["session"], return_inverse=True)
    newest = np.zeros(len(sessions), np.uint64)
    np.maximum.at(newest, which, records["durable_program_number"])
    durable = dict(zip(sessions.tolist(), newest.tolist(), strict=True))
    known = [(found.checkpoint.session, found.checkpoint.program_number)] if found.checkpoint else []
    of_sessions = records["kind"] == PageKind.SESSIONS
    for content in _read_log(media, records[of_sessions], pages[of_sessions]).values():
        table = content.records.view(SESSION)
        known += zip(table["session"].tolist(), table["durable_program_number"].tolist(), strict=True)
    for session, number in known:
        durable[session] = max(durable.get(session, 0), number)
    oldest = found.first[found.fill > 0].min(initial=found.next_program_number)
    found.durable_numbers = {session: number for session, number in durable.items() if number >= oldest}
    return durable


def _whole(media: FlashMedia, records, pages, doubtful: np.ndarray, found: Recovered) -> np.ndarray:
    """bool: the records whose payload is known, or now seen, to be whole."""
    # a failed program leaves anything behind, and its block is marked bad before it is durable
    superblocks, indices = np.divmod(pages, media.geometry.pages_per_superblock)
    doubtful = doubtful | media.bad_blocks()[superblocks, indices % media.geometry.num_planes]
    doubtful = np.flatnonzero(doubtful)
    good = np.ones(len(records), bool)
    page_size = media.geometry.page_size
    step = max(1, VERIFY_BYTES // page_size)
    buffer = dma.allocate(min(step, max(len(doubtful), 1)) * page_size)
    addresses = dma.page_addresses(buffer, page_size)
    for start in range(0, len(doubtful), step):
        part = doubtful[start : start + step]
        crc32c = media.read(pages[part], addresses[: len(part)])
        good[part] = crc32c == records["payload_crc32c"][part]
    found.torn_pages = int(np.count_nonzero(~good))
    if found.torn_pages:
        log.info("recovery dropped %d pages torn by a power cut", found.torn_pages)
    return good


def _read_log(media: FlashMedia, records, pages) -> dict[int, LogPage]:
    """The metadata pages by where they are, in the order they were programmed."""
    if not len(pages):
        return {}
    page_size = media.geometry.page_size
    order = np.argsort(records["program_number"])
    buffer = dma.allocate(len(pages) * page_size).reshape(len(pages), page_size)
    crc32c = media.read(pages[order], dma.page_addresses(buffer, page_size))
    whole = crc32c == records["payload_crc32c"][order]
    for position in np.flatnonzero(~whole).tolist():
        record = records[order[position]]
        page, address = int(pages[order[position]]), dma.address_of(buffer[position])
        whole[position] = repair_page(media, page, int(record["lba"]), address)
    if not whole.all():
        log.error("%d pages of the deallocation log fail their checksum", np.count_nonzero(~whole))
    decoded = {}
    for position in np.flatnonzero(whole):
        record, page = records[order[position]], int(pages[order[position]])
        content = deallocation_log.decode(PageKind(record["kind"]), buffer[position])
        if content is None:
            log.error("page %d of the deallocation log is malformed", page)
            continue
        decoded[page] = content
    return decoded


def _apply_log(mapping: Mapping, versions: np.ndarray, pages: list[LogPage], from_number: int) -> int:
    """Deallocations with versions from `from_number` on: a checkpoint's map knows those before it. Returns the
    version of the newest snapshot, or 0."""
    snapshot_number, snapshot = deallocation_log.newest_snapshot(pages)
    later = [page for page in pages if page.kind == PageKind.DEALLOCATE]
    for page in snapshot + later:
        for lba, count, sequence_number in page.records.tolist():
            if page.kind == PageKind.DEALLOCATE and sequence_number < snapshot_number:
                continue
            if sequence_number < from_number:
                continue
            mapping.recover_deallocation(versions, lba, count, sequence_number)
    return snapshot_number
