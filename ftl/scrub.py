"""Reading everything that is mapped, before anybody needs it.

What only parity could give back is written anew elsewhere with the rest of its superblock, so that the next
fault in its row costs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ftl.errors import CorruptPage
from ftl.mapping import PAGE_NONE
from spdk_glue import dma

PAGES_AT_ONCE = 1024


@dataclass
class ScrubProgress:
    """pages_read so far; repaired, lost: LBAs found since the last report."""

    pages_read: int
    repaired: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)


def scrub(ftl) -> Iterator[ScrubProgress]:
    """Read and, where it can be, renew; a report per batch. ftl: FlashTranslationLayer."""
    buffer = dma.allocate(PAGES_AT_ONCE * ftl.page_size)
    addresses = dma.page_addresses(buffer, ftl.page_size)
    pages_read = 0
    damaged: set[int] = set()
    for first in range(0, ftl.num_lbas, PAGES_AT_ONCE):
        lbas = np.arange(first, min(first + PAGES_AT_ONCE, ftl.num_lbas))
        with ftl.read_guard():
            pages = ftl.resolve(lbas)
            mapped = pages != PAGE_NONE
            lbas, pages = lbas[mapped], pages[mapped]
            if not len(lbas):
                continue
            report = ScrubProgress(pages_read := pages_read + len(lbas))
            for position in _damaged(ftl, lbas, pages, addresses[: len(lbas)], report):
                damaged.add(int(pages[position]) // ftl.geometry.pages_per_superblock)
        yield report
    if damaged and not ftl.media.read_only:
        ftl.renew(damaged)


def _damaged(ftl, lbas, pages, addresses, report: ScrubProgress) -> list[int]:
    """Positions of damaged pages that could be repaired; both kinds go into the report."""
    before = ftl.counters.repaired_pages
    try:
        ftl.read_physical(pages, lbas, addresses)
        if ftl.counters.repaired_pages == before:
            return []
    except CorruptPage:
        pass  # found one by one below
    repaired = []
    for position, lba in enumerate(lbas.tolist()):
        one = slice(position, position + 1)
        before = ftl.counters.repaired_pages
        try:
            ftl.read_physical(pages[one], lbas[one], addresses[one])
        except CorruptPage:
            report.lost.append(lba)
            continue
        if ftl.counters.repaired_pages > before:
            report.repaired.append(lba)
            repaired.append(position)
    return repaired
