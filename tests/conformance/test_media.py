"""One suite over every flash medium: the NAND rules, and what is programmed is what is read."""

import numpy as np
import pytest

from ftl.direct_io.api import crc32c_pages, crc32c_records
from ftl.errors import CorruptPage, DriveBusy, NandRuleViolation, NotADrive, ReadOnlyMedia, TruncatedDrive
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, OOB_MAGIC, PAGE_OOB
from ftl.media_file import FileMedia
from ftl.media_memory import MemoryMedia
from ftl.media_namespace import NamespaceMedia
from ftl.media_nand import NandMedia
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma
from spdk_glue.namespace import BlockNamespace
from spdk_glue.transports.inproc import InprocTransport
from tests.unit.spdk_glue.memory_drive import MemoryDrive
from tests.unit.spdk_glue.zoned_drive import ZonedDrive

GEOMETRY = Geometry(num_channels=4, pages_per_erase_block=8, num_superblocks=8)
ONE_PLANE = Geometry(num_channels=1, pages_per_erase_block=32, num_superblocks=8)  # a zone is an erase block
TABLE_ZONES = 3
PER_SUPERBLOCK = GEOMETRY.pages_per_superblock
assert ONE_PLANE.pages_per_superblock == PER_SUPERBLOCK


class ForgetfulDrive(MemoryDrive):
    """A drive of somebody else's, full of old data, which deallocates nothing."""

    def __init__(self):
        super().__init__(signature=b"")
        self.blocks[:] = 0xEE

    def deallocate(self, requests):
        self.note(requests)


class Medium:
    """How one kind of medium is made, and opened again after it was closed."""

    def __init__(self, kind, tmp_path):
        self.kind, self.path = kind, tmp_path / "flash"
        self.survives_closing = kind in ("file", "namespace", "zoned")
        self.geometry = ONE_PLANE if kind == "zoned" else GEOMETRY
        if kind == "namespace":
            self.drive = ForgetfulDrive()
        if kind == "zoned":
            self.drive = ZonedDrive(capacity_bytes=132 << 10, zone_bytes=256 << 10, unwritten=0xEE)

    def namespace(self):
        return BlockNamespace(InprocTransport(self.drive.device))

    def create(self):
        makers = {
            "memory": lambda: MemoryMedia(GEOMETRY),
            "nand": lambda: NandMedia(GEOMETRY, np.random.default_rng(0)),
            "file": lambda: FileMedia.create(self.path, GEOMETRY),
            "namespace": lambda: NamespaceMedia.create(self.namespace(), GEOMETRY),
            "zoned": lambda: NamespaceMedia.create(self.namespace(), ONE_PLANE),
        }
        return makers[self.kind]()

    def open(self, read_only=False):
        if self.kind == "file":
            return FileMedia.open(self.path, read_only)
        return NamespaceMedia.open(self.namespace(), read_only)

    def flip(self, media, page, byte):
        """Flip one bit of a page's payload, behind the medium's back."""
        if self.kind == "file":
            with self.path.open("r+b") as file:
                file.seek(media.layout.data_start + page * GEOMETRY.page_size + byte)
                old = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([old ^ 4]))
        elif self.kind == "namespace":
            start = media.layout.data_start + page * GEOMETRY.page_size + byte
            self.drive.blocks.reshape(-1)[start] ^= 4
        elif self.kind == "zoned":
            superblock, index = divmod(page, PER_SUPERBLOCK)
            start = (
                (TABLE_ZONES + superblock) * self.drive.zone_lbas * self.drive.block_bytes
                + index * GEOMETRY.page_size
                + byte
            )
            self.drive.blocks.reshape(-1)[start] ^= 4
        else:
            media.pages[page, byte] ^= 4


@pytest.fixture(params=["memory", "nand", "file", "namespace", "zoned"])
def medium(request, tmp_path):
    return Medium(request.param, tmp_path)


@pytest.fixture
def media(medium):
    media = medium.create()
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


def read(media, pages):
    buffer, addresses = pages_of(len(pages), seed=99)
    media.read(np.asarray(pages), addresses)
    return buffer


def plane_pages(superblock, plane):
    """A block's pages, in order."""
    return superblock * PER_SUPERBLOCK + np.arange(plane, PER_SUPERBLOCK, GEOMETRY.num_planes)


def test_read_what_was_programmed(media, medium):
    """Data, checksums and OOB of scattered pages, across superblocks."""
    pages = np.concatenate([np.arange(10), PER_SUPERBLOCK + np.arange(6)])
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
    found = media.programmed_superblocks().tolist()
    assert found == ([0, 1] if medium.kind != "namespace" else list(range(8)))
    assert media.counters.as_dict() | {"syncs": 1} == {
        "pages_read": 16, "pages_programmed": 16, "oob_pages_read": 32, "blocks_erased": 0, "syncs": 1,
    }  # fmt: skip


def test_oob(media):
    """The OOB is the only truth: its fields come back, with checksums, in the caller's copy too."""
    buffer, addresses = pages_of(5)
    oob = np.zeros(5, PAGE_OOB)
    oob["magic"], oob["kind"], oob["stream"], oob["session"] = OOB_MAGIC, 1, 7, 3
    oob["lba"] = [9, 1 << 40, 5, 0, 2]
    oob["sequence_number"] = oob["program_number"] = np.arange(5) + (1 << 50)
    media.program(np.array([0, 1, 2, 6, 7]), addresses, oob)
    records = media.read_oob(0)
    assert np.flatnonzero(records["magic"]).tolist() == [0, 1, 2, 6, 7]
    found = records[[0, 1, 2, 6, 7]]
    assert found.tobytes() == oob.tobytes()
    np.testing.assert_array_equal(found["oob_crc32c"], crc32c_records(found))
    np.testing.assert_array_equal(found["payload_crc32c"], crc32c_pages(addresses, GEOMETRY.page_size))
    pages = np.array([7, PER_SUPERBLOCK, 1, 6])
    single = media.read_oob_pages(pages)
    assert single.tobytes() == np.concatenate([oob[[4]], np.zeros(1, PAGE_OOB), oob[[1, 3]]]).tobytes()
    assert len(media.read_oob_pages(np.empty(0, np.int64))) == 0
    records["lba"] = single["lba"] = 0  # copies of what the flash holds
    assert media.read_oob(0)["lba"][1] == 1 << 40
    del buffer


def test_scattered_buffers(media):
    """Writers of the cache hand over pages from anywhere in memory."""
    buffer, addresses = pages_of(12, seed=5)
    order = np.random.default_rng(2).permutation(12)
    oob = np.zeros(12, PAGE_OOB)
    oob["magic"] = OOB_MAGIC
    media.program(np.arange(12), addresses[order], oob)
    wanted = buffer.reshape(12, -1)[order].reshape(-1)
    np.testing.assert_array_equal(read(media, np.arange(12)), wanted)


def test_empty_batches(media):
    """Nothing to do is nothing done."""
    nothing = np.empty(0, np.int64)
    media.program(nothing, nothing.astype(np.uint64), np.empty(0, PAGE_OOB))
    assert len(media.read(nothing, nothing.astype(np.uint64))) == 0


def test_nand_rules(media):
    """Programming twice, out of order or outside the flash: an FTL bug must not pass as success."""
    program(media, np.arange(8))
    program(media, np.array([16]))  # skipping is allowed, going back to what was skipped is not
    for pages in ([7], [16], [12], [GEOMETRY.num_pages], [-1], [0, GEOMETRY.num_pages]):
        with pytest.raises(NandRuleViolation):
            program(media, np.array(pages))
    if media.geometry.num_planes > 1:
        program(media, np.array([13, 14, 15]))
    for superblock in (-1, 8):
        with pytest.raises(NandRuleViolation):
            media.erase(superblock)
        with pytest.raises(NandRuleViolation):
            media.read_oob(superblock)
        with pytest.raises(NandRuleViolation):
            media.mark_bad(superblock, np.array([0]))
    with pytest.raises(NandRuleViolation):
        read(media, [GEOMETRY.num_pages])


def test_erase(media):
    """An erased superblock is programmable again, empty, and counts its wear; others keep their data."""
    program(media, np.arange(PER_SUPERBLOCK))
    kept = program(media, PER_SUPERBLOCK + np.arange(4), seed=2)
    media.erase(0)
    assert not media.read_oob(0)["magic"].any()
    assert media.erase_counts().tolist() == [1] + [0] * 7
    program(media, np.arange(4), seed=3)
    np.testing.assert_array_equal(read(media, PER_SUPERBLOCK + np.arange(4)), kept)
    assert media.counters.blocks_erased == media.geometry.num_planes
    assert len(media.read_counts()) == GEOMETRY.num_superblocks


def test_bad_blocks(media):
    """A grown bad block: what it held stays readable, nothing goes there again, its neighbours are used on."""
    if media.geometry.num_planes == 1:
        return
    written = program(media, np.arange(PER_SUPERBLOCK))
    assert not media.bad_blocks().any()
    media.mark_bad(0, np.array([1, 3]))
    assert np.argwhere(media.bad_blocks()).tolist() == [[0, 1], [0, 3]]
    assert not media.bad_superblocks().any()
    np.testing.assert_array_equal(read(media, np.arange(PER_SUPERBLOCK)), written)
    media.erase(0)
    bad = np.concatenate([plane_pages(0, 1), plane_pages(0, 3)])
    records = media.read_oob(0)
    assert sorted(np.flatnonzero(records["magic"])) == sorted(bad)
    np.testing.assert_array_equal(records["lba"][bad], bad)
    np.testing.assert_array_equal(read(media, bad), written.reshape(PER_SUPERBLOCK, -1)[bad].reshape(-1))
    for page in (1, 3, 5):
        with pytest.raises(NandRuleViolation):
            program(media, np.array([page]))
    again = program(media, np.array([0, 2, 4, 6]), seed=8)
    np.testing.assert_array_equal(read(media, [0, 2, 4, 6]), again)
    assert media.counters.blocks_erased == 2
    media.mark_bad(0, np.array([0, 2]))
    assert media.bad_superblocks().tolist() == [True] + [False] * 7
    with pytest.raises(NandRuleViolation):
        media.erase(0)


def test_bad_superblocks(media):
    """One without a good block: what it held stays readable, and it is neither programmed nor erased."""
    planes = np.arange(media.geometry.num_planes)
    written = program(media, np.arange(5))
    media.mark_bad(0, planes)
    media.mark_bad(2, planes)
    assert media.bad_superblocks().tolist() == [True, False, True] + 5 * [False]
    for superblock in (0, 2):
        with pytest.raises(NandRuleViolation):
            media.erase(superblock)
        with pytest.raises(NandRuleViolation):
            program(media, superblock * PER_SUPERBLOCK + np.array([5]))
    np.testing.assert_array_equal(read(media, np.arange(5)), written)
    assert np.count_nonzero(media.read_oob(0)["magic"]) == 5
    program(media, PER_SUPERBLOCK + np.arange(5))


def test_reopening(medium):
    """A restart: identity, content, wear, bad blocks and NAND state."""
    if not medium.survives_closing:
        return
    media = medium.create()
    written = program(media, np.arange(5))
    media.erase(3)
    media.erase(4)
    media.erase(4)
    plane = media.geometry.num_planes // 2
    media.mark_bad(4, np.array([plane]))
    if plane:
        media.erase(4)
    uuid, counts, bad = media.uuid, media.erase_counts(), media.bad_blocks()
    media.sync()
    media.close()
    for _ in range(2):
        media = medium.open()
        np.testing.assert_array_equal(read(media, np.arange(5)), written)
        assert (media.uuid, media.geometry, media.read_only) == (uuid, medium.geometry, False)
        np.testing.assert_array_equal(media.erase_counts(), counts)
        np.testing.assert_array_equal(media.bad_blocks(), bad)
        media.close()
    media = medium.open()
    erases = 2 + (plane > 0)
    assert (counts.tolist(), np.argwhere(bad).tolist()) == ([0, 0, 0, 1, erases, 0, 0, 0], [[4, plane]])
    media.read_oob(0)
    with pytest.raises(NandRuleViolation):
        program(media, np.array([4]))
    with pytest.raises(NandRuleViolation):
        program(media, 4 * PER_SUPERBLOCK + np.array([plane]))
    program(media, np.array([5]))
    media.close()


def test_read_only(medium):
    """A read-only drive is not changed, whatever is asked of it."""
    media = medium.create()
    written = program(media, np.arange(5))
    if medium.survives_closing:
        media.close()
        media = medium.open(read_only=True)
    else:
        media.read_only = True
    for change in (
        lambda: program(media, np.array([5])),
        lambda: media.erase(0),
        lambda: media.mark_bad(0, np.array([0])),
    ):
        with pytest.raises(ReadOnlyMedia):
            change()
    media.sync()
    np.testing.assert_array_equal(read(media, np.arange(5)), written)
    assert np.count_nonzero(media.read_oob(0)["magic"]) == 5
    assert not media.bad_blocks().any()
    assert not media.erase_counts().any()
    media.close()


def test_the_same_bytes_whatever_the_store(tmp_path):
    """A drive copied from a file to a namespace, or back, is the same drive."""
    file, namespace = Medium("file", tmp_path), Medium("namespace", tmp_path)
    images = []
    for medium in (file, namespace):
        media = medium.create()
        program(media, np.arange(PER_SUPERBLOCK + 3))
        media.mark_bad(1, np.array([0]))
        media.erase(1)
        program(media, PER_SUPERBLOCK + np.array([1, 2, 3]), seed=4)
        media.close()
        size = media.layout.size_bytes
        raw = file.path.read_bytes() if medium is file else namespace.drive.blocks.tobytes()
        images.append((raw[2 * BLOCK_BYTES : media.layout.oob_end], raw[media.layout.data_start : size]))
    (file_tables, file_pages), (namespace_tables, namespace_pages) = images
    assert file_tables == namespace_tables
    written = (PER_SUPERBLOCK + 4) * GEOMETRY.page_size
    assert file_pages[:written] == namespace_pages[:written]
    file.path.write_bytes(namespace.drive.blocks.tobytes())
    media = file.open()
    assert np.count_nonzero(media.read_oob(0)["magic"]) == PER_SUPERBLOCK
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


def test_bit_flips_are_caught(media, medium):
    """Corruption: never served, and the error says where."""
    ftl = FlashTranslationLayer.format(media)
    _buffer, addresses = pages_of(4)
    ftl.write(np.arange(4), addresses)
    page = int(ftl.resolve(np.array([2]))[0])
    medium.flip(media, page, 1000)
    with pytest.raises(CorruptPage) as caught:
        ftl.read(np.arange(4), addresses)
    assert (caught.value.lba, caught.value.physical_page) == (2, page)
    assert caught.value.expected_crc32c != caught.value.found_crc32c
    ftl.read(np.array([0, 1, 3]), addresses[:3])
