"""Random writes, deallocations and flushes of a translation layer, and what each page may hold then."""

import numpy as np

from ftl.translation import FlashTranslationLayer

from .pages import make_pages

EMPTY = 0


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


def run(ftl, oracle, random, next_value: list[int], num_steps: int, zeros_chance: float = 0.0) -> None:
    """A workload of writes, overwrites, deallocations and flushes; the oracle learns before the drive.

    zeros_chance: of a write of nothing but zeros
    """
    for _ in range(num_steps):
        count = int(random.integers(1, 12))
        first = int(random.integers(0, ftl.num_lbas - count))
        lbas = np.arange(first, first + count)
        choice = random.random()
        if choice < 0.65:
            values = list(range(next_value[0], next_value[0] + count))
            next_value[0] += count
            if zeros_chance and random.random() < zeros_chance:
                values = [EMPTY] * count
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
