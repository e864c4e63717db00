"""Damage of every kind to pages on flash: always detected, always repaired where parity can, never served.

KVFS_CORRUPTIONS=10000 is the long run; KVFS_CORRUPTION_SEED replays one.
"""

import os

import numpy as np
import pytest

from ftl.errors import CorruptPage
from ftl.geometry import Geometry
from ftl.layout import PAGE_OOB
from ftl.media_memory import MemoryMedia
from ftl.translation import FlashTranslationLayer

from .pages import make_pages

NUM_CORRUPTIONS = int(os.environ.get("KVFS_CORRUPTIONS", "500"))
SEED = int(os.environ.get("KVFS_CORRUPTION_SEED", "1"))


def flip_bits(media, page, random):
    for _ in range(int(random.integers(1, 9))):
        media.pages[page, random.integers(0, media.geometry.page_size)] ^= 1 << random.integers(0, 8)


def overwrite(media, page, random):
    start = int(random.integers(0, media.geometry.page_size - 8))
    media.pages[page, start:] = random.integers(0, 256, media.geometry.page_size - start)


def zero(media, page, random):
    media.pages[page] = 0


def misdirect(media, page, random):
    """Payload and OOB of another page, as a write to the wrong place leaves them."""
    other = int(random.choice(np.flatnonzero(media.oob["magic"])))
    media.pages[page], media.oob[page] = media.pages[other], media.oob[other]


def lose_oob(media, page, random):
    media.oob[page] = np.zeros((), PAGE_OOB)


def flip_oob(media, page, random):
    raw = media.oob[page : page + 1].view(np.uint8)
    raw[random.integers(0, len(raw))] ^= 1 << random.integers(0, 8)


DAMAGES = (flip_bits, overwrite, zero, misdirect, lose_oob, flip_oob)


@pytest.mark.parametrize("parity", [0, 1])
def test_corruptions(parity):
    """The layer forgets the checksums it has in memory before each, so that it believes the flash only."""
    print(f"seed {SEED}")
    random = np.random.default_rng(SEED)
    media = MemoryMedia(Geometry(num_channels=4, pages_per_erase_block=16, num_superblocks=32, parity=parity))
    ftl = FlashTranslationLayer.format(media)
    values = random.integers(1, 1 << 40, ftl.num_lbas)
    _content, addresses = make_pages(values.tolist(), ftl.page_size)
    ftl.write(np.arange(ftl.num_lbas), addresses)
    ftl.flush()
    buffer, address = make_pages([0], ftl.page_size)
    num_repaired = num_detected = 0
    for _ in range(NUM_CORRUPTIONS):
        lba = int(random.integers(0, ftl.num_lbas))
        page = int(ftl.resolve(np.array([lba]))[0])
        before = media.pages[page].copy(), media.oob[page].copy()
        damage = DAMAGES[random.integers(0, len(DAMAGES))]
        damage(media, page, random)
        changed = (media.pages[page] != before[0]).any() or media.oob[page] != before[1]
        ftl._state.checksums.forget(page // media.geometry.pages_per_superblock)
        buffer[:] = 0
        try:
            ftl.read(np.array([lba]), address)
        except CorruptPage as error:
            assert error.lba == lba
            num_detected += 1
        else:
            # damage that is served is damage that was repaired
            assert (buffer.view("<u8") == values[lba]).all(), f"{damage.__name__} of LBA {lba} was served"
        if changed:
            num_repaired += ftl.counters.repaired_pages
            assert ftl.counters.corrupt_pages, f"{damage.__name__} of LBA {lba} was not noticed"
        ftl.counters.repaired_pages = ftl.counters.corrupt_pages = 0
        media.pages[page], media.oob[page] = before
        ftl._state.checksums.forget(page // media.geometry.pages_per_superblock)
    assert num_repaired + num_detected > 0.95 * NUM_CORRUPTIONS  # a few chose the page itself, or equal bytes
    if parity:
        assert num_detected == 0
    else:
        assert num_repaired == 0
