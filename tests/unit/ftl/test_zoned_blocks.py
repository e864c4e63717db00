"""Blocks in zones: whatever is written and zeroed is what is read, also by who opens them later."""

import numpy as np
import pytest

from ftl.errors import BackingFull, MediaIoError, NotADrive
from ftl.layout import BLOCK_BYTES, ZONE_RECORD
from ftl.zoned_blocks import ZonedBlocks, zones_needed
from ftl.zones import Zones
from spdk_glue import dma
from spdk_glue.command import IoOpcode, ZoneState
from spdk_glue.dma import EXTENT
from tests.unit.spdk_glue.zoned_drive import ZonedDrive

NUM_BLOCKS = 40


def drive_with(num_zones=None, capacity_blocks=20, **options):
    capacity = capacity_blocks * BLOCK_BYTES
    num_zones = num_zones or zones_needed(NUM_BLOCKS, capacity)
    drive = ZonedDrive(num_zones=num_zones + 1, capacity_bytes=capacity, **options)
    return drive, ZonedBlocks.create(Zones(drive.host()), NUM_BLOCKS, num_zones)


def reopened(drive, read_only=False):
    return ZonedBlocks.open(Zones(drive.host()), read_only)


def write(blocks, first, *values):
    """A value for each block, from one on."""
    buffer = dma.allocate(len(values) * BLOCK_BYTES)
    buffer.reshape(len(values), -1)[:] = np.array(values)[:, None]
    blocks.write_extents(np.array([(dma.address_of(buffer), first * BLOCK_BYTES, buffer.nbytes)], EXTENT))


def read(blocks, first=0, count=NUM_BLOCKS):
    buffer = dma.allocate(count * BLOCK_BYTES)
    buffer[:] = 99
    blocks.read_extents(np.array([(dma.address_of(buffer), first * BLOCK_BYTES, buffer.nbytes)], EXTENT))
    rows = buffer.reshape(count, -1)
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].tolist()


def headers(drive):
    """(block of the drive, record) of everything that looks like the header of a record."""
    rows = drive.blocks.reshape(-1, BLOCK_BYTES)
    records = rows.view(ZONE_RECORD)[:, 0]
    return [(place, records[place]) for place in np.flatnonzero(records["magic"] == 0x525A564B).tolist()]


def test_scattered_extents():
    """Several places of memory in one batch, and a block of it twice."""
    drive, blocks = drive_with()
    buffer = dma.allocate(3 * BLOCK_BYTES)
    buffer.reshape(3, -1)[:] = np.array([[1], [2], [3]])
    address = dma.address_of(buffer)
    extents = [(address + 4096, 4096, 8192), (address, 5 * 4096, 4096), (address + 8192, 4096, 4096)]
    blocks.write_extents(np.array(extents, EXTENT))
    assert read(blocks, 0, 7) == read(reopened(drive), 0, 7) == [0, 3, 3, 0, 0, 1, 0]


def test_what_is_there():
    drive, blocks = drive_with()
    write(blocks, 3, 1, 2)
    write(blocks, 9, 1)
    blocks.clear(4 * BLOCK_BYTES, BLOCK_BYTES)
    expected = [(3 * BLOCK_BYTES, 4 * BLOCK_BYTES), (9 * BLOCK_BYTES, 10 * BLOCK_BYTES)]
    for each in (blocks, reopened(drive)):
        assert list(each.written_ranges(0, NUM_BLOCKS * BLOCK_BYTES)) == expected
        assert list(each.written_ranges(4 * BLOCK_BYTES, 9 * BLOCK_BYTES)) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_any_order_for_ever(seed, block_bytes):
    """Zones are emptied again and again; opened now and then, also to be read only, they hold the same."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    drive, blocks = drive_with(capacity_blocks=int(random.choice([16, 20, 31])), block_bytes=block_bytes)
    expected = np.zeros(NUM_BLOCKS, np.int64)
    for number in range(250):
        count = int(random.integers(1, 9))
        first = int(random.integers(NUM_BLOCKS - count + 1))
        if random.random() < 0.3:
            blocks.clear(first * BLOCK_BYTES, count * BLOCK_BYTES)
            expected[first : first + count] = 0
        else:
            expected[first : first + count] = random.integers(1, 99, count)
            write(blocks, first, *expected[first : first + count].tolist())
        if number % 37 == 0:
            assert read(reopened(drive, read_only=True)) == expected.tolist()
            if random.random() < 0.5:
                blocks = reopened(drive)
        assert read(blocks) == expected.tolist()
    assert not blocks.is_damaged
    assert len([r for r in drive.seen if r.opcode == IoOpcode.ZONE_MANAGEMENT_SEND]) > 20
    assert drive.num_in([ZoneState.IMPLICITLY_OPEN, ZoneState.CLOSED]) <= 1


def test_zones_for_so_many_blocks():
    """Half of them are to be living at most; three are the least that can be written, emptied and free."""
    assert [zones_needed(count, 100 * BLOCK_BYTES) for count in (1, 50, 51, 100, 1000)] == [3, 3, 4, 4, 22]


def test_a_torn_record_is_not_there():
    """Whichever block of it is missing: the record before it counts, and the next one goes behind."""
    for kept in range(4):
        drive, blocks = drive_with()
        write(blocks, 0, 1, 2, 3)
        before = int(drive.pointers[0])
        write(blocks, 0, 4, 5, 6)
        drive.pointers[0] = before + kept * BLOCK_BYTES // 512 + 3  # in the middle of a block, too
        drive.blocks[int(drive.pointers[0]) : drive.zone_lbas] = 0
        assert read(reopened(drive, read_only=True), 0, 4) == [1, 2, 3, 0]
        blocks = reopened(drive)
        write(blocks, 1, 7)
        again = reopened(drive)
        assert read(again, 0, 4) == [1, 7, 3, 0]
        assert not again.is_damaged


@pytest.mark.parametrize("num_missing", [7, 8])
def test_a_torn_record_stays_torn(num_missing):
    """What it lacks is zeros, and so may be what a zone shows that was finished: it must not become whole."""
    drive, blocks = drive_with()
    write(blocks, 0, 1)
    while blocks._room() > 6:
        write(blocks, 9, 3)
    buffer = dma.allocate(2 * BLOCK_BYTES)
    buffer[:512] = 2
    size = BLOCK_BYTES if num_missing == 7 else 2 * BLOCK_BYTES
    blocks.write_extents(np.array([(dma.address_of(buffer), 0, size)], EXTENT))
    drive.pointers[0] -= num_missing
    blocks = reopened(drive)
    write(blocks, 5, 1, 2, 3, 4)  # does not fit any more
    assert drive.states[0] == ZoneState.FULL
    assert read(reopened(drive), 0, 2) == [1, 0]


def test_a_record_that_was_whole_and_is_not():
    """Damage is no power cut: what comes behind says that something is missing."""
    drive, blocks = drive_with()
    write(blocks, 0, 1)
    write(blocks, 0, 2)
    write(blocks, 1, 3)
    place, _ = headers(drive)[1]
    drive.blocks.reshape(-1)[(place + 1) * BLOCK_BYTES] ^= 1
    again = reopened(drive)
    assert again.is_damaged
    assert read(again, 0, 2) == [1, 3]


def test_headers_of_an_earlier_life():
    """A drive may show what was there before a reset where nothing was written since."""
    drive, blocks = drive_with()
    for value in range(6):
        write(blocks, 0, value)
    old = drive.blocks[: drive.zone_lbas].copy()
    zones = Zones(drive.host())
    zones.reset(0)
    fresh = ZonedBlocks.create(zones, NUM_BLOCKS, blocks.num_zones)
    fresh._sequence_number = 100
    write(fresh, 0, 50)
    start, stop = int(drive.pointers[0]), drive.zone_lbas
    drive.host().finish_zone(0)
    drive.blocks[start:stop] = old[start:stop]
    assert read(reopened(drive), 0, 1) == [50]


def test_what_is_not_ours():
    """Empty zones, other content, a record that lies elsewhere than where it was written."""
    drive, blocks = drive_with()
    with pytest.raises(NotADrive):
        reopened(drive)
    write(blocks, 0, 1)
    content = drive.blocks[: 2 * BLOCK_BYTES // 512].copy()
    zones = Zones(drive.host())
    for zone in (0, 3):
        zones.reset(0)
        zones.append(zone, np.array([dma.address_of(content)]), np.array([content.nbytes]))
        if zone:
            with pytest.raises(NotADrive):
                reopened(drive)
        else:
            assert read(reopened(drive), 0, 1) == [1]


def test_no_zone_left():
    """Zones that can only be read take no part; when none is free any more, that is an error, and no loss."""
    drive, blocks = drive_with(capacity_blocks=16)
    with pytest.raises(BackingFull):
        for number in range(200):
            write(blocks, number % NUM_BLOCKS, number % 90 + 1)
            if number % 3 == 0:
                drive.states[blocks._open] = ZoneState.READ_ONLY
                with pytest.raises(MediaIoError):
                    write(blocks, 0, 1)
    assert read(blocks) == read(reopened(drive, read_only=True))
