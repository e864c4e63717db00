"""Memory for transfers: never one piece for two users, and used again."""

import gc

import numpy as np

from kvfs.files.buffer_pool import BufferPool
from spdk_glue import dma


def test_a_lease_is_nobody_elses():
    """A reply to the kernel with another file's bytes."""
    pool = BufferPool(1 << 20)
    leases = [pool.take(size) for size in (1, 4096, 5000, 100_000, 1 << 20, 3 << 20) * 20]
    for number, lease in enumerate(leases):
        lease[:] = number
    assert all((lease == number).all() for number, lease in enumerate(leases))
    assert all(dma.address_of(lease) % dma.ALIGNMENT == 0 for lease in leases)


def test_memory_is_used_again():
    """New memory for each request costs more than the copy that it is for."""
    pool = BufferPool(1 << 20)
    addresses = {dma.address_of(pool.take(1 << 18)) for _ in range(100)}
    assert len(addresses) <= 8


def test_a_view_keeps_its_lease():
    """Memory that is given away while a reply still reads it."""
    pool = BufferPool(1 << 20)
    view = memoryview(pool.take(4096))[10:20]
    view.obj[:] = 7
    gc.collect()
    others = [pool.take(4096) for _ in range(1000)]
    for other in others:
        other[:] = 9
    assert bytes(view) == b"\7" * 10


def test_idle_memory_is_bounded():
    """A burst of requests that takes memory for ever."""
    pool = BufferPool(2 << 20)
    leases = [pool.take(16 << 10) for _ in range(1000)]
    del leases
    assert sum(buffer.nbytes for buffer in pool._idle[16 << 10]) <= 4 << 20
    assert not pool._leases
    assert pool.take(16 << 10).dtype == np.uint8
