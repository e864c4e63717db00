"""Pages whose content says what they are."""

import numpy as np

from spdk_glue import dma


def make_pages(values: list[int], page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(buffer, addresses): a page per value, recognisable anywhere in it."""
    buffer = dma.allocate(len(values) * page_size)
    words = buffer.view("<u8").reshape(len(values), -1)
    words[:] = np.array(values, np.uint64)[:, None]
    return buffer, dma.page_addresses(buffer, page_size)
