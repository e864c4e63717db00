"""A drive's file when the disk under it is full, broken or not writable, and damaged ones."""

import errno
import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ftl.direct_io.api import crc32c_records
from ftl.drive_layout import HEADERS_BYTES, DriveLayout
from ftl.errors import (
    BackingFull,
    FormatVersionTooNew,
    MediaIoError,
    NotADrive,
    ReadOnlyMedia,
    TruncatedDrive,
)
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, DRIVE_HEADER, ERASE_BLOCK, OOB_MAGIC, PAGE_OOB
from ftl.media_file import FileMedia
from spdk_glue import dma

GEOMETRY = Geometry(num_channels=4, pages_per_erase_block=8, num_superblocks=8)
PER_SUPERBLOCK = GEOMETRY.pages_per_superblock


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "flash"
    FileMedia.create(path, GEOMETRY).close()
    return path


def program(media, pages, seed=0):
    pages = np.asarray(pages)
    buffer = dma.allocate(len(pages) * GEOMETRY.page_size)
    buffer[:] = np.random.default_rng(seed).integers(1, 256, buffer.size, np.uint8)
    oob = np.zeros(len(pages), PAGE_OOB)
    oob["magic"], oob["lba"] = OOB_MAGIC, pages
    media.program(pages, dma.page_addresses(buffer, GEOMETRY.page_size), oob)
    return buffer


def read(media, pages):
    buffer = dma.allocate(len(pages) * GEOMETRY.page_size)
    media.read(np.asarray(pages), dma.page_addresses(buffer, GEOMETRY.page_size))
    return buffer


def fail(media, monkeypatch, method, number, after=0):
    """Let a method of the store fail with an errno after some calls that work."""
    works, calls = getattr(media._backing, method), [0]

    def failing(*arguments):
        calls[0] += 1
        if calls[0] > after:
            raise (BackingFull if number == errno.ENOSPC else MediaIoError)(number, media.path, 4096)
        return works(*arguments)

    monkeypatch.setattr(media._backing, method, failing)


def edit_header(path, copies=(0, 1), **fields):
    """Change fields of copies of the header, with a checksum that holds."""
    with path.open("r+b") as file:
        for copy in copies:
            file.seek(copy * BLOCK_BYTES)
            header = np.frombuffer(file.read(BLOCK_BYTES), DRIVE_HEADER).copy()
            for name, value in fields.items():
                header[name] = value
            header["crc32c"] = crc32c_records(header)
            file.seek(copy * BLOCK_BYTES)
            file.write(header.tobytes())


def write_at(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


# the disk under it


def test_full_disk(path, monkeypatch):
    """No room for a program: nothing programmed before is lost, and with room again the drive goes on."""
    media = FileMedia.open(path)
    written = program(media, np.arange(6))
    with monkeypatch.context() as patch:
        fail(media, patch, "program_pages", errno.ENOSPC)
        with pytest.raises(BackingFull) as caught:
            program(media, np.arange(6, 12))
        assert isinstance(caught.value, MediaIoError)
        assert caught.value.errno == errno.ENOSPC
        assert "No space left" in str(caught.value)
    np.testing.assert_array_equal(read(media, np.arange(6)), written)
    assert np.flatnonzero(media.read_oob(0)["magic"]).tolist() == list(range(6))
    again = program(media, PER_SUPERBLOCK + np.arange(6), seed=1)
    media.sync()
    media.erase(0)
    program(media, np.arange(6), seed=2)
    np.testing.assert_array_equal(read(media, PER_SUPERBLOCK + np.arange(6)), again)
    media.close()


def test_a_really_full_disk(tmp_path):
    """The same on a file system without room, erases included: they must free space, not need it."""
    mount = tmp_path / "mount"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        media = FileMedia.create(mount / "flash", GEOMETRY)
        contents = []
        with pytest.raises(BackingFull):
            for superblock in range(8):
                contents.append(
                    program(media, superblock * PER_SUPERBLOCK + np.arange(PER_SUPERBLOCK), superblock)
                )
        assert 1 <= len(contents) < 8
        media.erase(len(contents))  # of the failed program
        media.erase(0)
        contents[0] = program(media, np.arange(PER_SUPERBLOCK), seed=77)
        media.sync()
        media.close()
        media = FileMedia.open(mount / "flash")
        for superblock, content in enumerate(contents):
            pages = superblock * PER_SUPERBLOCK + np.arange(PER_SUPERBLOCK)
            np.testing.assert_array_equal(read(media, pages), content)
            assert media.read_oob(superblock)["lba"].tolist() == pages.tolist()
        media.close()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_no_room_to_create(tmp_path):
    """A drive that cannot be made leaves no half of one behind."""
    with pytest.raises(FileNotFoundError):
        FileMedia.create(tmp_path / "nowhere" / "flash", GEOMETRY)
    (tmp_path / "taken").write_text("precious")
    with pytest.raises(FileExistsError):
        FileMedia.create(tmp_path / "taken", GEOMETRY)
    assert (tmp_path / "taken").read_text() == "precious"


@pytest.mark.parametrize("method", ["read_pages", "program_pages", "read_extents", "write_extents", "clear"])
def test_io_errors(path, monkeypatch, method):
    """A broken disk: one clear error with errno and place, and no harm to what is on it."""
    media = FileMedia.open(path)
    written = program(media, np.arange(6))
    with monkeypatch.context() as patch:
        fail(media, patch, method, errno.EIO)
        with pytest.raises(MediaIoError, match="Input/output error at offset 4096"):
            {
                "read_pages": lambda: read(media, np.arange(6)),
                "program_pages": lambda: program(media, np.arange(6, 9)),
                "read_extents": lambda: media.read_oob(0),
                "write_extents": lambda: media.mark_bad(1, np.array([0])),
                "clear": lambda: media.erase(1),
            }[method]()
    np.testing.assert_array_equal(read(media, np.arange(6)), written)
    media.close()


def test_a_failed_erase_of_good_blocks_only(path, monkeypatch):
    """Beside a bad block the OOB is rewritten: when that fails, memory must not believe it happened."""
    media = FileMedia.open(path)
    program(media, np.arange(PER_SUPERBLOCK))
    media.mark_bad(0, np.array([2]))
    with monkeypatch.context() as patch:
        fail(media, patch, "write_extents", errno.EIO, after=1)  # the first one is the table's
        with pytest.raises(MediaIoError):
            media.erase(0)
    assert media.read_oob(0)["magic"].all()
    media.erase(0)
    assert np.count_nonzero(media.read_oob(0)["magic"]) == GEOMETRY.pages_per_erase_block
    media.close()


def test_a_failed_sync_is_final(path, monkeypatch):
    """The kernel may have dropped what it could not write: a later sync must not promise it."""
    media = FileMedia.open(path)
    program(media, np.arange(6))
    with monkeypatch.context() as patch:
        fail(media, patch, "sync", errno.EIO)
        with pytest.raises(MediaIoError):
            media.sync()
    with pytest.raises(MediaIoError):
        media.sync()
    media.close()
    media = FileMedia.open(path)
    media.sync()
    media.close()


def test_without_holes(path, monkeypatch):
    """A file system that cannot punch holes: erased flash must read as erased nevertheless."""
    media = FileMedia.open(path)
    monkeypatch.setattr(media._backing, "punch_hole", lambda offset, length: False)
    program(media, np.arange(6))
    media.erase(0)
    assert not media.read_oob(0)["magic"].any()
    program(media, np.arange(6), seed=1)
    media.close()


def test_space_is_given_back(path):
    """Closing gives back what was erased, and nothing of what was written since."""
    media = FileMedia.open(path)
    first = media.geometry.pages_per_superblock
    program(media, np.arange(6))
    program(media, first + np.arange(6))
    media.erase(0)
    media.erase(1)
    written = program(media, first + np.arange(6), seed=1)
    media.sync()
    before = path.stat().st_blocks
    media.close()
    given_back = (before - path.stat().st_blocks) * 512
    assert 6 * media.geometry.page_size <= given_back < 12 * media.geometry.page_size
    media = FileMedia.open(path)
    np.testing.assert_array_equal(read(media, first + np.arange(6)), written)
    media.close()


def test_a_file_that_may_only_be_read(path):
    """Where reading is allowed and asked for, it works and changes nothing."""
    media = FileMedia.open(path)
    written = program(media, np.arange(6))
    media.close()
    path.chmod(stat.S_IRUSR)
    before = path.read_bytes()
    media = FileMedia.open(path, read_only=True)
    np.testing.assert_array_equal(read(media, np.arange(6)), written)
    with pytest.raises(ReadOnlyMedia):
        media.erase(0)
    media.close()
    assert path.read_bytes() == before
    if os.geteuid() != 0:
        with pytest.raises(PermissionError):
            FileMedia.open(path)


def test_shrunk_while_open(path):
    """Somebody truncates the file under us: an error, not zeros."""
    media = FileMedia.open(path)
    program(media, np.arange(6))
    os.truncate(path, media.layout.data_start + GEOMETRY.page_size)
    with pytest.raises(MediaIoError):
        read(media, np.arange(6))
    media.close()


# the header


def test_header_copies(path):
    """Either copy of the header is enough, whatever is wrong with the other; opening mends it."""
    whole = path.read_bytes()
    for copy in (0, 1):
        for damage in (bytes(BLOCK_BYTES), os.urandom(BLOCK_BYTES), os.urandom(8)):
            write_at(path, copy * BLOCK_BYTES, damage)
            FileMedia.open(path, read_only=True).close()
            assert path.read_bytes() != whole
            FileMedia.open(path).close()
            assert path.read_bytes() == whole
        edit_header(path, copies=[copy], oob_start=1 << 40)  # a lie with a checksum that holds
        FileMedia.open(path).close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("page_size", 0, "page_size must be"),
        ("page_size", 12288, "page_size must be"),
        ("num_channels", 0, "num_channels must be"),
        ("num_channels", 0xFFFFFFFF, "does not fit"),
        ("num_superblocks", 0, "num_superblocks must be"),
        ("num_superblocks", 1 << 63, "more than 2"),
        ("num_lbas", 1 << 63, "num_lbas does not fit"),
        ("num_lbas", 0, "num_lbas does not fit"),
        ("erase_block_table_start", 0, "erase_block_table_start does not fit"),
        ("erase_block_table_start", 1 << 62, "erase_block_table_start does not fit"),
        ("oob_start", 4096, "oob_start does not fit"),
        ("oob_stride", 0, "oob_stride does not fit"),
        ("data_start", 3, "data_start does not fit"),
        ("format_version", 1, "format version 1 is not supported any more"),
    ],
)
def test_headers_that_lie(path, field, value, why):
    """Checksums prove that the header is what was written, not that it makes sense."""
    edit_header(path, **{field: value})
    with pytest.raises(NotADrive, match=why):
        FileMedia.open(path)


def test_geometry_larger_than_the_file(path):
    """A header that fits together and claims more than there is."""
    header = np.frombuffer(DriveLayout.new(Geometry(num_superblocks=1 << 20)).header, DRIVE_HEADER)
    edit_header(path, **{name: header[name] for name in DRIVE_HEADER.names if name != "crc32c"})
    with pytest.raises(TruncatedDrive):
        FileMedia.open(path)


def test_newer_versions(path):
    edit_header(path, format_version=99)
    with pytest.raises(FormatVersionTooNew, match="99"):
        FileMedia.open(path)


def test_what_is_no_drive(tmp_path):
    """Empty, short, foreign and special files."""
    for content in (b"", b"x", bytes(BLOCK_BYTES), os.urandom(1 << 16), b"SQLite format 3\0" * 1000):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(NotADrive):
            FileMedia.open(path)
    with pytest.raises(OSError, match="directory"):
        FileMedia.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        FileMedia.open(tmp_path / "missing")


# the erase-block table


def test_a_damaged_table_makes_the_drive_read_only(path, caplog):
    """Which blocks are bad is not known any more: the data can be had, nothing more is risked."""
    media = FileMedia.open(path)
    written = program(media, np.arange(6))
    media.erase(3)
    media.close()
    place = HEADERS_BYTES + 3 * GEOMETRY.num_planes * ERASE_BLOCK.itemsize
    for offset in (0, 4, 8, 12):  # every field of the record
        content = path.read_bytes()
        write_at(path, place + offset, b"\xaa")
        media = FileMedia.open(path)
        assert media.read_only
        assert "erase-block table damaged (1 records, first of superblock 3)" in caplog.text
        np.testing.assert_array_equal(read(media, np.arange(6)), written)
        with pytest.raises(ReadOnlyMedia):
            program(media, np.array([6]))
        media.close()
        path.write_bytes(content)
    FileMedia.open(path).close()


# threads


def test_superblocks_at_once(path):
    """Records of several superblocks share a block of the table: a mark of one must not undo another's."""
    media = FileMedia.open(path)

    def work(superblock):
        for _ in range(30):
            program(media, superblock * PER_SUPERBLOCK + np.arange(4))
            media.erase(superblock)
        media.mark_bad(superblock, np.array([superblock % 4]))
        program(media, superblock * PER_SUPERBLOCK + (superblock + np.array([1])) % 4, superblock)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    media.close()
    media = FileMedia.open(path)
    assert media.erase_counts().tolist() == [30] * 8
    assert np.argwhere(media.bad_blocks()).tolist() == [[superblock, superblock % 4] for superblock in range(8)]
    for superblock in range(8):
        assert np.flatnonzero(media.read_oob(superblock)["magic"]).tolist() == [(superblock + 1) % 4]
    media.close()
