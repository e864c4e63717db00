"""LMCache's memory in huge pages."""

import mmap
import re
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lmcache.v1", reason="these tests need LMCache: pip install 'kvfs[lmcache]'")

from kvfs.engines.lmcache.huge_pages import HugePages
from spdk_glue import dma

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NUM_PAGES = 4
WAIT_SECONDS = 60


@pytest.fixture
def memory():
    """Ordinary pages, touched, with the address that the kernel lists them by."""
    mapping = mmap.mmap(-1, (NUM_PAGES + 1) * dma.HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(mapping, np.uint8)
    array[:] = np.random.default_rng(0).integers(0, 256, array.nbytes, np.uint8)
    return array


def huge_bytes(address):
    """Of huge pages in the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no huge pages here")
def test_touched_memory_becomes_huge_and_keeps_its_bytes(memory):
    before, middle = memory.copy(), dma.address_of(memory) + memory.nbytes // 2
    assert huge_bytes(middle) == 0
    pages = HugePages(dma.address_of(memory), memory.nbytes)
    deadline = time.monotonic() + WAIT_SECONDS
    while pages.is_gathering and time.monotonic() < deadline:
        time.sleep(0.01)
    pages.close()
    if huge_bytes(middle) == 0:
        pytest.skip("this kernel gathers nothing when asked, or has no huge page free")
    assert np.array_equal(memory, before)


def test_memory_that_holds_no_huge_page_is_left_alone():
    pages = HugePages(dma.HUGE_PAGE + 4096, dma.HUGE_PAGE)
    assert not pages.is_gathering
    pages.close()
