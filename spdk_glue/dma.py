"""Memory that a drive may transfer to and from directly.

Direct I/O, SPDK and the attention kernels all want page-aligned buffers, so every data buffer of the
project is allocated here. Addresses travel as plain integers in uint64 arrays: a batch of pages is two
arrays (page numbers, addresses), never a Python object per page.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Callable

import numpy as np

ALIGNMENT = 4096
HUGE_PAGE = 2 << 20

# Memory to or from one place of a drive or file, in bytes.
EXTENT = np.dtype([("address", "=u8"), ("offset", "=u8"), ("length", "=u8")])


_allocators: list[Callable[[int], np.ndarray]] = []


def use_allocator(allocator: Callable[[int], np.ndarray]) -> None:
    """Have `allocate` take memory from a driver whose drives reach no other, as long as it has some.

    allocator: size in bytes to a zeroed uint8 array of that size, aligned as `allocate` says, or MemoryError
    """
    if allocator not in _allocators:
        _allocators.append(allocator)


def allocate(size_bytes: int) -> np.ndarray:
    """A zeroed uint8 array of `size_bytes`, aligned to 4 KiB, by default backed by its own mapping.

    Freed when the last view of it goes. Buffers of a huge page or more are aligned to one and ask for them,
    which makes pinning them for direct I/O and walking them in a kernel cheaper.
    """
    if size_bytes <= 0:
        raise ValueError(f"a DMA buffer needs at least one byte, not {size_bytes}")
    for allocator in _allocators:
        with contextlib.suppress(MemoryError):  # the driver copies what lies elsewhere
            return allocator(size_bytes)
    is_large = size_bytes >= HUGE_PAGE
    # private: Linux gives shared anonymous memory no huge pages unless it is told to system-wide
    mapping = mmap.mmap(
        -1, size_bytes + (HUGE_PAGE if is_large else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    if not is_large:
        return np.frombuffer(mapping, np.uint8)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    start = -address_of(np.frombuffer(mapping, np.uint8, 1)) % HUGE_PAGE  # what lies outside is never touched
    return np.frombuffer(mapping, np.uint8, size_bytes, start)


def address_of(array: np.ndarray) -> int:
    """The address of the first byte of a C-contiguous array."""
    return array.__array_interface__["data"][0]


def view(address: int, size_bytes: int) -> np.ndarray:
    """uint8 [size_bytes]: the memory at an address, which the caller keeps alive."""
    return np.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), np.uint8)


def page_addresses(array: np.ndarray, page_size: int) -> np.ndarray:
    """uint64 [num_pages]: the address of each `page_size` piece of a C-contiguous array.

    The caller keeps the array alive while the addresses are in use.
    """
    if not array.flags.c_contiguous:
        raise ValueError("a DMA buffer must be C-contiguous")
    if array.nbytes % page_size:
        raise ValueError(f"a buffer of {array.nbytes} bytes is not a whole number of {page_size}-byte pages")
    num_pages = array.nbytes // page_size
    return np.uint64(address_of(array)) + np.arange(num_pages, dtype=np.uint64) * np.uint64(page_size)
