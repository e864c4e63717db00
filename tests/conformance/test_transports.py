"""One suite over every NVMe transport: commands do what the specification says, whichever way they go.

A transport that needs a drive takes one from the environment and overwrites it:
    KVFS_TEST_NVME=/dev/ng0n1    Linux passthrough
Ours over NVMe/TCP is tested with our own target, and as SPDK's with SPDK's where that is installed.
"""

import os
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.serving import serve
from kvfs_bench.nvmf_target import Target, why_no_spdk
from spdk_glue import command, dma
from spdk_glue.command import IoOpcode
from spdk_glue.dma import EXTENT
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import NvmeStatusError, QueueFull, Status, decode
from spdk_glue.transports.url import open_transport
from tests.unit.spdk_glue.memory_drive import MemoryDrive

# what the tests use of a drive, in blocks
USED_LBAS = 4096
MANY = 1000  # commands of a transfer


@contextmanager
def inproc():
    yield BlockNamespace(MemoryDrive().transport)


@contextmanager
def linux(use_uring=True):
    location = os.environ.get("KVFS_TEST_NVME")
    if not location:
        pytest.skip("KVFS_TEST_NVME names no NVMe namespace that may be overwritten")
    from spdk_glue.transports.linux import LinuxTransport

    yield BlockNamespace(LinuxTransport.open(location, use_uring))


@contextmanager
def spdk():
    if reason := why_no_spdk():
        pytest.skip(f"needs SPDK: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder), {"memory": ("malloc", 64 << 20)})
        try:
            yield BlockNamespace(open_transport(target.location))
        finally:
            target.close()


@contextmanager
def tcp_to_spdk(options=""):
    if reason := why_no_spdk():
        pytest.skip(f"needs SPDK: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder), {"memory": ("malloc", 64 << 20)})
        try:
            yield BlockNamespace(open_transport(target.address + options))
        finally:
            target.close()


@contextmanager
def tcp(options=""):
    with tempfile.TemporaryDirectory() as folder:
        drive = Path(folder) / "drive.kvfs"
        kvfs.format(drive, "48MiB")
        with serve(drive, "127.0.0.1:0", cache_bytes="8MiB", num_workers=1) as (server, subsystems):
            location = f"nvme+tcp://127.0.0.1:{server.address[1]}/{subsystems.nqn}{options}"
            yield BlockNamespace(open_transport(location))


# each yields a BlockNamespace over a namespace that may be overwritten
TRANSPORTS = {
    "inproc": inproc,
    "linux": linux,
    "linux-ioctl": lambda: linux(use_uring=False),
    "tcp": tcp,
    "tcp-digests": lambda: tcp("?header-digest=on&data-digest=on"),
    "spdk": spdk,
    "tcp-to-spdk": tcp_to_spdk,
    "tcp-to-spdk-digests": lambda: tcp_to_spdk("?header-digest=on&data-digest=on"),
}
NEED_SPDK = {"spdk", "tcp-to-spdk", "tcp-to-spdk-digests"}


@pytest.fixture(
    params=[pytest.param(kind, marks=[pytest.mark.spdk] if kind in NEED_SPDK else []) for kind in TRANSPORTS]
)
def namespace(request):
    with TRANSPORTS[request.param]() as namespace:
        yield namespace
        namespace.close()


def random_blocks(namespace, count, seed=0):
    """DMA memory, uint8 [count * block_bytes]"""
    data = dma.allocate(count * namespace.block_bytes)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.size, np.uint8)
    return data


def blocks_of(namespace, data):
    return data.reshape(-1, namespace.block_bytes)


def single_blocks(namespace, builder, lbas, data):
    """What QueuePair.transfer takes: a command for each LBA, with the blocks of `data` in their order."""
    entries = builder(lbas, np.ones(len(lbas), np.int64))
    entries["nsid"] = namespace.nsid
    return entries, *places_of(namespace, data)


def places_of(namespace, data):
    addresses = dma.page_addresses(data, namespace.block_bytes).astype(np.int64)
    return addresses, np.full(len(addresses), namespace.block_bytes)


def one(namespace, entry):
    entry["nsid"] = namespace.nsid
    return entry


def queue_pair_of(namespace, depth):
    return namespace.transport.create_queue_pair(depth)


def test_identify(namespace):
    """Geometry wrong by one bit is data in the wrong place."""
    assert namespace.nsid == namespace.transport.nsid >= 1
    assert namespace.block_bytes in (512, 4096)
    assert namespace.num_lbas >= USED_LBAS
    assert namespace.controller["sn"].strip()
    limit = namespace.transport.max_transfer_bytes
    assert limit is None or namespace.max_transfer_lbas * namespace.block_bytes <= limit


def test_scattered(namespace):
    """Pieces of every size, some above the transfer limit, come back as they were written, in any order."""
    sizes = [1, 3, 700, 1, 2, 64, 1500, 8]
    first_lbas = [5, 9, 20, 4095, 800, 810, 900, 2500]
    written = [random_blocks(namespace, size, seed) for seed, size in enumerate(sizes)]
    namespace.write_scattered(list(zip(first_lbas, written, strict=True)))
    found = [random_blocks(namespace, size, seed=99) for size in sizes]
    order = np.random.default_rng(1).permutation(len(sizes)).tolist()
    namespace.read_scattered([(first_lbas[i], found[i]) for i in order])
    for piece, wanted, first_lba in zip(found, written, first_lbas, strict=True):
        np.testing.assert_array_equal(piece, wanted)
        count = piece.nbytes // namespace.block_bytes
        np.testing.assert_array_equal(namespace.read(first_lba, count), wanted)


def test_extents(namespace):
    """The flash layer's way: arrays of extents, each from anywhere in one large buffer."""
    data, found = random_blocks(namespace, 3000, 2), random_blocks(namespace, 3000, 3)
    extents = np.zeros(4, EXTENT)
    extents["length"] = np.array([1, 1999, 500, 500]) * namespace.block_bytes
    extents["offset"] = np.array([3000, 0, 2500, 2000]) * namespace.block_bytes
    starts = np.concatenate([[0], np.cumsum(extents["length"])[:-1]])
    extents["address"] = dma.address_of(data) + starts
    namespace.write_extents(extents)
    extents["address"] = dma.address_of(found) + starts
    namespace.read_extents(extents[::-1])
    np.testing.assert_array_equal(found, data)


def test_deallocate(namespace):
    """Deallocated blocks hold their old content, zeros or ones; their neighbours stay."""
    data = random_blocks(namespace, 64, 4)
    namespace.write(100, data)
    gone = [3, 10, 11, 12, 40]
    namespace.deallocate([(103, 1), (110, 3), (140, 1)])
    found, wanted = (blocks_of(namespace, each) for each in (namespace.read(100, 64), data))
    kept = np.setdiff1d(np.arange(64), gone)
    np.testing.assert_array_equal(found[kept], wanted[kept])
    for block in gone:
        assert (found[block] == wanted[block]).all() or set(found[block].tolist()) in ({0}, {0xFF})


def test_flush(namespace):
    namespace.write(7, random_blocks(namespace, 1, 5))
    namespace.flush()


def test_depth_limit(namespace):
    """More than the queue pair holds is refused whole; what was submitted before comes to its end."""
    queue_pair = queue_pair_of(namespace, 4)
    data = random_blocks(namespace, 5, 6)
    buffers = list(blocks_of(namespace, data))
    before = namespace.read(200, 5)
    entries, *_ = single_blocks(namespace, command.write, np.arange(200, 205), data)
    with pytest.raises(QueueFull):
        queue_pair.submit(entries, buffers)
    np.testing.assert_array_equal(namespace.read(200, 5), before)
    cids = queue_pair.submit(entries[:4], buffers[:4])
    for too_many in (
        lambda: queue_pair.submit(entries[4:], buffers[4:]),
        lambda: queue_pair.execute(entries[4:], buffers[4:]),
        lambda: queue_pair.transfer(entries, *places_of(namespace, data)),
    ):
        with pytest.raises(QueueFull):
            too_many()
    assert queue_pair.wait(cids[::-1])["cid"].tolist() == cids[::-1]
    np.testing.assert_array_equal(namespace.read(200, 4), data[: 4 * namespace.block_bytes])
    queue_pair.close()


def test_execute_beside_submitted(namespace):
    """Completions of one are not taken for those of the other."""
    queue_pair = queue_pair_of(namespace, 64)
    data, found = random_blocks(namespace, 40, 7), random_blocks(namespace, 1, 8)
    namespace.write(300, data[: namespace.block_bytes])
    entries, *_ = single_blocks(namespace, command.write, np.arange(301, 340), data[namespace.block_bytes :])
    cids = queue_pair.submit(entries, list(blocks_of(namespace, data)[1:]))
    completion = queue_pair.execute(one(namespace, command.read(300, 1)), [found])
    assert not completion["status"].any()
    np.testing.assert_array_equal(found, data[: namespace.block_bytes])
    assert not queue_pair.wait(cids)["status"].any()
    np.testing.assert_array_equal(namespace.read(300, 40), data)
    queue_pair.close()


@pytest.mark.parametrize("past_the_end", [0, 1, 1 << 30])
def test_out_of_range(namespace, past_the_end):
    """The drive's refusal arrives as an error with its status, and nothing is written."""
    first_lba = namespace.num_lbas - 1 + past_the_end
    data = random_blocks(namespace, 2, 9)
    for call, opcode in (
        (lambda: namespace.write(first_lba, data), IoOpcode.WRITE),
        (lambda: namespace.read(first_lba, 2), IoOpcode.READ),
    ):
        with pytest.raises(NvmeStatusError) as caught:
            call()
        assert (caught.value.opcode, caught.value.status) == (opcode, Status.LBA_OUT_OF_RANGE)
        assert caught.value.nsid == namespace.nsid


def test_wrong_lengths(namespace):
    """A buffer of another size than the command says: refused here or by the drive, before a byte moves."""
    queue_pair = queue_pair_of(namespace, 8)
    kept = random_blocks(namespace, 4, 10)
    namespace.write(400, kept)
    memory = random_blocks(namespace, 4, 11)
    before = memory.copy()
    for builder, num_lbas, size in (
        (command.write, 2, 1),
        (command.write, 1, 2),
        (command.read, 2, 1),
        (command.read, 1, 2),
        (command.read, 1, 0),
    ):
        entry = one(namespace, builder(400, num_lbas))
        length = size * namespace.block_bytes
        calls = {
            "execute": lambda entry=entry, length=length: queue_pair.execute(entry, [memory[:length]]),
            "submit": lambda entry=entry, length=length: queue_pair.wait(
                queue_pair.submit(entry, [memory[:length]])
            ),
            "transfer": lambda entry=entry, length=length: queue_pair.transfer(
                entry, np.array([dma.address_of(memory)]), np.array([length])
            ),
        }
        for name, call in calls.items():
            try:
                completions = call()
            except ValueError:
                continue
            assert decode(int(completions["status"][0])) == Status.SGL_LENGTH_INVALID, name
    np.testing.assert_array_equal(memory, before)
    np.testing.assert_array_equal(namespace.read(400, 4), kept)
    assert queue_pair.num_outstanding == 0
    queue_pair.close()


@pytest.mark.parametrize("depth", [1, 8, 256])
def test_many_commands(namespace, depth):
    """Completions come in the order of the commands, whatever the order of their ends."""
    queue_pair = queue_pair_of(namespace, depth)
    lbas = np.random.default_rng(12).permutation(USED_LBAS)[:MANY]
    data, found = random_blocks(namespace, MANY, 13), random_blocks(namespace, MANY, 14)
    completions = queue_pair.transfer(*single_blocks(namespace, command.write, lbas, data))
    assert (len(completions), completions["status"].any()) == (MANY, False)
    wrong = np.arange(17, MANY, 100)
    lbas[wrong] = namespace.num_lbas + wrong
    entries, addresses, lengths = single_blocks(namespace, command.read, lbas, found)
    completions = queue_pair.transfer(entries, addresses, lengths)
    np.testing.assert_array_equal(np.flatnonzero(completions["status"]), wrong)
    assert {decode(int(field)) for field in completions["status"][wrong]} == {Status.LBA_OUT_OF_RANGE}
    np.testing.assert_array_equal(completions["cid"], entries["cid"])
    right = np.setdiff1d(np.arange(MANY), wrong)
    np.testing.assert_array_equal(blocks_of(namespace, found)[right], blocks_of(namespace, data)[right])
    queue_pair.close()


def test_threads(namespace):
    """A queue pair each: what one writes is not in another's buffers."""
    failures, start = [], threading.Barrier(2)

    def work(number):
        try:
            queue_pair = queue_pair_of(namespace, 32)
            lbas = np.arange(number, USED_LBAS, 2)[:MANY]
            start.wait(60)
            for turn in range(3):
                data = random_blocks(namespace, len(lbas), 20 + 10 * number + turn)
                found = random_blocks(namespace, len(lbas), 99)
                for builder, memory in ((command.write, data), (command.read, found)):
                    commands = single_blocks(namespace, builder, lbas, memory)
                    assert not queue_pair.transfer(*commands)["status"].any()
                np.testing.assert_array_equal(found, data)
            queue_pair.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []


def test_close_with_commands_under_way(namespace):
    """Closing a queue pair waits: the drive may still write to the memory until then."""
    data = random_blocks(namespace, 64, 15)
    entries, *_ = single_blocks(namespace, command.write, np.arange(500, 564), data)
    queue_pair = queue_pair_of(namespace, 64)
    queue_pair.submit(entries, list(blocks_of(namespace, data)))
    queue_pair.close()
    assert queue_pair.num_outstanding == 0
    np.testing.assert_array_equal(namespace.read(500, 64), data)


def test_submitted_from_another_thread(namespace):
    """One thread submits and ends, another waits: how background writes are waited for."""
    data, pending = random_blocks(namespace, 32, 16), []
    extents = [(600 + i, block) for i, block in enumerate(blocks_of(namespace, data))]
    thread = threading.Thread(target=lambda: pending.append(namespace.submit_write(extents)))
    thread.start()
    thread.join(60)
    namespace.complete(pending[0])
    np.testing.assert_array_equal(namespace.read(600, 32), data)
