"""Flash on a raw NVMe namespace: what differs from a file."""

import numpy as np
import pytest

from ftl.drive_layout import HEADERS_BYTES, DriveLayout
from ftl.errors import BackingFull, MediaIoError, NotADrive, TruncatedDrive
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, OOB_MAGIC, PAGE_OOB
from ftl.media_namespace import NamespaceMedia
from ftl.page_writer import GC_STREAM, LOG_STREAM
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma
from spdk_glue.command import IoOpcode
from spdk_glue.namespace import BlockNamespace, Namespace
from spdk_glue.status import CommandFailed, NotAKvfsDrive, Status
from spdk_glue.transports.inproc import InprocTransport
from tests.unit.spdk_glue.memory_drive import MemoryDrive, PlacementDrive

GEOMETRY = Geometry(num_channels=4, pages_per_erase_block=8, num_superblocks=8)
PER_SUPERBLOCK = GEOMETRY.pages_per_superblock


class OtherDrive(MemoryDrive):
    """A drive without kvfs commands that can be told to fail commands of an opcode."""

    def __init__(self, **options):
        self.failing = {}  # opcode to status
        super().__init__(signature=b"", **options)

    def note(self, requests):
        super().note(requests)
        for request in requests:
            if request.opcode in self.failing:
                request.fail(CommandFailed(self.failing[request.opcode], lba=request.first_lba))

    def host(self):
        return BlockNamespace(InprocTransport(self.device))


@pytest.fixture
def drive():
    return OtherDrive(mdts=3)


def program(media, pages, seed=0, stream=0):
    pages = np.asarray(pages)
    buffer = dma.allocate(len(pages) * GEOMETRY.page_size)
    buffer[:] = np.random.default_rng(seed).integers(1, 256, buffer.size, np.uint8)
    oob = np.zeros(len(pages), PAGE_OOB)
    oob["magic"], oob["lba"] = OOB_MAGIC, pages
    media.program(pages, dma.page_addresses(buffer, GEOMETRY.page_size), oob, stream)
    return buffer


def read(media, pages):
    buffer = dma.allocate(len(pages) * GEOMETRY.page_size)
    media.read(np.asarray(pages), dma.page_addresses(buffer, GEOMETRY.page_size))
    return buffer


def test_any_drive(drive):
    """Blocks of a drive that knows nothing of attention; as a kvfs drive it is still refused."""
    namespace = drive.host()
    content = dma.allocate(1024)
    content[:] = 7
    namespace.write(3, content)
    np.testing.assert_array_equal(namespace.read(3, 2), content)
    with pytest.raises(NotAKvfsDrive):
        Namespace(InprocTransport(drive.device))


def test_few_commands(drive):
    """Consecutive pages travel together, up to the drive's limit; scattered ones by themselves."""
    drive.controller["mdts"] = 5  # 128 KiB
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    drive.seen.clear()
    program(media, np.arange(16))
    writes = [request.num_lbas * 512 for request in drive.seen if request.opcode == IoOpcode.WRITE]
    assert writes == [16 * 4096, BLOCK_BYTES]  # payload, then the block of OOB
    drive.seen.clear()
    read(media, [0, 1, 2, 9, 10, 4])
    assert [request.num_lbas * 512 // 4096 for request in drive.seen] == [3, 2, 1]
    media.close()


def test_an_erase_deallocates_and_a_sync_flushes(drive):
    """The drive below learns what is free, and is asked to make things durable."""
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    program(media, np.arange(PER_SUPERBLOCK))
    drive.seen.clear()
    media.erase(0)
    media.sync()
    assert [request.opcode for request in drive.seen][-2:] == [IoOpcode.DATASET_MANAGEMENT, IoOpcode.FLUSH]
    start = media.layout.data_start // 512
    assert not drive.blocks[start : start + GEOMETRY.superblock_bytes // 512].any()
    media.close()


def test_a_drive_full_of_something_else(drive):
    """Creating wipes what could be taken for ours."""
    drive.blocks[:] = 0xEE
    with pytest.raises(NotADrive):
        NamespaceMedia.open(drive.host())
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    for superblock in range(8):
        assert not media.read_oob(superblock)["magic"].any()
    assert not media.bad_blocks().any()
    media.close()
    NamespaceMedia.open(drive.host()).close()


def test_drives_that_do_not_fit(drive):
    """Too small, or with blocks that the format cannot address."""
    with pytest.raises(ValueError, match="bytes are needed"):
        NamespaceMedia.create(drive.host(), Geometry(num_superblocks=8))
    large = OtherDrive(block_bytes=16384)
    with pytest.raises(ValueError, match="16384 bytes"):
        NamespaceMedia.create(large.host(), GEOMETRY)
    with pytest.raises(NotADrive, match="16384 bytes"):
        NamespaceMedia.open(large.host())
    with_metadata = OtherDrive()
    with_metadata.namespace["lbaf"]["ms"] = 8
    with pytest.raises(ValueError, match="8 of metadata"):
        NamespaceMedia.create(with_metadata.host(), GEOMETRY)
    with pytest.raises(NotADrive, match="8 of metadata"):
        NamespaceMedia.open(with_metadata.host())
    drive.blocks.reshape(-1)[:HEADERS_BYTES] = np.frombuffer(
        DriveLayout.new(Geometry(num_superblocks=16)).header * 2, np.uint8
    )
    with pytest.raises(TruncatedDrive):
        NamespaceMedia.open(drive.host())


@pytest.mark.parametrize(
    ("status", "expected"),
    [(Status.CAPACITY_EXCEEDED, BackingFull), (Status.LBA_OUT_OF_RANGE, MediaIoError)],
)
def test_errors_of_the_drive(drive, status, expected):
    """What the drive fails is a media error with its place, as a disk's is; nothing else is lost."""
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    written = program(media, np.arange(6))
    drive.failing[IoOpcode.WRITE] = status
    with pytest.raises(expected) as caught:
        program(media, np.arange(6, 12))
    assert caught.value.offset == media.layout.data_start + 6 * 4096
    assert "NVMe drive MEMORY" in str(caught.value)
    drive.failing.clear()
    np.testing.assert_array_equal(read(media, np.arange(6)), written)
    assert np.count_nonzero(media.read_oob(0)["magic"]) == 6
    drive.failing[IoOpcode.FLUSH] = status
    with pytest.raises(expected):
        media.sync()
    drive.failing = {IoOpcode.READ: status}
    with pytest.raises(expected):
        read(media, np.arange(6))
    with pytest.raises(MediaIoError):
        NamespaceMedia.open(drive.host())
    media.close()


def placed(drive, media, superblock):
    """Placement identifiers of a superblock's payload."""
    first, stop = (media.layout.data_of(number) // drive.block_bytes for number in (superblock, superblock + 1))
    return set(drive.placed[first:stop].tolist()) - {drive.NEVER}


@pytest.mark.parametrize(
    ("placement_ids", "expected"),
    [
        ([3, 9, 4], {0: 9, 1: 4, 2: 9, 253: 4}),  # the first is for what is overwritten in place
        ([7], {0: 7, 5: 7}),
        ([], {0: PlacementDrive.UNPLACED}),
        (list(range(40, 60)), {0: 41, 18: 59, 19: 41}),
    ],
)
def test_streams_are_placed(placement_ids, expected):
    """What dies together lies together on the drive below, too; metadata lie apart from it."""
    drive = PlacementDrive(placement_ids)
    media = NamespaceMedia.create(BlockNamespace(drive.transport), GEOMETRY)
    for superblock, (stream, placement_id) in enumerate(expected.items()):
        program(media, superblock * PER_SUPERBLOCK + np.arange(5), stream=stream)
        assert placed(drive, media, superblock) == {placement_id}
    metadata = set(drive.placed[: media.layout.oob_end // 512].tolist())
    assert metadata == {drive.UNPLACED}
    media.close()


@pytest.mark.parametrize("change", ["disabled", "no group", "no such drive"])
def test_without_data_placement_no_directive_is_sent(change):
    """Drives refuse a directive that they do not know."""
    drive = PlacementDrive(is_enabled=change != "disabled")
    if change == "no group":
        drive.namespace["endgid"] = 0
    if change == "no such drive":
        drive.controller["ctratt"] = 0
    media = NamespaceMedia.create(BlockNamespace(drive.transport), GEOMETRY)
    program(media, np.arange(5), stream=3)
    assert placed(drive, media, 0) == {drive.UNPLACED}
    media.close()


def test_placement_of_the_whole_layer():
    """Each stream goes by one identifier: the host's, collection and the log, resumed streams too."""
    geometry = Geometry(num_channels=4, pages_per_erase_block=2, num_superblocks=40)
    drive = PlacementDrive(range(1, 254), block_bytes=4096)
    media = NamespaceMedia.create(BlockNamespace(drive.transport), geometry)
    ftl = FlashTranslationLayer.format(media)
    buffer = dma.allocate(5 * 4096)
    addresses = dma.page_addresses(buffer, 4096)
    random = np.random.default_rng(1)
    streams = set()
    for number in range(300):
        ftl.write(int(random.integers(ftl.num_lbas - 5)) + np.arange(5), addresses, stream=number % 3)
        for stream, found in ftl._writer._open.items():
            last = int(ftl._state.superblocks.fill[found.superblock]) - 1
            if last >= 0:
                lba = media.layout.data_of(found.superblock) // 4096 + last
                assert drive.placed[lba] == drive.placement_ids[1 + stream % 252]
                streams.add(stream)
        if number % 50 == 25:
            ftl.deallocate([[number % ftl.num_lbas, 1]])
            ftl.close()
            ftl = FlashTranslationLayer.open(media)
    assert streams == {0, 1, 2, GC_STREAM}
    log = ftl._log._log.superblocks[-1]
    assert placed(drive, media, log) >= {drive.placement_ids[1 + LOG_STREAM % 252]}
    ftl.close()
    media.close()
