"""The host's view of a zoned namespace: what it is, its zones, and writes that keep to their order."""

import numpy as np
import pytest

from spdk_glue import dma
from spdk_glue.command import CommandSet, IoOpcode, ZoneState
from spdk_glue.dma import EXTENT
from spdk_glue.identify import ZONES_UNLIMITED, Cns
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import NvmeStatusError, Status
from tests.unit.spdk_glue.memory_drive import MemoryDrive, PlacementDrive
from tests.unit.spdk_glue.zoned_drive import ZonedDrive

ZONE = 128 << 10


def extents(buffer, offset, pieces=1):
    size = buffer.nbytes // pieces
    found = np.zeros(pieces, EXTENT)
    found["address"] = dma.address_of(buffer) + np.arange(pieces) * size
    found["offset"], found["length"] = offset + np.arange(pieces) * size, size
    return found


def random_bytes(size, seed=0):
    buffer = dma.allocate(size)
    buffer[:] = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return buffer


def status_of(call) -> int:
    with pytest.raises(NvmeStatusError) as caught:
        call()
    return caught.value.status


def test_command_sets():
    """Any drive says what it is, or is too old to; others than zoned ones are not asked for zones."""
    assert ZonedDrive().host().command_set() == CommandSet.ZONED
    assert BlockNamespace(MemoryDrive().transport).command_set() == CommandSet.NVM
    assert BlockNamespace(PlacementDrive().transport).command_set() == CommandSet.NVM
    drive = MemoryDrive()
    drive.identities[Cns.NAMESPACE_DESCRIPTORS] = np.zeros(4096, np.uint8)
    assert BlockNamespace(drive.transport).command_set() == CommandSet.NVM


def test_limits():
    """MAR and MOR count from zero, and may be none."""
    limits, zone_lbas = ZonedDrive(max_active=14, max_open=7).host().zoned()
    assert (int(limits["mar"]), int(limits["mor"]), zone_lbas) == (13, 6, ZONE // 512)
    limits, zone_lbas = ZonedDrive(block_bytes=4096).host().zoned()
    assert (int(limits["mar"]), int(limits["mor"]), zone_lbas) == (ZONES_UNLIMITED, ZONES_UNLIMITED, 32)


@pytest.mark.parametrize(("num_zones", "mdts"), [(3, 0), (200, 1), (63, 1), (64, 1), (1100, 5)])
def test_zones_are_reported_in_pieces(num_zones, mdts):
    """A drive has thousands; one report holds what one transfer does."""
    drive = ZonedDrive(num_zones=num_zones, zone_bytes=4096, capacity_bytes=3072, mdts=mdts)
    found = drive.host().zones()
    assert len(found) == num_zones
    assert found["first_lba"].tolist() == list(range(0, num_zones * 8, 8))
    assert set(found["capacity"].tolist()) == {6}
    assert set((found["state"] >> 4).tolist()) == {ZoneState.EMPTY}
    assert drive.host().zones(16, max_zones=1)["first_lba"].tolist() == [16]


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_a_zone_s_life(block_bytes):
    """Empty, open, full; reset, and its blocks are gone."""
    drive = ZonedDrive(block_bytes=block_bytes)
    host = drive.host()
    content = random_bytes(ZONE)
    host.write_in_order(extents(content[:8192], ZONE, 2))

    def zone():
        found = host.zones(ZONE // block_bytes, max_zones=1)[0]
        return int(found["state"]) >> 4, int(found["write_pointer"]) - ZONE // block_bytes

    assert zone() == (ZoneState.IMPLICITLY_OPEN, 8192 // block_bytes)
    again = dma.allocate(8192)
    host.read_extents(extents(again, ZONE))
    np.testing.assert_array_equal(again, content[:8192])
    host.write_in_order(extents(content[8192:], ZONE + 8192))
    assert zone()[0] == ZoneState.FULL
    host.reset_zone(ZONE // block_bytes)
    assert zone() == (ZoneState.EMPTY, 0)
    host.finish_zone(ZONE // block_bytes)
    assert zone()[0] == ZoneState.FULL


def test_writes_in_order_are_outstanding_one_at_a_time():
    """What is outstanding together may be executed in any order, and a zone takes but one."""
    drive = ZonedDrive(mdts=1)
    content = random_bytes(64 << 10)
    drive.host().write_in_order(extents(content, 0, 4))
    assert [request.num_lbas for request in drive.seen if request.opcode == IoOpcode.WRITE] == [16] * 8
    assert drive.blocks[:128].tobytes() == content.tobytes()
    drive.host().reset_zone(0)
    assert status_of(lambda: drive.host().write_extents(extents(content, 0, 4))) == Status.ZONE_INVALID_WRITE


def test_a_failure_ends_what_is_written_in_order():
    """The rest would come to lie in a wrong place, or fail as well."""
    drive = ZonedDrive(capacity_bytes=16 << 10, mdts=1)
    content = random_bytes(24 << 10)
    assert status_of(lambda: drive.host().write_in_order(extents(content, 0, 3))) == Status.ZONE_IS_FULL
    assert len([request for request in drive.seen if request.opcode == IoOpcode.WRITE]) == 3
    assert drive.blocks[:32].tobytes() == content[: 16 << 10].tobytes()


def test_rules():
    """What the drive of these tests refuses: it stands for all that there are."""
    drive = ZonedDrive(num_zones=8, capacity_bytes=ZONE // 2, max_active=3, max_open=2)
    host = drive.host()
    block = random_bytes(512)

    def write(zone, lba=0):
        host.write_in_order(extents(block, zone * ZONE + lba * 512))

    assert status_of(lambda: write(0, 1)) == Status.ZONE_INVALID_WRITE
    for zone in range(3):
        write(zone)
    assert drive.num_in([ZoneState.IMPLICITLY_OPEN]) == 2
    assert status_of(lambda: write(3)) == Status.TOO_MANY_ACTIVE_ZONES
    host.finish_zone(0)
    write(3)
    assert status_of(lambda: write(0, 1)) == Status.ZONE_IS_FULL
    big = random_bytes(ZONE // 2 + 512)
    drive.controller["mdts"] = 0
    assert status_of(lambda: drive.host().write_in_order(extents(big, ZONE * 5))) == Status.ZONE_BOUNDARY_ERROR
    assert status_of(lambda: drive.host().read(ZONE // 512 - 1, 2)) == Status.ZONE_BOUNDARY_ERROR
    drive.states[1], drive.states[2] = ZoneState.READ_ONLY, ZoneState.OFFLINE
    assert status_of(lambda: write(1, 1)) == Status.ZONE_IS_READ_ONLY
    assert host.read(ZONE // 512, 1).tobytes() == block.tobytes()
    assert status_of(lambda: write(2, 1)) == Status.ZONE_IS_OFFLINE
    assert status_of(lambda: host.read(2 * ZONE // 512, 1)) == Status.ZONE_IS_OFFLINE
    assert status_of(lambda: host.reset_zone(ZONE // 512)) == Status.INVALID_ZONE_STATE_TRANSITION
