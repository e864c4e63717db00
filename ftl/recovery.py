"""Opening a drive: the map from what the flash holds, with no help from anything that could be stale.

Every programmed page says in its OOB which LBA it holds, in which version, and how far programming was
durable when it was programmed. So:

1. Read the OOB of all superblocks that hold anything; a record counts if its own checksum holds.
2. Pages programmed after what their session knew to be durable may be torn: read them, and drop those
   whose payload does not match. An older version of their LBA shows through.
3. The highest version of each LBA wins; then the log's deallocations drop versions older than they are.

Sessions (one per opening that changed the drive) are told apart because a later session's durability
says nothing of an earlier one's torn pages, which lie on the flash until their superblock is erased.
"""

import logging
from dataclasses import dataclass, field

import numpy as np

from ftl import deallocation_log
from ftl.deallocation_log import LogPage
from ftl.direct_io.api import crc32c_records
from ftl.layout import OOB_MAGIC, PAGE_OOB, PageKind
from ftl.mapping import Mapping
from ftl.media import FlashMedia
from ftl.parity import lost_records
from ftl.provisioning import num_lbas
from spdk_glue import dma

log = logging.getLogger(__name__)

LOG_KINDS = (PageKind.DEALLOCATE, PageKind.MAPPING_SNAPSHOT, PageKind.CHECKPOINT)
VERIFY_BYTES = 8 << 20  # payload read at a time while torn pages are looked for


@dataclass
class Recovered:
    """What a scan found out.

    fill: int64 [num_superblocks], pages up to the last programmed one; newest: their highest program number
    last_stream: stream of that page, where it is not all of the superblock's, by superblock
    """

    mapping: Mapping
    fill: np.ndarray
    newest: np.ndarray
    last_stream: dict[int, int] = field(default_factory=dict)
    log_superblocks: list[int] = field(default_factory=list)
    next_sequence_number: int = 1
    next_program_number: int = 1
    session: int = 1
    torn_pages: int = 0


def recover(media: FlashMedia) -> Recovered:
    """The map of a drive that was used before. Raises MediaIoError."""
    geometry = media.geometry
    mapping = Mapping(num_lbas(geometry), geometry.num_superblocks, geometry.pages_per_superblock)
    empty = np.zeros(geometry.num_superblocks, np.int64)
    found = Recovered(mapping, empty, empty.copy())
    records, pages = _scan(media, found)
    if not len(records):
        return found
    good = _without_torn(media, records, pages, found)
    records, pages = records[good], pages[good]
    if geometry.parity:
        lost, lost_pages = lost_records(geometry, records, pages)
        records, pages = np.concatenate([records, lost]), np.concatenate([pages, lost_pages])

    data = (records["kind"] == PageKind.DATA) & (records["lba"] < len(mapping))
    log_kind = np.isin(records["kind"], (PageKind.DEALLOCATE, PageKind.MAPPING_SNAPSHOT))
    versions = mapping.start_recovery()
    mapping.recover_pages(
        versions,
        records["lba"][data].astype(np.int64),
        records["sequence_number"][data].astype(np.uint64),
        pages[data],
    )
    log_pages = _read_log(media, records[log_kind], pages[log_kind])
    _apply_log(mapping, versions, log_pages)
    mapping.finish_recovery()
    return found


def _scan(media: FlashMedia, found: Recovered) -> tuple[np.ndarray, np.ndarray]:
    """All OOB records that hold, and their pages; notes counters and fill in `found`."""
    per_superblock = media.geometry.pages_per_superblock
    bad_planes = media.bad_blocks()
    all_records, all_pages = [], []
    for superblock in media.programmed_superblocks().tolist():
        records = media.read_oob(superblock)
        programmed = np.flatnonzero(records["magic"] != 0)
        if not len(programmed):
            continue
        # a block that could not be erased shows what it held in an earlier life
        on_good = programmed[~bad_planes[superblock, programmed % media.geometry.num_planes]]
        found.fill[superblock] = on_good[-1] + 1 if len(on_good) else 0
        records = records[programmed]
        holds = (records["magic"] == OOB_MAGIC) & (records["oob_crc32c"] == crc32c_records(records))
        all_records.append(records[holds])
        all_pages.append(superblock * per_superblock + programmed[holds])
        if not holds.any():
            continue
        records = records[holds]
        found.newest[superblock] = records["program_number"].max()
        if np.isin(records["kind"], LOG_KINDS).any():
            found.log_superblocks.append(superblock)
        elif found.fill[superblock] < per_superblock:
            data = records[records["kind"] == PageKind.DATA]
            if len(data):
                found.last_stream[superblock] = int(data["stream"][-1])
    if not all_records:
        return np.empty(0, PAGE_OOB), np.empty(0, np.int64)
    records, pages = np.concatenate(all_records), np.concatenate(all_pages)
    if len(records):
        versions = records["sequence_number"][records["kind"] != PageKind.PARITY]  # there it is an XOR
        found.next_sequence_number = int(versions.max(initial=0)) + 1
        found.next_program_number = int(records["program_number"].max()) + 1
        found.session = int(records["session"].max()) + 1
    return records, pages


def _without_torn(media: FlashMedia, records, pages, found: Recovered) -> np.ndarray:
    """bool: the records whose payload is known, or now seen, to be whole."""
    sessions, which = np.unique(records["session"], return_inverse=True)
    durable = np.zeros(len(sessions), np.uint64)
    np.maximum.at(durable, which, records["durable_program_number"])
    doubtful = np.flatnonzero(records["program_number"] > durable[which])
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


def _read_log(media: FlashMedia, records, pages) -> list[LogPage]:
    """The metadata pages in the order they were programmed."""
    if not len(pages):
        return []
    page_size = media.geometry.page_size
    order = np.argsort(records["program_number"])
    buffer = dma.allocate(len(pages) * page_size).reshape(len(pages), page_size)
    crc32c = media.read(pages[order], dma.page_addresses(buffer, page_size))
    whole = crc32c == records["payload_crc32c"][order]
    if not whole.all():
        log.error("%d pages of the deallocation log fail their checksum", np.count_nonzero(~whole))
    decoded = []
    for position in np.flatnonzero(whole):
        record = records[order[position]]
        page = deallocation_log.decode(PageKind(record["kind"]), buffer[position])
        if page is None:
            log.error("page %d of the deallocation log is malformed", pages[order[position]])
            continue
        decoded.append(page)
    return decoded


def _apply_log(mapping: Mapping, versions: np.ndarray, pages: list[LogPage]) -> None:
    snapshot_number, snapshot = deallocation_log.newest_snapshot(pages)
    later = [page for page in pages if page.kind == PageKind.DEALLOCATE]
    for page in snapshot + later:
        for lba, count, sequence_number in page.records.tolist():
            if page.kind == PageKind.DEALLOCATE and sequence_number < snapshot_number:
                continue
            mapping.recover_deallocation(versions, lba, count, sequence_number)
