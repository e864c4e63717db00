"""One suite over every flash medium: the NAND rules, and what is programmed is what is read."""

import numpy as np
import pytest

from ftl.direct_io.api import crc32c_pages
from ftl.errors import CorruptPage, DriveBusy, NandRuleViolation, NotADrive, ReadOnlyMedia, TruncatedDrive
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, OOB_MAGIC, PAGE_OOB
from ftl.media_file import FileMedia
from ftl.media_memory import MemoryMedia
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma

GEOMETRY = Geometry(num_channels=4, pages_per_erase_block=8, num_superblocks=8)


@pytest.fixture(params=["memory", "file"])
def media(request, tmp_path):
    media = (
        MemoryMedia(GEOMETRY) if request.param == "memory" else FileMedia.create(tmp_path / "flash", GEOMETRY)
    )
    yield media
    media.close()


def pages_of(count, seed=0):
    buffer = dma.allocate(count * GEOMETRY.page_size)
    buffer[:] = np.random.default_rng(seed).integers(0, 256, buffer.size, np.uint8)
    return buffer, dma.page_addresses(buffer, GEOMETRY.page_size)


def program(media, pages, seed=0):
    buffer, addresses = pages_of(len(pages), seed)
    oob = np.zeros(len(pages), PAGE_OOB)
    oob["magic"] = OOB_MAGIC
    oob["lba"] = pages
    media.program(np.asarray(pages), addresses, oob)
    return buffer


def test_read_what_was_programmed(media):
    """Data, checksums and OOB of scattered pages, across superblocks."""
    size = GEOMETRY.pages_per_superblock
    pages = np.concatenate([np.arange(10), size + np.arange(6)])
    written = program(media, pages)
    order = np.random.default_rng(1).permutation(len(pages))
    buffer, addresses = pages_of(len(pages), seed=9)
    crc32c = media.read(pages[order], addresses)
    np.testing.assert_array_equal(buffer.reshape(len(pages), -1), written.reshape(len(pages), -1)[order])
    np.testing.assert_array_equal(crc32c, crc32c_pages(addresses, GEOMETRY.page_size))
    media.sync()
    records = media.read_oob(1)
    np.testing.assert_array_equal(records["lba"][:6], pages[10:])
    assert not records["magic"][6:].any()
    assert media.programmed_superblocks().tolist() == [0, 1]


def test_nand_rules(media):
    """Programming twice, out of order or outside the flash: an FTL bug must not pass as success."""
    program(media, np.arange(8))
    program(media, np.array([16]))  # skipping is allowed, going back to what was skipped is not
    for pages in ([7], [16], [12], [GEOMETRY.num_pages], [-1]):
        with pytest.raises(NandRuleViolation):
            program(media, np.array(pages))
    program(media, np.array([13, 14, 15]))


def test_erase(media):
    """An erased superblock is programmable again, empty, and counts its wear; others keep their data."""
    size = GEOMETRY.pages_per_superblock
    program(media, np.arange(size))
    kept = program(media, size + np.arange(4), seed=2)
    media.erase(0)
    assert not media.read_oob(0)["magic"].any()
    assert media.erase_counts().tolist() == [1] + [0] * 7
    program(media, np.arange(4), seed=3)
    buffer, addresses = pages_of(4, seed=4)
    media.read(size + np.arange(4), addresses)
    np.testing.assert_array_equal(buffer, kept)


def test_file_survives_reopening(tmp_path):
    """A restart: content, wear and NAND state of a file."""
    media = FileMedia.create(tmp_path / "flash", GEOMETRY)
    written = program(media, np.arange(5))
    media.erase(3)
    media.close()
    media = FileMedia.open(tmp_path / "flash")
    buffer, addresses = pages_of(5, seed=9)
    media.read(np.arange(5), addresses)
    np.testing.assert_array_equal(buffer, written)
    assert media.erase_counts()[3] == 1
    media.read_oob(0)
    with pytest.raises(NandRuleViolation):
        program(media, np.array([4]))
    program(media, np.array([5]))
    media.close()


def test_damaged_headers(tmp_path):
    """One damaged header copy is survived; two, a cut file and a foreign file are refused."""
    path = tmp_path / "flash"
    FileMedia.create(path, GEOMETRY).close()
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.write(b"\0" * BLOCK_BYTES)
    FileMedia.open(path).close()
    with path.open("r+b") as file:
        file.write(b"\0" * 2 * BLOCK_BYTES)
    with pytest.raises(NotADrive):
        FileMedia.open(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(TruncatedDrive) as caught:
        FileMedia.open(path)
    assert (caught.value.found, caught.value.expected) == (len(whole) - 1, len(whole))


def test_one_owner_and_read_only(tmp_path):
    """Two owners would destroy a drive; a read-only one must not change a byte of it."""
    path = tmp_path / "flash"
    media = FileMedia.create(path, GEOMETRY)
    ftl = FlashTranslationLayer.format(media)
    buffer, addresses = pages_of(3)
    ftl.write(np.arange(3), addresses)
    with pytest.raises(DriveBusy):
        FileMedia.open(path)
    ftl.close()
    media.close()
    before = path.read_bytes()
    media = FileMedia.open(path, read_only=True)
    ftl = FlashTranslationLayer.open(media)
    found, places = pages_of(3, seed=5)
    ftl.read(np.arange(3), places)
    np.testing.assert_array_equal(found, buffer)
    with pytest.raises(ReadOnlyMedia):
        ftl.write(np.arange(3), addresses)
    ftl.flush()
    ftl.close()
    media.close()
    assert path.read_bytes() == before


def test_bit_flips_are_caught(media):
    """Corruption: never served, and the error says where."""
    ftl = FlashTranslationLayer.format(media)
    buffer, addresses = pages_of(4)
    ftl.write(np.arange(4), addresses)
    page = int(ftl.resolve(np.array([2]))[0])
    if isinstance(media, MemoryMedia):
        media.pages[page, 1000] ^= 4
    else:
        with open(media.path, "r+b") as file:
            file.seek(media._data_start + page * GEOMETRY.page_size + 1000)
            flipped = bytes([buffer[2 * GEOMETRY.page_size + 1000] ^ 4])
            file.write(flipped)
            file.flush()
    with pytest.raises(CorruptPage) as caught:
        ftl.read(np.arange(4), addresses)
    assert (caught.value.lba, caught.value.physical_page) == (2, page)
    assert caught.value.expected_crc32c != caught.value.found_crc32c
    ftl.read(np.array([0, 1, 3]), addresses[:3])
