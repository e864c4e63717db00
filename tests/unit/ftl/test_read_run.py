"""The short way of reading: what it gives is right, and whatever is not as it should be goes the long way."""

import os

import numpy as np
import pytest

from ftl.checksums import COLUMNS_MIN_BYTES
from ftl.direct_io.api import use_software_crc32c
from ftl.errors import CorruptPage
from ftl.geometry import Geometry
from ftl.media_file import FileMedia
from ftl.media_memory import MemoryMedia
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma

SHAPE = {"num_channels": 4, "pages_per_erase_block": 32, "num_superblocks": 16}
PAGE = 4096


class Flash:
    """A layer over a file, and a hand in that file. LBA n holds 64-bit words of n + 1000 * its version."""

    def __init__(self, path, **options):
        self.path = path
        self.geometry = Geometry(**SHAPE, **options)
        FileMedia.create(path, self.geometry).close()
        self.media = FileMedia.open(path)
        self.ftl = FlashTranslationLayer.format(self.media)

    def write(self, lbas, version=0):
        lbas = np.asarray(lbas)
        buffer = dma.allocate(len(lbas) * PAGE)
        buffer.view("<u8").reshape(len(lbas), -1)[:] = lbas[:, None] + 1000 * version
        self.ftl.write(lbas, dma.page_addresses(buffer, PAGE))

    def read_now(self, first, count, version=0):
        """Whether the short way was gone; what it gave is right, then."""
        buffer = dma.allocate(count * PAGE)
        if not self.ftl.read_run(first, buffer):
            return False
        wanted = np.arange(first, first + count)[:, None] + 1000 * version
        assert (buffer.view("<u8").reshape(count, -1) == wanted).all()
        return True

    def read(self, lba):
        buffer = dma.allocate(PAGE)
        self.ftl.read(np.array([lba]), dma.page_addresses(buffer, PAGE))
        return int(buffer.view("<u8")[0])

    def place(self, lba):
        """Where a page lies in the file."""
        return self.media.layout.data_start + int(self.ftl.resolve(np.array([lba]))[0]) * PAGE

    def change(self, offset, content):
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def reopen(self):
        self.close()
        self.media = FileMedia.open(self.path)
        self.ftl = FlashTranslationLayer.open(self.media)

    def close(self):
        self.ftl.close()
        self.media.close()


@pytest.fixture
def flash(tmp_path, request):
    flash = Flash(tmp_path / "flash", **getattr(request, "param", {}))
    yield flash
    flash.close()


@pytest.mark.parametrize("software", [False, True])
def test_runs(flash, software):
    """One page, several, and as many as are read this way; counted as any other read."""
    flash.write(range(128))
    use_software_crc32c(software)
    try:
        before = flash.media.counters.pages_read, flash.ftl.counters.host_pages_read
        assert flash.read_now(5, 1) and flash.read_now(0, 64) and flash.read_now(63, 7)
    finally:
        use_software_crc32c(False)
    after = flash.media.counters.pages_read, flash.ftl.counters.host_pages_read
    assert [late - early for early, late in zip(before, after, strict=True)] == [72, 72]


def test_what_is_no_run(flash):
    """Holes, pages here and there, two superblocks, LBAs that are none, a buffer that is not for transfers."""
    flash.write(range(0, 100))
    flash.write([10], version=1)
    flash.ftl.deallocate([[20, 1]])
    for first, count in ((100, 1), (99, 2), (9, 2), (10, 2), (20, 1), (19, 3), (0, 65)):
        assert not flash.read_now(first, count), (first, count)
    assert flash.read_now(10, 1, version=1)
    flash.write(range(200, 300))
    pages = flash.ftl.resolve(np.arange(200, 300)) // flash.geometry.pages_per_superblock
    last = 200 + int(np.flatnonzero(np.diff(pages))[0])
    assert flash.read_now(last, 1) and flash.read_now(last + 1, 1) and not flash.read_now(last, 2)
    for lba in (flash.ftl.num_lbas, flash.ftl.num_lbas - 1, 1 << 62):
        assert not flash.ftl.read_run(lba, dma.allocate(2 * PAGE))
    assert not flash.ftl.read_run(5, dma.allocate(2 * PAGE)[8 : 8 + PAGE])
    flash.ftl.close()
    assert not flash.read_now(5, 1)


def test_a_change_in_between(flash, monkeypatch):
    """A page that is written anew, given back, or erased and used for something else while it is being read."""

    def overwritten():
        flash.write([3], version=1)

    def deallocated():
        flash.ftl.deallocate([[3, 1]])

    def reused():
        """Until the superblock has other data, of the same LBA among others."""
        for version in range(1, 40):
            flash.write(range(200), version)
        assert flash.media.counters.blocks_erased

    for change in (overwritten, deallocated, reused):
        flash.write(range(10))
        assert flash.read_now(3, 2)
        find = flash.ftl._runs.find

        def find_and_change(*arguments, find=find, change=change):
            run = find(*arguments)
            assert run is not None
            change()
            return run

        with monkeypatch.context() as patch:
            patch.setattr(flash.ftl._runs, "find", find_and_change)
            assert not flash.read_now(3, 1)
    assert flash.read_now(3, 1, version=39)


@pytest.mark.parametrize("flash", [{}, {"parity": 1}], indirect=True)
def test_damage(flash):
    """A flipped bit, another LBA's whole page: told or mended by the long way, as if there were no other."""
    flash.write(range(100))
    flash.ftl.flush()
    with open(flash.path, "rb") as file:
        other = os.pread(file.fileno(), PAGE, flash.place(50))
    for lba, content in ((7, b"\xff"), (9, other)):
        flash.change(flash.place(lba), content)
        assert not flash.read_now(lba, 1) and not flash.read_now(lba - 1, 3)
        assert flash.read_now(lba + 1, 1)
        if flash.geometry.parity:
            assert flash.read(lba) == lba
        else:
            with pytest.raises(CorruptPage):
                flash.read(lba)
    assert flash.ftl.counters.corrupt_pages == 2


def test_checksums_that_are_not_in_memory(flash):
    """After an opening the long way loads them; a page whose OOB is lost has none."""
    flash.write(range(100))
    flash.reopen()
    assert not flash.read_now(3, 1)
    assert flash.read(3) == 3
    assert flash.read_now(3, 1)
    page = int(flash.ftl.resolve(np.array([5]))[0])
    flash.reopen()
    superblock, index = divmod(page, flash.geometry.pages_per_superblock)
    flash.change(flash.media.layout.oob_of(superblock) + 64 * index, bytes(64))
    assert flash.read(3) == 3
    assert flash.read_now(3, 2) and not flash.read_now(3, 3)
    with pytest.raises(CorruptPage):
        flash.read(5)


def test_more_superblocks_than_columns(tmp_path, monkeypatch):
    """Columns make room for each other; what was just read by either way stays."""
    monkeypatch.setattr("ftl.checksums.COLUMNS_MIN_BYTES", 4 * 128 * 3)
    assert COLUMNS_MIN_BYTES > 4 * 128 * 3
    flash = Flash(tmp_path / "flash")
    size = flash.geometry.pages_per_superblock
    flash.write(range(6 * size))
    firsts = [number * size for number in range(6)]
    for first in firsts:
        assert flash.read(first) == first
        assert flash.read_now(first, 1)
    assert sum(flash.read_now(first, 1) for first in firsts) < 6
    for first in firsts[1:] * 3:
        flash.read_now(0, 1) or flash.read(0)
        assert flash.read(first) == first
        assert flash.read_now(0, 1), "used since the hand came by"
    flash.close()


def test_media_without_a_plain_file():
    """Flash in memory, modelled flash and whatever else counts or delays reads: always the long way."""
    media = MemoryMedia(Geometry(**SHAPE))
    ftl = FlashTranslationLayer.format(media)
    buffer = dma.allocate(PAGE)
    ftl.write(np.array([0]), dma.page_addresses(buffer, PAGE))
    assert not ftl.read_run(0, buffer)
