"""What an administrator sees of a drive and asks of it, as NVMe commands."""

import numpy as np
import pytest

from accel.drive import CollectorOptions, Drive, DriveConfig
from ftl.check import Kind
from ftl.geometry import Geometry
from ftl.superblocks import State
from spdk_glue import command
from spdk_glue.command import LBA_STATUS_DESCRIPTOR, LBA_STATUS_HEADER, Maintenance
from spdk_glue.flash_admin import FlashAdmin
from spdk_glue.identify import ONCS_VERIFY, WARNING_READ_ONLY, WARNING_SPARE
from spdk_glue.namespace import Namespace
from spdk_glue.status import NvmeStatusError, Status
from tests.unit.accel.conftest import blocks

CONFIG = DriveConfig(cache_bytes=8 << 20, num_workers=1, worker="reference", num_command_threads=0)


def open_drive(path, parity=0, config=CONFIG, **shape):
    if not path.exists():
        Drive.format(path, Geometry(pages_per_erase_block=32, num_superblocks=48, parity=parity, **shape))
    return Drive.open(path, config)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "drive"


@pytest.fixture(params=[0, 1], ids=["plain", "parity"])
def drive(request, path):
    drive = open_drive(path, request.param)
    yield drive
    drive.close()


def flip(path, drive, lbas):
    """A bit of each page, as the flash might."""
    pages = drive.ftl.resolve(np.array(lbas))
    with path.open("r+b") as file:
        for page in pages.tolist():
            offset = drive.ftl.media.layout.data_start + page * 4096 + 77
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 8]))


def test_verify(drive, namespace):
    """Verify moves nothing and passes where all is well, also over blocks that were never written."""
    namespace.write(10, blocks(2000))
    namespace.deallocate([(100, 50)])
    before = drive.transport.counters.as_dict()
    namespace.verify(0, namespace.num_lbas)
    assert namespace.lost(0, namespace.num_lbas) == []
    after = drive.transport.counters.as_dict()
    assert after["bytes_from_drive"] - before["bytes_from_drive"] < 1000
    assert namespace.controller["oncs"] & ONCS_VERIFY
    with pytest.raises(NvmeStatusError) as caught:
        namespace.verify(namespace.num_lbas - 1, 2)
    assert caught.value.status == Status.LBA_OUT_OF_RANGE


LOST = [17, 18, 19, 700, 1300, 1999]


def test_lost_pages_are_named(path):
    """Without parity: the error names the first one, and a scrub learns all of them."""
    drive = open_drive(path)
    namespace = Namespace(drive.transport)
    namespace.write(0, blocks(2000))
    flip(path, drive, LOST)
    with pytest.raises(NvmeStatusError) as caught:
        namespace.verify(0, 2000)
    assert (caught.value.status, caught.value.lba) == (Status.UNRECOVERED_READ_ERROR, 17)
    namespace.verify(20, 600)
    assert namespace.lost(0, 2000) == LOST
    assert namespace.lost(18, 600) == [18, 19]
    assert FlashAdmin(namespace).health()["repaired_pages"] == 0
    assert FlashAdmin(namespace).smart()["media_errors"] >= len(LOST)
    drive.close()


def test_repair_and_renewal(path):
    """With parity: Verify repairs, renewal moves what is damaged, and then the same fault costs nothing."""
    drive = open_drive(path, parity=1)
    namespace, data = Namespace(drive.transport), blocks(2000)
    flash = FlashAdmin(namespace)
    namespace.write(0, data)
    namespace.flush()
    damaged = [lba for lba in LOST if lba not in (18, 19)]  # one per row: more is beyond its parity
    flip(path, drive, damaged)
    before = drive.ftl.resolve(np.array(damaged))
    namespace.verify(0, 2000)
    health = flash.health()
    assert health["repaired_pages"] == len(damaged)
    wanted = int(health["damaged_superblocks"])
    assert wanted == flash.superblocks()["is_damaged"].sum() == len({int(page) // 256 for page in before})
    assert flash.renew() == wanted
    assert flash.health()["damaged_superblocks"] == 0
    assert (drive.ftl.resolve(np.array(damaged)) != before).all()
    np.testing.assert_array_equal(namespace.read(0, 2000), data)
    repaired = flash.health()["repaired_pages"]
    namespace.verify(0, 2000)
    assert flash.health()["repaired_pages"] == repaired
    assert flash.smart()["media_errors"] == 0
    assert flash.check()[0] == 0
    drive.close()


def test_allocated(drive, namespace, monkeypatch):
    """Get LBA Status: the runs of blocks that are written, whatever the size of an answer."""
    assert list(namespace.allocated()) == []
    namespace.write(5, blocks(300))
    namespace.deallocate([(10, 1), (100, 50)])
    namespace.write(namespace.num_lbas - 1, blocks(1))
    want = [(5, 5), (11, 89), (150, 155), (namespace.num_lbas - 1, 1)]
    assert list(namespace.allocated()) == want
    monkeypatch.setattr("spdk_glue.held_blocks.STATUS_DESCRIPTORS", 1)
    monkeypatch.setattr("accel.flash_commands.LBAS_AT_ONCE", 7)
    assert list(namespace.allocated()) == want


def test_get_lba_status_of_strangers(drive, namespace):
    """Bad fields: a status each."""
    data = np.zeros(LBA_STATUS_HEADER.itemsize + LBA_STATUS_DESCRIPTOR.itemsize, np.uint8)
    good = command.get_lba_status(0, data.nbytes)
    for field, value, status in (
        ("cdw13", 0x10 << 24, Status.INVALID_FIELD),
        ("cdw13", 2 << 24 | 9, Status.INVALID_FIELD),
        ("cdw11", 1, Status.LBA_OUT_OF_RANGE),
    ):
        entry = good.copy()
        entry[field] = value
        with pytest.raises(NvmeStatusError) as caught:
            namespace.admin(entry, data)
        assert caught.value.status == status
    with pytest.raises(NvmeStatusError) as caught:
        namespace.admin(good, data[:4])
    assert caught.value.status == Status.SGL_LENGTH_INVALID
    with pytest.raises(NvmeStatusError) as caught:
        namespace.admin(command.flash_maintenance(9))
    assert caught.value.status == Status.INVALID_FIELD


def test_collect(drive, namespace):
    """Maintenance collects what it was told to, and stops where nothing is gained."""
    flash = FlashAdmin(namespace)
    assert flash.collect() == 0
    count = namespace.num_lbas // 2
    namespace.write(0, blocks(count))
    for first in range(0, count, 4):
        namespace.deallocate([(first, 3)])
    assert flash.collect(1) == 1
    collected = flash.collect()
    assert collected > 3
    health = flash.health()
    assert health["superblocks_erased"] >= collected
    assert health["gc_pages_written"] > 0
    assert health["free_superblocks"] > 30
    kept = np.arange(3, count, 4)
    np.testing.assert_array_equal(
        namespace.read(0, count).reshape(-1, 4096)[kept], blocks(count).reshape(-1, 4096)[kept]
    )
    assert flash.check()[0] == 0


def test_health(drive, namespace):
    """The health log: every counter of the flash layer, superblocks by state, and the table behind them."""
    flash = FlashAdmin(namespace)
    namespace.write(0, blocks(1000))
    namespace.flush()
    health, superblocks = flash.health(), flash.superblocks()
    for name, value in drive.ftl.counters.as_dict().items():
        assert health[name] == value, name
    states = [f"{state.name.lower()}_superblocks" for state in State]
    assert sum(int(health[name]) for name in states) == health["num_superblocks"] == len(superblocks)
    for state in State:
        assert np.count_nonzero(superblocks["state"] == state.name.lower().encode()) == health[states[state]]
    assert superblocks["valid_pages"].sum() == health["mapped_pages"] == 1000
    assert health["num_parity_dies"] == drive.ftl.geometry.parity
    assert health["lifetime_pages_programmed"] == health["media_pages_programmed"]
    assert health["lifetime_versions"] >= 1000
    parts = ("gc_pages_written", "parity_pages_written", "metadata_pages_written", "host_pages_written")
    assert sum(int(health[name]) for name in parts) == health["media_pages_programmed"]


def test_smart_tells_wear_and_spare(path):
    """SMART: life used follows erase counts, spare follows bad blocks, and both warn."""
    config = DriveConfig(8 << 20, 1, "reference", 0, collector=CollectorOptions(rated_cycles=10))
    drive = open_drive(path, config=config)
    flash = FlashAdmin(Namespace(drive.transport))
    smart = flash.smart()
    fresh = smart["available_spare"], smart["percentage_used"], smart["critical_warning"]
    assert [int(value) for value in fresh] == [100, 0, 0]
    found = drive.ftl.superblocks
    found.erase_counts[:] = 4
    assert flash.smart()["percentage_used"] == 40
    found.erase_counts[:] = 10000
    assert flash.smart()["percentage_used"] == 255
    free = found.of(State.FREE)
    spares = []
    for superblock in free[:14].tolist():
        found.bad_planes[superblock] = True
        found.capacity[superblock] = 0
        found.states[superblock] = State.BAD
        spares.append(int(flash.smart()["available_spare"]))
    assert spares == sorted(spares, reverse=True)
    assert spares[-1] < 10
    assert flash.smart()["critical_warning"] == WARNING_SPARE
    assert flash.health()["bad_erase_blocks"] == 14 * drive.ftl.geometry.num_planes
    drive.close()


def test_check_reports_findings(drive, namespace):
    """The drive's own check: findings come over as records, with what they are about."""
    flash = FlashAdmin(namespace)
    namespace.write(0, blocks(100))
    assert flash.check()[0] == 0
    entries = drive.ftl._state.mapping.entries
    entries[[50, 60]] = entries[[60, 50]]
    count, findings = flash.check()
    wrong = findings[findings["kind"] == Kind.WRONG_LBA.encode()]
    assert {(int(f["lba"]), int(f["found"])) for f in wrong} == {(50, 60), (60, 50)}
    assert count == len(findings)
    entries[[50, 60]] = entries[[60, 50]]


def test_read_only(path):
    """A drive opened for reading: verified and checked, but not changed."""
    drive = open_drive(path)
    namespace = Namespace(drive.transport)
    namespace.write(0, blocks(100))
    drive.close()
    config = DriveConfig(8 << 20, 1, "reference", 0, read_only=True)
    drive = open_drive(path, config=config)
    namespace = Namespace(drive.transport)
    flash = FlashAdmin(namespace)
    namespace.verify(0, 100)
    assert flash.check()[0] == 0
    assert flash.smart()["critical_warning"] == WARNING_READ_ONLY
    for action in (flash.collect, flash.renew):
        with pytest.raises(NvmeStatusError) as caught:
            action()
        assert caught.value.status == Status.NAMESPACE_WRITE_PROTECTED
    assert Maintenance.CHECK == 3
    drive.close()


def test_collection_is_an_option(path):
    """An unknown policy is refused before anything is opened; a known one reaches the flash layer."""
    with pytest.raises(ValueError, match="choose one of greedy"):
        CollectorOptions(policy="lazy")
    config = DriveConfig(8 << 20, 1, "reference", collector=CollectorOptions(policy="cost-benefit"))
    drive = open_drive(path, config=config)
    assert drive.ftl.options.policy == "cost-benefit"
    assert drive.ftl._background is not None
    drive.close()
    drive = open_drive(path)
    assert drive.ftl._background is None  # nothing happens by itself in a drive without threads
    drive.close()
