"""Reading everything that is mapped, before anybody needs it.

What only parity could give back is written anew elsewhere with the rest of its superblock, so that the next
fault in its row costs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ftl.errors import CorruptPage, MediaIoError
from ftl.mapping import PAGE_NONE
from spdk_glue import dma

PAGES_AT_ONCE = 1024


@dataclass
class ScrubProgress:
    """pages_read so far; repaired, lost: LBAs found since the last report."""

    pages_read: int
    repaired: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)


def verify(ftl, first_lba: int, num_lbas: int) -> None:
    """Read and check what is mapped of a range. Raises CorruptPage for the first page that is lost, also
    where the medium cannot be read at all (then with checksums of zero)."""
    buffer = dma.allocate(min(num_lbas, PAGES_AT_ONCE) * ftl.page_size)
    addresses = dma.page_addresses(buffer, ftl.page_size)
    for first in range(first_lba, first_lba + num_lbas, PAGES_AT_ONCE):
        lbas = np.arange(first, min(first + PAGES_AT_ONCE, first_lba + num_lbas))
        with ftl.read_guard():
            pages = ftl.resolve(lbas)
            mapped = pages != PAGE_NONE
            lbas, pages = lbas[mapped], pages[mapped]
            try:
                ftl.read_physical(pages, lbas, addresses[: len(lbas)])
            except MediaIoError:  # of a batch: which page it was is found one by one
                _verify_each(ftl, lbas, pages, addresses)


def _verify_each(ftl, lbas, pages, addresses) -> None:
    for position in range(len(lbas)):
        one = slice(position, position + 1)
        try:
            ftl.read_physical(pages[one], lbas[one], addresses[:1])
        except MediaIoError as error:
            raise CorruptPage(int(lbas[position]), int(pages[position]), 0, 0) from error


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
