"""Flash on a zoned namespace: geometries, zones that are written further or less far than OOB tells, limits."""

import numpy as np
import pytest

from ftl.drive_layout import DriveLayout
from ftl.errors import (
    EraseFailed,
    MediaIoError,
    NandRuleViolation,
    NotADrive,
    ProgramFailed,
    ReadOnlyMedia,
    TruncatedDrive,
)
from ftl.geometry import Geometry
from ftl.layout import OOB_MAGIC, PAGE_OOB
from ftl.media_namespace import NamespaceMedia, holds_flash
from ftl.media_zoned import ZonedMedia, is_written
from ftl.oob import holds
from ftl.translation import FlashTranslationLayer
from ftl.zones import PAD
from spdk_glue import dma
from spdk_glue.command import IoOpcode, ZoneState
from spdk_glue.namespace import BlockNamespace
from tests.crash.pages import read_page, write_pages
from tests.unit.spdk_glue.memory_drive import MemoryDrive
from tests.unit.spdk_glue.zoned_drive import ZonedDrive

GEOMETRY = Geometry(num_channels=1, pages_per_erase_block=16, num_superblocks=12)
TABLES = 4  # zones
PAGE = 4096


def new_drive(**options):
    return ZonedDrive(num_zones=TABLES + 12, capacity_bytes=64 << 10, **options)


def zone_of(superblock):
    return TABLES + superblock


def program(media, superblock, indices, seed=0):
    buffer = dma.allocate(len(indices) * PAGE)
    buffer[:] = np.random.default_rng(seed).integers(0, 256, buffer.size, np.uint8)
    oob = np.zeros(len(indices), PAGE_OOB)
    oob["magic"], oob["lba"] = OOB_MAGIC, indices
    pages = superblock * 16 + np.array(indices)
    media.program(pages, dma.page_addresses(buffer, PAGE), oob)
    return buffer


def read(media, superblock, indices):
    buffer = dma.allocate(len(indices) * PAGE)
    media.read(superblock * 16 + np.array(indices), dma.page_addresses(buffer, PAGE))
    return buffer


def programmed(media, superblock):
    return np.flatnonzero(media.read_oob(superblock)["magic"]).tolist()


def cut_back(drive, superblock, num_bytes):
    """A power cut takes what was written of a zone last."""
    start = drive.starts[zone_of(superblock)]
    drive.pointers[zone_of(superblock)] = start + num_bytes // drive.block_bytes
    drive.blocks[drive.pointers[zone_of(superblock)] : start + drive.zone_lbas] = drive.unwritten


# what fits


@pytest.mark.parametrize("block_bytes", [512, 4096])
@pytest.mark.parametrize("max_active", [None, 7])
def test_a_geometry_that_fits(block_bytes, max_active):
    """The whole of it is taken: a superblock in each zone that tables do not need."""
    drive = ZonedDrive(40, 256 << 10, 132 << 10, block_bytes=block_bytes, max_active=max_active)
    geometry = NamespaceMedia.geometry_for(drive.host(), spare_percent=9)
    assert geometry == Geometry(num_channels=1, pages_per_erase_block=33, num_superblocks=35, spare_percent=9)
    media = NamespaceMedia.create(drive.host(), geometry)
    assert isinstance(media, ZonedMedia)
    assert media.max_open_superblocks == (max_active and max_active - 1)
    assert NamespaceMedia.geometry_for(drive.host(), page_size=16384).superblock_bytes == 128 << 10
    with pytest.raises(ValueError, match="no parity on a zoned namespace"):
        NamespaceMedia.geometry_for(drive.host(), parity=1)


def test_a_geometry_for_a_drive_without_zones():
    drive = MemoryDrive(block_bytes=4096, num_lbas=6000, signature=b"")
    geometry = NamespaceMedia.geometry_for(BlockNamespace(drive.transport))
    layout = DriveLayout.new(geometry)
    assert 6000 * 4096 - 2 * geometry.superblock_bytes < layout.size_bytes <= 6000 * 4096


@pytest.mark.parametrize(
    ("geometry", "options", "why"),
    [
        ({"num_channels": 4, "parity": 1, "pages_per_erase_block": 4}, {}, "no parity on a zoned namespace"),
        ({"num_channels": 4, "pages_per_erase_block": 4}, {}, "num_planes must be 1, not 4"),
        ({"pages_per_erase_block": 17}, {}, "a superblock of 69632 bytes in a zone that takes 65536"),
        ({"num_superblocks": 13}, {}, "has 16 zones, needed are 4 for tables, 13 for superblocks"),
        ({}, {"max_active": 4}, "4 zones may be active, needed are 5"),
        ({}, {"max_open": 3}, "3 zones may be active, needed are 5"),
    ],
)
def test_what_does_not_fit(geometry, options, why):
    """One clear error, before anything is changed."""
    drive = new_drive(**options)
    wanted = Geometry(**{"num_channels": 1, "pages_per_erase_block": 16, "num_superblocks": 12} | geometry)
    with pytest.raises(ValueError, match=why):
        NamespaceMedia.create(drive.host(), wanted)
    assert not [r for r in drive.seen if r.opcode in (IoOpcode.WRITE, IoOpcode.ZONE_MANAGEMENT_SEND)]


def test_opening_what_is_no_drive_of_ours():
    """Empty zones, zones of other sizes, and fewer of them than there were."""
    with pytest.raises(NotADrive, match="no zone begins with records"):
        NamespaceMedia.open(new_drive().host())
    with pytest.raises(NotADrive, match="zones of 6144 bytes"):
        NamespaceMedia.open(ZonedDrive(zone_bytes=6144).host())
    drive = new_drive()
    NamespaceMedia.create(drive.host(), GEOMETRY).close()
    drive.namespace["nsze"] = 15 * drive.zone_lbas
    drive.states, drive.starts = drive.states[:15], drive.starts[:15]
    drive.capacities, drive.pointers = drive.capacities[:15], drive.pointers[:15]
    with pytest.raises(TruncatedDrive):
        NamespaceMedia.open(drive.host())


def test_what_a_namespace_holds():
    """A drive, also one whose first zone was emptied; something else; nothing."""
    drive = new_drive()
    assert not holds_flash(drive.host()) and not is_written(drive.host())
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    for number in range(200):
        media._write_block(number % 2 * PAGE, media.layout.header)
        media.mark_bad(0, np.array([0]))
        if drive.states[0] == ZoneState.EMPTY:
            break
    assert drive.states[0] == ZoneState.EMPTY
    assert holds_flash(drive.host()) and is_written(drive.host())
    other = new_drive()
    other.states[3] = ZoneState.FULL
    assert is_written(other.host()) and not holds_flash(other.host())
    plain = MemoryDrive(block_bytes=4096, num_lbas=6000, signature=b"")
    assert not holds_flash(BlockNamespace(plain.transport))
    NamespaceMedia.create(
        BlockNamespace(plain.transport), Geometry(num_superblocks=8, pages_per_erase_block=16)
    )
    assert holds_flash(BlockNamespace(plain.transport))


def test_a_geometry_of_a_size():
    """Less than there is room for, in as many zones as that takes."""
    drive = ZonedDrive(40, 256 << 10, 128 << 10)
    assert NamespaceMedia.geometry_for(drive.host(), 20 * (128 << 10) + 5).num_superblocks == 20
    assert NamespaceMedia.geometry_for(drive.host(), 1 << 40) == NamespaceMedia.geometry_for(drive.host())
    with pytest.raises(ValueError, match="num_superblocks"):
        NamespaceMedia.geometry_for(drive.host(), 128 << 10)


def test_creating_over_something_else():
    """All zones are emptied; one that cannot be written is a bad superblock from the start."""
    drive = new_drive()
    drive.states[:] = ZoneState.FULL
    drive.states[zone_of(3)], drive.states[zone_of(7)] = ZoneState.READ_ONLY, ZoneState.OFFLINE
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    assert np.flatnonzero(media.bad_superblocks()).tolist() == [3, 7]
    assert [programmed(media, superblock) for superblock in range(12)] == [[]] * 12
    assert not media.programmed_superblocks().size
    media.close()
    assert np.flatnonzero(NamespaceMedia.open(drive.host()).bad_superblocks()).tolist() == [3, 7]


# power cuts


def test_a_zone_written_further_than_oob_tells():
    """Those pages cannot be programmed any more: they show as programmed, and as nothing."""
    drive = new_drive()
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    written = program(media, 2, range(3))
    extra = np.full(5 * 512, 7, np.uint8)
    media._backing._zones.append(zone_of(2), np.array([dma.address_of(extra)]), np.array([extra.nbytes]))
    for read_only in (True, False):
        media = NamespaceMedia.open(drive.host(), read_only)
        records = media.read_oob(2)
        assert np.flatnonzero(records["magic"]).tolist() == [0, 1, 2, 3]
        assert np.flatnonzero(holds(records)).tolist() == [0, 1, 2]
    with pytest.raises(NandRuleViolation):
        program(media, 2, [3])
    later = program(media, 2, [4, 5, 9], seed=3)
    np.testing.assert_array_equal(read(media, 2, [0, 1, 2]), written)
    np.testing.assert_array_equal(read(media, 2, [4, 5, 9]), later)
    assert programmed(NamespaceMedia.open(drive.host()), 2) == [0, 1, 2, 4, 5, 9]


@pytest.mark.parametrize("unwritten", [0, 0xFF])
def test_a_zone_written_less_far_than_oob_tells(unwritten):
    """A page that never came is not one of zeros, not now and not when it was gone over."""
    drive = new_drive(unwritten=unwritten)
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    written = program(media, 2, range(5))
    cut_back(drive, 2, 2 * PAGE + 512)
    for _ in range(2):
        media = NamespaceMedia.open(drive.host())
        assert programmed(media, 2) == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(read(media, 2, [0, 1]), written[: 2 * PAGE])
        assert read(media, 2, [3, 4]).tobytes() == PAD.tobytes() * 2
        assert read(media, 2, [2])[512:].tobytes() in (PAD[512:].tobytes(), PAD[:-512].tobytes())
    again = program(media, 2, [5])
    np.testing.assert_array_equal(read(media, 2, [5]), again)


def test_a_zone_without_oob_is_reset():
    """Nothing of it exists: neither after an erase whose reset is missing, nor where all OOB was lost."""
    drive = new_drive()
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    program(media, 2, range(16))
    media._backing.clear(media.layout.oob_of(2), media.layout.oob_stride)
    buffer = dma.allocate(PAGE)
    media._backing._zones.append(zone_of(5), np.array([dma.address_of(buffer)]), np.array([PAGE]))
    read_only = NamespaceMedia.open(drive.host(), read_only=True)
    assert [programmed(read_only, superblock) for superblock in (2, 5)] == [[], []]
    assert [drive.states[zone_of(superblock)] for superblock in (2, 5)] == [
        ZoneState.FULL,
        ZoneState.IMPLICITLY_OPEN,
    ]
    media = NamespaceMedia.open(drive.host())
    assert [drive.states[zone_of(superblock)] for superblock in (2, 5)] == [ZoneState.EMPTY] * 2
    for superblock in (2, 5):
        written = program(media, superblock, [0, 1])
        np.testing.assert_array_equal(read(media, superblock, [0, 1]), written)


def test_an_erase_whose_oob_came_back():
    """The reset was done, and the tables know nothing of it: what is missing there is torn, and is erased
    again."""
    drive = new_drive()
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    program(media, 2, range(10))
    cut_back(drive, 2, 0)
    drive.states[zone_of(2)] = ZoneState.EMPTY
    media = NamespaceMedia.open(drive.host())
    assert programmed(media, 2) == list(range(10))
    assert read(media, 2, [0]).tobytes() == PAD.tobytes()
    written = program(media, 2, [10])
    np.testing.assert_array_equal(read(media, 2, [10]), written)
    media.erase(2)
    assert programmed(media, 2) == []


def test_damaged_tables_are_read_only():
    """A record that was whole and is gone: whatever it said, an older version of it must not be built upon."""
    drive = new_drive()
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    before = int(drive.pointers[0])
    program(media, 0, [0])
    program(media, 1, [0])
    drive.blocks[before + 8] ^= 1
    media = NamespaceMedia.open(drive.host())
    assert media.read_only
    with pytest.raises(ReadOnlyMedia):
        program(media, 2, [0])


# limits and wear


def test_active_zones():
    """A superblock that is closed makes room for another; one that is not must not be given up."""
    drive = new_drive(max_active=5)
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    for superblock in range(4):
        program(media, superblock, [0, 1])
    with pytest.raises(NandRuleViolation, match="4 superblocks are written at once"):
        program(media, 8, [0])
    media.closed(2)
    media.closed(11)  # nothing was written there
    program(media, 4, [0])
    assert drive.states[zone_of(2)] == ZoneState.FULL
    program(media, 1, [2])
    assert programmed(media, 2) == list(range(16))  # none of it can be programmed any more
    media.erase(1)
    program(media, 5, range(16))  # full at once
    program(media, 6, [0])
    media.closed(0)
    program(media, 0, [2])  # whoever opened the layer anew goes on with it
    with pytest.raises(NandRuleViolation):
        program(media, 7, [0])


def test_a_full_superblock_in_a_zone_that_takes_more():
    """It would stay active for ever."""
    drive = ZonedDrive(TABLES + 12, capacity_bytes=100 << 10, max_active=5)
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    for superblock in range(12):
        program(media, superblock, range(16))
    assert drive.num_in([ZoneState.FULL]) >= 12


@pytest.mark.parametrize("state", [ZoneState.READ_ONLY, ZoneState.OFFLINE])
def test_zones_that_wear_out(state):
    """As erase blocks do: the program or the erase fails, and the superblock is bad."""
    drive = new_drive()
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    program(media, 2, range(4))
    drive.states[zone_of(2)] = state
    with pytest.raises(ProgramFailed) as caught:
        program(media, 2, range(4, 8))
    assert (caught.value.superblock, caught.value.planes.tolist()) == (2, [0])
    with pytest.raises(EraseFailed) as failure:
        media.erase(2)
    assert (failure.value.superblock, failure.value.planes.tolist()) == (2, [0])
    media = NamespaceMedia.open(drive.host())
    assert np.flatnonzero(media.bad_superblocks()).tolist() == [2]
    found = read(media, 2, [0])
    assert (found.tobytes() == PAD.tobytes()) == (state == ZoneState.OFFLINE)


def test_an_error_that_is_not_wear():
    """The superblock is not bad for it."""
    drive = new_drive()
    media = NamespaceMedia.create(drive.host(), GEOMETRY)
    program(media, 2, [0])
    drive.device._handlers[True].pop(IoOpcode.WRITE)
    with pytest.raises(MediaIoError):
        program(media, 2, [1])
    assert not media.bad_superblocks().any()


@pytest.mark.parametrize("max_active", [5, 6, None])
def test_the_whole_layer(max_active):
    """Many streams over few active zones, collection and reopening; the drive refuses what breaks its rules."""
    drive = ZonedDrive(34, capacity_bytes=64 << 10, max_active=max_active)
    media = NamespaceMedia.create(drive.host(), NamespaceMedia.geometry_for(drive.host()))
    ftl = FlashTranslationLayer.format(media, checkpoint_pages=100)
    assert ftl.num_streams == {5: 1, 6: 2, None: 3}[max_active]
    random = np.random.default_rng(1)
    newest = {}
    for number in range(1, 200):
        first = int(random.integers(ftl.num_lbas - 9))
        write_pages(ftl, range(first, first + 9), number * 1000, stream=number % 5)
        newest |= {lba: number * 1000 + lba for lba in range(first, first + 9)}
        if number % 40 == 0:
            ftl.close()
            media.close()
            media = NamespaceMedia.open(drive.host())
            ftl = FlashTranslationLayer.open(media, checkpoint_pages=100)
    assert {lba: read_page(ftl, lba) for lba in newest} == newest
    assert ftl.counters.gc_pages_written > 0 and not ftl.check()
    ftl.close()
    media.close()


def test_a_worn_zone_costs_no_data():
    """What it holds is moved, and a drive of one die does not give up its die for it."""
    drive = ZonedDrive(44, capacity_bytes=64 << 10)
    geometry = NamespaceMedia.geometry_for(drive.host(), spare_percent=25)
    ftl = FlashTranslationLayer.format(NamespaceMedia.create(drive.host(), geometry))
    tables = 44 - geometry.num_superblocks
    for number in range(5):
        write_pages(ftl, range(20), number * 1000)
        found = ftl._writer._open[0]
        drive.states[tables + found.superblock] = ZoneState.READ_ONLY
    write_pages(ftl, range(20), 9000)
    assert [read_page(ftl, lba) for lba in range(20)] == [9000 + lba for lba in range(20)]
    assert np.count_nonzero(ftl.media.bad_superblocks()) == 5
    ftl.close()
    again = FlashTranslationLayer.open(NamespaceMedia.open(drive.host()))
    assert [read_page(again, lba) for lba in range(20)] == [9000 + lba for lba in range(20)]
