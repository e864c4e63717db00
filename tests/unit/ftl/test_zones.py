"""Zones as the media see them: how far each is written, padding, limits, and what a failure leaves."""

import numpy as np
import pytest

from ftl.errors import MediaIoError
from ftl.zones import PAD, Zones
from spdk_glue import dma
from spdk_glue.command import IoOpcode, ZoneState
from spdk_glue.status import CommandFailed, Status
from tests.unit.spdk_glue.zoned_drive import ZonedDrive

ZONE = 128 << 10


def append(zones, zone, *sizes):
    buffer = dma.allocate(sum(sizes))
    buffer[:] = np.random.default_rng(sum(sizes)).integers(1, 256, sum(sizes), np.uint8)
    lengths = np.array(sizes)
    zones.append(zone, dma.address_of(buffer) + np.cumsum(lengths) - lengths, lengths)
    return buffer


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_append_and_pad(block_bytes):
    """What comes next goes behind what is there; a hole is filled, with something that is no page of zeros."""
    drive = ZonedDrive(block_bytes=block_bytes)
    zones = Zones(drive.host())
    first = append(zones, 2, 4096, 8192)
    zones.pad(2, 5 * 4096)
    zones.pad(2, 4 * 4096)  # is there
    second = append(zones, 2, 4096)
    assert (zones.written[2], zones.is_active[2], zones.start(2)) == (6 * 4096, True, 2 * ZONE)
    found = drive.blocks.reshape(-1)[2 * ZONE :][: 6 * 4096]
    assert found.tobytes() == first.tobytes() + PAD.tobytes() * 2 + second.tobytes()
    again = Zones(drive.host())
    assert (again.written.tolist(), again.is_active.tolist()) == (
        zones.written.tolist(),
        zones.is_active.tolist(),
    )


def test_padding_begins_where_a_cut_ended():
    """In the middle of a page, where the drive's blocks are smaller."""
    drive = ZonedDrive()
    zones = Zones(drive.host())
    append(zones, 0, 4096 + 512)
    zones.pad(0, 3 * 4096)
    assert zones.written[0] == 3 * 4096
    zones.pad(0, ZONE)
    assert (drive.states[0], zones.is_active[0]) == (ZoneState.FULL, False)


def test_life_of_a_zone():
    drive = ZonedDrive(capacity_bytes=100 << 10)
    zones = Zones(drive.host())
    assert zones.capacity.tolist() == [100 << 10] * 16
    zones.finish(0)  # is not active
    assert drive.states[0] == ZoneState.EMPTY
    append(zones, 0, 4096)
    zones.finish(0)
    assert (drive.states[0], zones.written[0], zones.is_active[0]) == (ZoneState.FULL, 100 << 10, False)
    zones.reset(0)
    assert (drive.states[0], zones.written[0], zones.is_active[0]) == (ZoneState.EMPTY, 0, False)
    append(zones, 0, 100 << 10)
    assert (drive.states[0], zones.is_active[0]) == (ZoneState.FULL, False)


def test_a_capacity_that_is_no_whole_blocks():
    """What is left of it is never written, so the zone stays active until it is finished."""
    drive = ZonedDrive(capacity_bytes=(8 << 10) + 512)
    zones = Zones(drive.host())
    append(zones, 0, 8 << 10)
    assert (zones.capacity[0], zones.written[0], zones.is_active[0]) == (8 << 10, 8 << 10, True)
    zones.finish(0)
    assert (drive.states[0], zones.is_active[0]) == (ZoneState.FULL, False)


@pytest.mark.parametrize(
    ("max_active", "max_open", "expected"), [(None, None, None), (9, None, 9), (None, 4, 4), (9, 4, 4)]
)
def test_limits(max_active, max_open, expected):
    """The stricter one: whatever is written has to be open."""
    assert Zones(ZonedDrive(max_active=max_active, max_open=max_open).host()).max_active == expected


@pytest.mark.parametrize("state", [ZoneState.READ_ONLY, ZoneState.OFFLINE])
def test_zones_that_wore_out(state):
    """Found so, or becoming so: not used any more; what is read-only may be full of data."""
    drive = ZonedDrive()
    zones = Zones(drive.host())
    append(zones, 1, 4096)
    drive.states[1] = state
    with pytest.raises(MediaIoError) as caught:
        append(zones, 1, 4096)
    assert caught.value.offset == ZONE + 4096
    assert (zones.is_usable[1], zones.is_offline[1], zones.written[1]) == (
        False,
        state == ZoneState.OFFLINE,
        4096,
    )
    with pytest.raises(MediaIoError):
        zones.reset(1)
    again = Zones(drive.host())
    assert (again.is_usable[1], again.is_active[1], again.written[1]) == (False, False, ZONE)


def test_after_a_failure_the_drive_is_asked():
    """Part of what was to be written may be there."""
    drive = ZonedDrive(mdts=1)
    zones = Zones(drive.host())
    original, drive.seen = drive.write, []

    def fails_at_third(requests):
        original(requests)
        if len([r for r in drive.seen if r.opcode == IoOpcode.WRITE]) == 2:
            drive.io_handlers[IoOpcode.WRITE] = fails
            drive.device._handlers[True][IoOpcode.WRITE] = fails

    def fails(requests):
        for request in requests:
            request.fail(CommandFailed(Status.WRITE_FAULT))

    drive.device._handlers[True][IoOpcode.WRITE] = fails_at_third
    with pytest.raises(MediaIoError):
        append(zones, 0, 8 << 12)
    assert (zones.written[0], zones.is_usable[0], zones.is_active[0]) == (4 << 12, True, True)


def test_zones_that_cannot_be_used():
    """Not of whole blocks of ours, or of conventional zones."""
    with pytest.raises(ValueError, match="zones of 6144 bytes"):
        Zones(ZonedDrive(zone_bytes=6144).host())
