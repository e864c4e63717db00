"""The C of the Linux transport: its records, its length checks, and its ring over /dev/null.

/dev/null takes any io_uring command and does nothing, which is a drive that always succeeds.
"""

import errno
import os
import threading

import numpy as np
import pytest

from spdk_glue import command, dma
from spdk_glue.command import COMPLETION_ENTRY, SUBMISSION_ENTRY
from spdk_glue.linux_nvme._linux_nvme import ffi, lib
from spdk_glue.linux_nvme.api import Device, Ring, check_lengths, error_of, ioctl_transfer
from spdk_glue.queue_pair import QueuePair
from spdk_glue.status import ConnectionLost, QueueFull, QueuePairInUse
from spdk_glue.transports.linux import IoctlConnection, RingConnection

BLOCK = 4096
LIMIT = 64 * BLOCK


@pytest.fixture
def null():
    fd = os.open("/dev/null", os.O_RDWR)
    yield Device(fd, "/dev/null", BLOCK, LIMIT)
    os.close(fd)


@pytest.fixture
def ring(null):
    try:
        ring = Ring(null, 16)
        ring.transfer(*commands(1), 1)
    except (NotImplementedError, OSError):
        pytest.skip("this kernel has no io_uring commands on /dev/null")
    yield ring
    ring.close()


def commands(count):
    """(entries, addresses, lengths): reads of a block each, all into the same memory."""
    entries = command.read(np.arange(count), np.ones(count, np.int64))
    entries["cid"] = np.arange(count)
    memory = dma.allocate(BLOCK)
    return entries, np.full(count, dma.address_of(memory)), np.full(count, BLOCK)


def test_ioctl_numbers():
    """As linux/nvme_ioctl.h has them: another size is another number, which a kernel refuses."""
    found = [getattr(lib, name) for name in ("ADMIN_32", "IO_32", "ADMIN_64", "IO_64", "URING_IO")]
    assert found == [0xC0484E41, 0xC0484E43, 0xC0504E47, 0xC0504E48, 0xC0484E80]


@pytest.mark.parametrize(
    ("ctype", "record"), [("nvme_entry", SUBMISSION_ENTRY), ("nvme_completion", COMPLETION_ENTRY)]
)
def test_records(ctype, record):
    """C and Python read the same bytes."""
    assert ffi.sizeof(ctype) == record.itemsize
    for name in record.names:
        assert ffi.offsetof(ctype, name) == record.fields[name][1]


READ, WRITE = command.read(0, 2), command.write(0, 2)
ADMIN, IO = True, False


def with_fields(entry, **fields):
    entry = entry.copy()
    for name, value in fields.items():
        entry[name] = value
    return entry


@pytest.mark.parametrize(
    ("is_admin", "entry", "right"),
    [
        (IO, READ, [2 * BLOCK]),
        (IO, WRITE, [2 * BLOCK]),
        (IO, command.write(1 << 40, 64, placement_id=3), [LIMIT]),
        (IO, command.read(0, 65), []),
        (IO, with_fields(READ, opcode=0x7D), [2 * BLOCK]),  # zone append
        (IO, with_fields(READ, opcode=0x7A, cdw12=1023), [BLOCK]),  # zone management receive
        (IO, command.flush(), [0]),
        (IO, command.verify(0, 65536), [0]),
        (IO, command.deallocate(3), [48]),
        (IO, command.vendor(0x84, 1), [0]),
        (ADMIN, command.identify(1), [4096]),
        (ADMIN, command.get_log_page(2, 512), [512]),
        (ADMIN, command.get_log_page(2, 512, offset_bytes=4096), [512]),
        (ADMIN, command.get_log_page(2, (65536 + 2) * 4), []),  # above the limit
        (ADMIN, command.get_lba_status(0, 4096), [4096]),
        (ADMIN, command.flash_maintenance(1), [0]),
    ],
)
def test_lengths(is_admin, entry, right):
    """A drive moves what the command says: into memory that is too short that is somebody else's memory."""
    device = Device(-1, "/dev/none", BLOCK, LIMIT)
    near = {
        0,
        4,
        44,
        47,
        49,
        511,
        512,
        513,
        BLOCK - 1,
        BLOCK,
        BLOCK + 1,
        LIMIT - 1,
        LIMIT,
        LIMIT + 1,
        65 * BLOCK,
    }
    near |= {2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, (65536 + 2) * 4, 1 << 32, *right}
    allowed = set()
    for length in near:
        try:
            check_lengths(device, is_admin, entry, np.array([0]), np.array([length]))
        except ValueError:
            continue
        allowed.add(length)
    assert allowed == set(right)


@pytest.mark.parametrize(
    ("length", "is_right"), [(1, True), (LIMIT, True), (LIMIT + 1, False), (1 << 32, False)]
)
def test_lengths_of_vendor_commands(length, is_right):
    """What CDW12 means there is the vendor's affair; the kernel's limit stays."""
    device, entry = Device(-1, "/dev/none", BLOCK, LIMIT), command.vendor(0x81, 1)
    if is_right:
        check_lengths(device, False, entry, np.array([0]), np.array([length]))
        return
    with pytest.raises(ValueError, match="more than the 262144"):
        check_lengths(device, False, entry, np.array([0]), np.array([length]))


def test_a_wrong_length_stops_a_batch(ring):
    """The text names the command; the commands before it were not sent either."""
    entries, addresses, lengths = commands(5)
    lengths[3] = 512
    for call in (
        lambda: ring.transfer(entries, addresses, lengths, 4),
        lambda: ring.submit(entries, addresses, lengths),
    ):
        with pytest.raises(ValueError, match=r"512 bytes with command 0x02: .* more than the 262144"):
            call()
    assert len(ring.poll(wait=False)) == 0


@pytest.mark.parametrize("depth", [1, 3, 16, 1000])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 5000])
def test_transfer(ring, count, depth):
    """Every command once, its completion in its place."""
    entries, addresses, lengths = commands(count)
    completions = ring.transfer(entries, addresses, lengths, depth)
    np.testing.assert_array_equal(completions["cid"], entries["cid"])
    assert not completions["status"].any()


def test_empty_transfer(ring):
    assert len(ring.transfer(*commands(0), 8)) == 0


def test_submit_and_poll(ring):
    """Completions of submitted commands wait for a poll, whatever else runs on the ring meanwhile."""
    entries, addresses, lengths = commands(16)
    ring.submit(entries[:10], addresses[:10], lengths[:10])
    assert ring.transfer(entries[10:], addresses[10:], lengths[10:], 6)["cid"].tolist() == list(range(10, 16))
    arrived = []
    while len(arrived) < 10:
        found = ring.poll(wait=True)["cid"].tolist()
        assert found
        arrived += found
    assert sorted(arrived) == list(range(10))
    with pytest.raises(ConnectionLost):
        ring.poll(wait=True)  # nothing is under way: that would wait for ever


def test_queue_pair_over_a_ring(null, ring):
    queue_pair = QueuePair(RingConnection(null, 4), 4)
    memory = dma.allocate(BLOCK)
    entries, addresses, lengths = commands(5)
    cids = queue_pair.submit(entries[:4], [memory] * 4)
    with pytest.raises(QueueFull):
        queue_pair.submit(entries[4:], [memory])
    queue_pair.wait(cids)
    assert len(queue_pair.transfer(entries, addresses, lengths)) == 5
    queue_pair.submit(entries[:4], [memory] * 4)
    queue_pair.close()
    queue_pair.close()
    with pytest.raises(ValueError, match="closed"):
        queue_pair.execute(entries[:1], [memory])


def test_one_thread_at_a_time(ring):
    """Two threads in one ring would take each other's entries."""
    started, failures = threading.Event(), []

    def work():
        started.set()
        try:
            for _ in range(300):
                ring.transfer(*batch, 16)
        except QueuePairInUse as error:
            failures.append(error)

    batch = commands(3000)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(failures) == 1


def test_refused_by_the_kernel(null):
    """A file that takes no such commands: an error that says which command, and nothing left under way."""
    fd = os.open("/dev/zero", os.O_RDWR)
    try:
        ring = Ring(Device(fd, "/dev/zero", BLOCK, LIMIT), 8)
    except NotImplementedError:
        pytest.skip("this kernel has no large ring")
    with pytest.raises(OSError, match="command 0x02 with 4096 bytes") as caught:
        ring.transfer(*commands(100), 8)
    assert (caught.value.errno, caught.value.filename) == (errno.EOPNOTSUPP, "/dev/zero")
    ring.submit(*commands(3))
    with pytest.raises(OSError, match="a submitted command"):
        ring.poll(wait=True)
    ring.close()
    os.close(fd)


@pytest.mark.parametrize("is_admin", [True, False])
def test_ioctl_refused(null, is_admin):
    """From several threads: the first error is reported, once."""
    entries, addresses, lengths = commands(100)
    if is_admin:
        entries["opcode"], lengths[:] = 0x06, 4096
    with pytest.raises(OSError, match="Linux refuses command") as caught:
        ioctl_transfer(null, is_admin, entries, addresses, lengths, 16)
    assert caught.value.errno == errno.ENOTTY


def test_submitted_by_ioctl(null):
    """What fails on the thread is raised where it is waited for; a wrong length at once."""
    connection = IoctlConnection(null)
    memory = dma.allocate(BLOCK)
    entries, *_ = commands(1)
    with pytest.raises(ValueError, match="512 bytes"):
        connection.submit(entries, [memory[:512]])
    assert len(connection.poll(wait=False)) == 0
    connection.submit(entries, [memory])
    with pytest.raises(OSError, match="Linux refuses command 0x02"):
        connection.poll(wait=True)
    connection.close()


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENXIO, errno.EAGAIN])
def test_a_lost_drive(null, number):
    error = error_of(number, null, "command 0x02")
    assert isinstance(error, ConnectionLost)
    assert str(error).startswith("/dev/null: the drive is gone")
    assert "\n" not in str(error)
