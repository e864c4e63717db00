"""Power cuts at every media operation of random workloads, recovery included, on the translation layer.

An oracle holds, for every LBA, what the last completed flush promised and all that was written since. After
the power is back a page must hold one of these, whole.
"""

from contextlib import suppress

import numpy as np
import pytest

from ftl.geometry import Geometry
from ftl.media_nand import NandMedia, PowerCut
from ftl.translation import FlashTranslationLayer

from .page_workload import Oracle, run
from .pages import make_pages

GEOMETRY = Geometry(num_channels=2, pages_per_erase_block=8, num_superblocks=24)
CRASHES_PER_SEED = 60


@pytest.mark.parametrize("seed", range(12))
def test_power_cuts(seed):
    """Flushed data after any power cut: an older version, a torn page or another LBA's would be lost data."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    media = NandMedia(GEOMETRY, random)
    ftl = FlashTranslationLayer.format(media)
    oracle = Oracle(ftl.num_lbas)
    next_value = [1]
    run(ftl, oracle, random, next_value, 150)  # fill the drive, so that collection runs
    for _ in range(CRASHES_PER_SEED):
        media.cut_after = media.operations + int(random.integers(0, 40))
        try:
            run(ftl, oracle, random, next_value, 1000)
        except PowerCut:
            media.reboot()
        for _ in range(int(random.integers(0, 3))):  # and again while recovering
            media.cut_after = int(random.integers(0, 2))
            with suppress(PowerCut):
                FlashTranslationLayer.open(media)
            media.reboot()
        ftl = FlashTranslationLayer.open(media)
        oracle.check(ftl)


@pytest.mark.parametrize("seed", range(3))
def test_clean_close_and_reopen(seed):
    """A clean restart loses nothing, flushed or not, and goes on in the open superblocks."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    media = NandMedia(GEOMETRY, random)
    ftl = FlashTranslationLayer.format(media)
    oracle = Oracle(ftl.num_lbas)
    next_value = [1]
    for _ in range(20):
        run(ftl, oracle, random, next_value, 30)
        ftl.close()
        oracle.flushed()
        free = ftl.free_superblocks
        ftl = FlashTranslationLayer.open(media)
        assert ftl.free_superblocks == free
        oracle.check(ftl)


def test_a_full_drive_takes_overwrites_for_ever():
    """Collection: a drive full of live data must accept overwrites of it without end."""
    random = np.random.default_rng(1)
    media = NandMedia(GEOMETRY, random)
    ftl = FlashTranslationLayer.format(media)
    lbas = np.arange(ftl.num_lbas)
    buffer, addresses = make_pages(lbas.tolist(), ftl.page_size)
    ftl.write(lbas, addresses)
    content = lbas.copy()
    for round_number in range(1500):
        lba = int(random.integers(0, ftl.num_lbas))
        content[lba] = 1_000_000 + round_number
        _page, address = make_pages([int(content[lba])], ftl.page_size)
        ftl.write(np.array([lba]), address, stream=round_number)
    ftl.read(lbas, addresses)
    np.testing.assert_array_equal(buffer.view("<u8").reshape(len(lbas), -1)[:, 7], content)
    assert ftl.counters.gc_pages_written > 0
