"""Which OOB records are to be believed: those that hold, and those that follow from parity."""

import numpy as np

from ftl.direct_io.api import crc32c_records
from ftl.layout import OOB_MAGIC
from ftl.media import FlashMedia
from ftl.parity import lost_records


def holds(records: np.ndarray) -> np.ndarray:
    """bool [n]: PAGE_OOB [n] of programmed pages whose own checksum is right."""
    return (records["magic"] == OOB_MAGIC) & (records["oob_crc32c"] == crc32c_records(records))


def known_records(
    media: FlashMedia, superblock: int, records: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(PAGE_OOB [n], int64 [n] pages, bool [n]) of a superblock's PAGE_OOB [pages_per_superblock]: the records
    that hold and those that follow from parity; which are the latter.
    """
    whole = holds(records)
    pages = superblock * media.geometry.pages_per_superblock + np.flatnonzero(whole)
    records = records[whole]
    num_held = len(pages)
    if media.geometry.parity:
        lost, lost_pages = lost_records(media.geometry, records, pages)
        held = ~np.isin(pages, lost_pages)  # a bad block may show a page of an earlier life there
        records, pages, num_held = records[held], pages[held], np.count_nonzero(held)
        records, pages = np.concatenate([records, lost]), np.concatenate([pages, lost_pages])
    return records, pages, np.arange(len(pages)) >= num_held
