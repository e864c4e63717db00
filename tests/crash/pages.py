"""Pages whose content says what they are."""

import numpy as np

from spdk_glue import dma


def make_pages(values: list[int], page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(buffer, addresses): a page per value, recognisable anywhere in it."""
    buffer = dma.allocate(len(values) * page_size)
    words = buffer.view("<u8").reshape(len(values), -1)
    words[:] = np.array(values, np.uint64)[:, None]
    return buffer, dma.page_addresses(buffer, page_size)


def write_pages(ftl, lbas, first_value: int, stream: int = 0) -> None:
    """Each LBA gets a page of first_value + LBA."""
    _buffer, addresses = make_pages([first_value + lba for lba in lbas], ftl.page_size)
    ftl.write(np.array(lbas), addresses, stream)


def read_page(ftl, lba: int) -> int:
    """The value of an LBA's page."""
    buffer, address = make_pages([0], ftl.page_size)
    ftl.read(np.array([lba]), address)
    return int(buffer.view("<u8")[0])
