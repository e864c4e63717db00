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

from .pages import make_pages

GEOMETRY = Geometry(num_channels=2, pages_per_erase_block=8, num_superblocks=24)
EMPTY = 0
CRASHES_PER_SEED = 60


class Oracle:
    """values[lba]: what it may hold now; the first is the durable one."""

    def __init__(self, num_lbas: int):
        self.may_hold: list[list[int]] = [[EMPTY] for _ in range(num_lbas)]

    def write(self, lba: int, value: int) -> None:
        self.may_hold[lba].append(value)

    def flushed(self) -> None:
        for values in self.may_hold:
            del values[:-1]

    def check(self, ftl: FlashTranslationLayer) -> None:
        """Every page holds what it may; what it holds is the truth from now on."""
        num_lbas = len(self.may_hold)
        buffer, addresses = make_pages([0] * num_lbas, ftl.page_size)
        ftl.read(np.arange(num_lbas), addresses)
        words = buffer.view("<u8").reshape(num_lbas, -1)
        assert (words == words[:, :1]).all(), "a torn page was served"
        for lba, value in enumerate(words[:, 0].tolist()):
            assert value in self.may_hold[lba], f"LBA {lba} holds {value}, may hold {self.may_hold[lba]}"
            # unsynced, so the older ones may come back at the next cut, but nothing newer than this
            self.may_hold[lba] = self.may_hold[lba][: self.may_hold[lba].index(value) + 1]


def run(ftl, oracle, random, next_value: list[int], num_steps: int) -> None:
    """A workload of writes, overwrites, deallocations and flushes; the oracle learns before the drive."""
    for _ in range(num_steps):
        count = int(random.integers(1, 12))
        first = int(random.integers(0, ftl.num_lbas - count))
        lbas = np.arange(first, first + count)
        choice = random.random()
        if choice < 0.65:
            values = list(range(next_value[0], next_value[0] + count))
            next_value[0] += count
            for lba, value in zip(lbas.tolist(), values, strict=True):
                oracle.write(lba, value)
            buffer, addresses = make_pages(values, ftl.page_size)
            ftl.write(lbas, addresses, stream=int(random.integers(0, 3)))
            del buffer
        elif choice < 0.8:
            for lba in lbas.tolist():
                oracle.write(lba, EMPTY)
            ftl.deallocate([[first, count]])
        else:
            ftl.flush()
            oracle.flushed()


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
