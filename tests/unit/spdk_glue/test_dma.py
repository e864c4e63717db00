"""DMA memory: alignment, contents, lifetime, page addresses."""

import ctypes
import gc
from itertools import pairwise

import numpy as np
import pytest

from spdk_glue import dma
from spdk_glue.dma import ALIGNMENT, HUGE_PAGE

SIZES = [1, 100, 4096, 4097, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE + 4096]


@pytest.mark.parametrize("size", SIZES)
def test_allocate(size):
    memory = dma.allocate(size)
    assert (memory.dtype, memory.shape) == (np.uint8, (size,))
    assert dma.address_of(memory) % (HUGE_PAGE if size >= HUGE_PAGE else ALIGNMENT) == 0
    assert not memory.any()
    memory[:] = 255  # all of it is writable
    assert memory.flags.c_contiguous


@pytest.mark.parametrize("size", [0, -1])
def test_nothing_to_allocate(size):
    with pytest.raises(ValueError, match="at least one byte"):
        dma.allocate(size)


def test_buffers_are_apart():
    spans = sorted((dma.address_of(b), dma.address_of(b) + b.nbytes, b) for b in map(dma.allocate, SIZES))
    for (_, stop, _), (start, _, _) in pairwise(spans):
        assert stop <= start


@pytest.mark.parametrize("size", [8192, HUGE_PAGE + 8192])
def test_a_view_keeps_the_memory(size):
    """Freed under a view, an address in flight would point into nothing."""
    memory = dma.allocate(size)
    memory[4096:4100] = 1, 2, 3, 4
    view = memory[4096:].view("<u4")
    address = dma.address_of(view)
    del memory
    gc.collect()
    assert view[0] == ctypes.c_uint32.from_address(address).value == 0x04030201


def test_address_of():
    memory = dma.allocate(8192)
    assert dma.address_of(memory[4096:]) == dma.address_of(memory) + 4096
    memory[17] = 99
    assert ctypes.c_uint8.from_address(dma.address_of(memory[17:])).value == 99


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 4096), (5, 4096), (3, 16384), (1, 65536)])
def test_page_addresses(num_pages, page_size):
    memory = dma.allocate(num_pages * page_size)
    addresses = dma.page_addresses(memory, page_size)
    assert addresses.dtype == np.uint64
    start = dma.address_of(memory)
    assert addresses.tolist() == [start + page * page_size for page in range(num_pages)]
    shaped = memory.view(np.float32).reshape(num_pages, -1)
    np.testing.assert_array_equal(dma.page_addresses(shaped, page_size), addresses)


def test_addresses_of_no_pages():
    assert len(dma.page_addresses(np.empty(0, np.uint8), 4096)) == 0


def test_bad_buffers():
    memory = dma.allocate(4 * 4096)
    with pytest.raises(ValueError, match="whole number"):
        dma.page_addresses(memory[:5000], 4096)
    for view in (memory[::2], memory.reshape(4, 4096)[:, :2048]):
        with pytest.raises(ValueError, match="contiguous"):
            dma.page_addresses(view, 2048)
