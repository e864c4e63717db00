"""Giving a damaged page back from the parity of its row."""

import numpy as np

from ftl import oob
from ftl.direct_io.api import copy_pages, crc32c_pages
from ftl.layout import PageKind
from ftl.media import FlashMedia
from ftl.parity import ParityPages, lost_records, with_unwritten
from spdk_glue import dma


def repair_page(
    media: FlashMedia, page: int, lba: int, destination: int, unwritten: ParityPages | None = None
) -> bool:
    """Write what a physical page must have held to an address; whether that was possible.

    unwritten: parity of its superblock that is not on flash yet.

    False without parity, where a second page of the group is damaged too, or where what parity gives is not
    `lba` with the checksum that follows from the others'.
    """
    geometry = media.geometry
    if not geometry.parity:
        return False
    superblock, index = divmod(page, geometry.pages_per_superblock)
    first = index - index % geometry.num_dies
    group = superblock * geometry.pages_per_superblock + np.arange(first, first + geometry.num_dies)
    records = media.read_oob(superblock)[first : first + geometry.num_dies]
    whole = oob.holds(records)
    own = records[index - first] if whole[index - first] else None
    whole[index - first] = False
    records, pages = records[whole], group[whole]
    if unwritten is not None:
        kept = unwritten.pages // geometry.num_dies == page // geometry.num_dies
        unwritten = unwritten.of(kept) if kept.any() else None
    records, pages = with_unwritten(geometry, records, pages, unwritten)
    lost, lost_pages = lost_records(geometry, records, pages)
    if lost_pages.tolist() != [page] or int(lost["lba"][0]) != lba:
        return False
    # its own OOB is to be believed, unless it is another page's
    is_own = own is not None and own["kind"] == PageKind.DATA and own["lba"] == lba
    is_own = is_own and own["sequence_number"] == lost["sequence_number"][0]
    if is_own and own["payload_crc32c"] != lost["payload_crc32c"][0]:
        return False
    is_parity = records["kind"] == PageKind.PARITY
    parity = int(np.argmax(np.where(is_parity, records["program_number"], 0)))
    dies = (pages % geometry.num_dies).astype(np.uint32)
    summed = ~is_parity & (records["member_dies"][parity] >> dies & 1 != 0)
    summed[parity] = unwritten is None
    buffer = dma.allocate(np.count_nonzero(summed) * geometry.page_size).reshape(-1, geometry.page_size)
    media.read(pages[summed], dma.page_addresses(buffer, geometry.page_size))
    payload = dma.allocate(geometry.page_size)
    payload[:] = np.bitwise_xor.reduce(buffer, axis=0)
    if unwritten is not None:
        payload ^= unwritten.payload[0]
    address = dma.page_addresses(payload, geometry.page_size)
    # a damaged member shows here as well: the sum would not have the checksum that it must have
    if crc32c_pages(address, geometry.page_size)[0] != lost["payload_crc32c"][0]:
        return False
    copy_pages(np.array([destination], np.uint64), address, geometry.page_size)
    return True
