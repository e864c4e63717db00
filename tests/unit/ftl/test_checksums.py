"""The table of expected checksums: what is loaded ahead of a look-up."""

import numpy as np
import pytest

from ftl.checksums import ChecksumTable
from ftl.geometry import Geometry
from ftl.media_file import FileMedia
from ftl.translation import LARGE_READ_PAGES, FlashTranslationLayer
from spdk_glue import dma

SHAPE = Geometry(num_channels=4, pages_per_erase_block=64, num_superblocks=16, parity=0)
LBAS = np.arange(2 * LARGE_READ_PAGES)


@pytest.fixture
def buffer():
    return dma.allocate(len(LBAS) * SHAPE.page_size)


@pytest.fixture
def path(tmp_path, buffer):
    """A drive's file that holds `LBAS`, each page a number of its own."""
    buffer.view(np.uint64).reshape(len(LBAS), -1)[:] = LBAS[:, None] + 1
    ftl = FlashTranslationLayer.format(FileMedia.create(tmp_path / "flash", SHAPE))
    ftl.write(LBAS, dma.page_addresses(buffer, SHAPE.page_size))
    ftl.close()
    ftl.media.close()
    buffer[:] = 0
    return tmp_path / "flash"


def test_what_was_loaded_ahead_needs_no_read_and_is_not_used_twice(path):
    """A look-up after `load` that reads OOB again, or a column that one scan marks as used again and again."""
    media = FileMedia.open(path, read_only=True)
    pages = FlashTranslationLayer.open(media).resolve(LBAS)
    table = ChecksumTable(media)
    assert table.lacks(pages)
    table.load(pages)
    assert not table.lacks(pages)
    num_read = media.counters.oob_pages_read
    ahead = table.expected(pages, LBAS)
    assert media.counters.oob_pages_read == num_read
    assert not table.used.any()
    by_itself = ChecksumTable(media).expected(pages, LBAS)
    assert all(map(np.array_equal, ahead, by_itself)) and ahead[1].all()
    table.expected(pages, LBAS)
    assert table.used.any()
    media.close()


def test_a_large_read_of_a_drive_just_opened_is_right(path, buffer):
    ftl = FlashTranslationLayer.open(FileMedia.open(path), background=True)
    ftl.read(LBAS, dma.page_addresses(buffer, SHAPE.page_size))
    assert (buffer.view(np.uint64).reshape(len(LBAS), -1) == LBAS[:, None] + 1).all()
    ftl.close()
    ftl.media.close()
