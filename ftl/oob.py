"""Which OOB records are to be believed: those that hold, and those that follow from parity."""

import numpy as np

from ftl.direct_io.api import crc32c_records
from ftl.layout import OOB_MAGIC
from ftl.media import FlashMedia
from ftl.parity import ParityPages, lost_records, with_unwritten

# Far beyond what any drive lives to see; further numbers must still fit behind them.
HIGHEST = {"sequence_number": 1 << 62, "program_number": 1 << 62, "session": 1 << 31}


def holds(records: np.ndarray) -> np.ndarray:
    """bool [n]: PAGE_OOB [n] of programmed pages whose own checksum is right and whose numbers can be."""
    found = (records["magic"] == OOB_MAGIC) & (records["oob_crc32c"] == crc32c_records(records))
    for name in ("sequence_number", "program_number", "session"):
        found &= records[name] < HIGHEST[name]
    return found


def known_records(
    media: FlashMedia, superblock: int, records: np.ndarray, unwritten: ParityPages | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(PAGE_OOB [n], int64 [n] pages, bool [n]) of a superblock's PAGE_OOB [pages_per_superblock]: the records
    that hold and those that follow from parity; which are the latter. unwritten: parity that is not on flash.
    """
    whole = holds(records)
    pages = superblock * media.geometry.pages_per_superblock + np.flatnonzero(whole)
    records = records[whole]
    num_held = len(pages)
    if media.geometry.parity:
        by = with_unwritten(media.geometry, records, pages, unwritten)
        lost, lost_pages = lost_records(media.geometry, *by)
        held = ~np.isin(pages, lost_pages)  # a bad block may show a page of an earlier life there
        records, pages, num_held = records[held], pages[held], np.count_nonzero(held)
        records, pages = np.concatenate([records, lost]), np.concatenate([pages, lost_pages])
    return records, pages, np.arange(len(pages)) >= num_held
