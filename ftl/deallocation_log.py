"""Metadata pages: what a scan of the data pages alone cannot tell.

DEALLOCATE pages hold ranges given back, with the version below which they are dead. A MAPPING_SNAPSHOT
(one page or several) holds every unmapped range and supersedes the log before it, so the log never
outgrows a superblock or two. SESSIONS pages hold what was durable of earlier sessions.
"""

from dataclasses import dataclass

import numpy as np

from ftl.layout import DEALLOCATION, LOG_HEADER, LOG_MAGIC, PageKind
from spdk_glue import dma


@dataclass(frozen=True)
class LogPage:
    kind: PageKind
    header: np.void
    records: np.ndarray

    @property
    def says_something(self) -> bool:
        """Whether data would come back without it."""
        return self.kind == PageKind.MAPPING_SNAPSHOT or (
            self.kind == PageKind.DEALLOCATE and len(self.records) > 0
        )


def records_per_page(page_size: int) -> int:
    return (page_size - LOG_HEADER.itemsize) // DEALLOCATION.itemsize


def encode(page_size: int, records: np.ndarray, snapshot_sequence_number: int = 0) -> np.ndarray:
    """uint8 [num_pages, page_size]: pages that hold the records, at least one."""
    per_page = records_per_page(page_size)
    num_pages = max(1, -(-len(records) // per_page))
    pages = dma.allocate(num_pages * page_size).reshape(num_pages, page_size)
    for part in range(num_pages):
        held = records[part * per_page : (part + 1) * per_page]
        header = np.zeros(1, LOG_HEADER)
        header["magic"] = LOG_MAGIC
        header["num_records"] = len(held)
        header["part"], header["num_parts"] = part, num_pages
        header["snapshot_sequence_number"] = snapshot_sequence_number
        pages[part, : header.nbytes] = header.view(np.uint8)
        pages[part, header.nbytes : header.nbytes + held.nbytes] = held.view(np.uint8)
    return pages


def decode(kind: PageKind, page: np.ndarray) -> LogPage | None:
    """A metadata page's records, or None if it is not well formed."""
    header = page[: LOG_HEADER.itemsize].view(LOG_HEADER)[0]
    count = int(header["num_records"])
    if header["magic"] != LOG_MAGIC or count > records_per_page(len(page)):
        return None
    start = LOG_HEADER.itemsize
    return LogPage(kind, header, page[start : start + count * DEALLOCATION.itemsize].view(DEALLOCATION))


def newest_snapshot(pages: list[LogPage]) -> tuple[int, list[LogPage]]:
    """(sequence number, pages) of the newest complete snapshot; (0, []) if there is none."""
    parts: dict[int, dict[int, LogPage]] = {}
    for page in pages:
        if page.kind == PageKind.MAPPING_SNAPSHOT:
            number = int(page.header["snapshot_sequence_number"])
            parts.setdefault(number, {})[int(page.header["part"])] = page
    for number in sorted(parts, reverse=True):
        found = parts[number]
        if len(found) == int(next(iter(found.values())).header["num_parts"]):
            return number, [found[part] for part in sorted(found)]
    return 0, []
