"""Modelled time, against timelines worked out by hand."""

import time

import numpy as np
import pytest

from ftl.geometry import Geometry
from ftl.layout import OOB_MAGIC, PAGE_OOB
from ftl.media_memory import MemoryMedia
from ftl.virtual_clock import NandTiming, TimedMedia, VirtualClock
from spdk_glue import dma

TR, TPROG, TBERS = 50_000, 600_000, 3_000_000
CHANNEL, LINK = 3413, 1170  # 4096 bytes at 1.2 and 3.5 GB/s, in ns
EIGHT = Geometry(num_channels=8)
ONE_DIE = Geometry(num_channels=1)
TWO_PLANES = Geometry(num_channels=1, planes_per_die=2)
TWO_DIES = Geometry(num_channels=1, dies_per_channel=2)


def pages(*numbers):
    return np.array(numbers, np.int64)


def test_one_page():
    """A page read: out of the cells, over the channel, over the link. A page programmed: the other way."""
    clock = VirtualClock(EIGHT)
    assert clock.read(pages(0)) == (0, TR + CHANNEL + LINK)
    assert clock.now_ns == TR + CHANNEL + LINK
    clock = VirtualClock(EIGHT)
    assert clock.program(pages(0)) == (0, LINK + CHANNEL + TPROG)
    assert clock.now_ns == LINK  # the rest happens in the drive
    assert clock.sync() == (LINK, LINK + CHANNEL + TPROG)
    assert clock.now_ns == LINK + CHANNEL + TPROG


def test_one_stripe():
    """Eight channels work side by side; the link takes the pages one after another."""
    clock = VirtualClock(EIGHT)
    assert clock.read(np.arange(8)) == (0, TR + CHANNEL + 8 * LINK)
    assert clock.die_busy_ns.tolist() == [TR] * 8
    assert clock.channel_busy_ns.tolist() == [CHANNEL] * 8
    assert clock.link_busy_ns == 8 * LINK
    clock = VirtualClock(EIGHT)
    assert clock.program(np.arange(8)) == (0, 8 * LINK + CHANNEL + TPROG)


def test_two_pages_on_one_die():
    """One die does one thing at a time; the second page crosses the channel meanwhile."""
    clock = VirtualClock(ONE_DIE)
    assert clock.read(pages(0, 1))[1] == 2 * TR + CHANNEL + LINK
    assert clock.die_busy_ns.tolist() == [2 * TR]
    clock = VirtualClock(ONE_DIE)
    assert clock.program(pages(0, 1))[1] == LINK + CHANNEL + 2 * TPROG
    assert clock.die_busy_ns.tolist() == [2 * TPROG]


def test_two_planes_of_one_die():
    """A multi-plane operation takes the die once; the next row is another one."""
    clock = VirtualClock(TWO_PLANES)
    assert clock.read(pages(0, 1))[1] == TR + 2 * CHANNEL + LINK
    assert clock.die_busy_ns.tolist() == [TR]
    clock = VirtualClock(TWO_PLANES)
    assert clock.program(pages(0, 1))[1] == LINK + 2 * CHANNEL + TPROG
    assert clock.program(pages(2))[1] == LINK + 2 * CHANNEL + 2 * TPROG
    assert clock.die_busy_ns.tolist() == [2 * TPROG]
    clock = VirtualClock(TWO_PLANES)
    clock.erase(pages(0, 1))
    assert clock.die_busy_ns.tolist() == [TBERS]


def test_two_dies_on_one_channel():
    """Dies of a channel share only the transfers."""
    clock = VirtualClock(TWO_DIES)
    assert clock.read(pages(0, 1))[1] == TR + 2 * CHANNEL + LINK
    assert clock.die_busy_ns.tolist() == [TR, TR]


def test_erase_behind_a_program():
    """A die erases after what it was asked before, other dies at once; a read waits behind the erase."""
    clock = VirtualClock(EIGHT)
    clock.program(pages(3))
    programmed = LINK + CHANNEL + TPROG
    assert clock.erase(pages(3)) == (LINK, programmed + TBERS)
    assert clock.erase(pages(4)) == (LINK, LINK + TBERS)
    assert clock.now_ns == LINK  # nobody waits for an erase
    assert clock.read(pages(5))[1] == LINK + TR + CHANNEL + LINK
    assert clock.read(pages(3))[1] == programmed + TBERS + TR + CHANNEL + LINK


def test_bound_by_the_link():
    """A slow link decides; then the clock's bandwidth is the link's."""
    clock = VirtualClock(EIGHT, NandTiming(link_bytes_per_s=4.096e8))  # 10 us a page
    assert clock.read(np.arange(1600))[1] == TR + CHANNEL + 1600 * 10_000
    report = clock.report()
    assert report["read_bytes_per_s"] == pytest.approx(4.096e8, rel=0.01)
    assert report["link_busy_share"] > 0.99


def test_bound_by_the_dies():
    """Long writes go at the pace of the flash, one batch ahead of it, not at that of the link."""
    clock = VirtualClock(EIGHT)
    for stripe in range(100):
        clock.program(stripe * 8 + np.arange(8))
    clock.sync()
    assert clock.end_ns == clock.now_ns
    assert clock.now_ns == pytest.approx(100 * TPROG, rel=0.001)
    assert clock.report()["program_bytes_per_s"] == pytest.approx(8 * 4096 / 600e-6, rel=0.001)
    clock.program(pages(800))
    before = clock.now_ns
    clock.program(pages(801))
    assert clock.now_ns == before + CHANNEL + TPROG  # until the first one is in flash


def test_time_of_the_caller():
    """What the caller computes meanwhile costs the flash nothing."""
    clock = VirtualClock(ONE_DIE)
    clock.program(pages(0))
    clock.advance(10 * TPROG)
    assert clock.sync() == (LINK + 10 * TPROG, LINK + 10 * TPROG)


def test_timed_media():
    """Every verb is on the clock and does what the medium does."""
    geometry = Geometry(num_channels=4, pages_per_erase_block=8, num_superblocks=8)
    clock = VirtualClock(geometry)
    media = TimedMedia(MemoryMedia(geometry), clock)
    buffer = dma.allocate(8 * 4096)
    addresses = dma.page_addresses(buffer, 4096)
    oob = np.zeros(8, PAGE_OOB)
    oob["magic"] = OOB_MAGIC
    started = time.monotonic()
    media.program(np.arange(8), addresses, oob)
    media.sync()
    assert clock.now_ns == 4 * LINK + CHANNEL + 2 * TPROG  # the last die's two pages
    media.read(np.arange(8), addresses)
    assert media.read_oob(0)["magic"].nonzero()[0].tolist() == list(range(8))
    media.mark_bad(0, np.array([1]))
    busy = clock.die_busy_ns
    media.erase(0)
    assert (clock.die_busy_ns - busy).tolist() == [TBERS, 0, TBERS, TBERS]
    assert media.counters.pages_programmed == 8
    assert media.geometry is geometry
    for _ in range(1000):
        clock.advance(10**12)
    assert time.monotonic() - started < 60  # it never sleeps


def test_timings_are_checked():
    with pytest.raises(ValueError, match="read_ns"):
        NandTiming(read_ns=0)
