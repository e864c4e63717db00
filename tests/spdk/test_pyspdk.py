"""pyspdk against SPDK's own target over TCP: controllers, queue pairs, raw commands."""

import gc
import threading
import time

import numpy as np
import pytest

from spdk_glue import command, dma
from spdk_glue.command import COMPLETION_ENTRY, IoOpcode
from spdk_glue.identify import IDENTIFY_CONTROLLER, Cns
from spdk_glue.namespace import BlockNamespace
from spdk_glue.pyspdk import environment
from spdk_glue.pyspdk.controller import ConnectionRefused, Controller
from spdk_glue.queue_pair import places
from spdk_glue.status import NvmeError, NvmeStatusError, QueueFull, QueuePairInUse, Status, decode
from spdk_glue.transports.spdk import SpdkTransport
from spdk_glue.transports.url import open_transport

BLOCK = 4096


@pytest.fixture(params=[1, 2], ids=["malloc", "aio"])
def location(request, shared_target):
    return f"{shared_target.location} ns:{request.param}"


@pytest.fixture
def namespace(location):
    namespace = BlockNamespace(open_transport(location))
    yield namespace
    namespace.close()


@pytest.fixture
def controller(shared_target):
    controller = Controller(shared_target.transport_id)
    yield controller
    controller.close()


def content(num_blocks, seed=0):
    data = dma.allocate(num_blocks * BLOCK)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.size, np.uint8)
    return data


def reads(num_commands, num_blocks=1):
    """(entries, addresses, lengths, the memory they lead to) of reads one behind the other."""
    data = dma.allocate(num_commands * num_blocks * BLOCK)
    lengths = np.full(num_commands, num_blocks * BLOCK)
    entries = command.read(np.arange(num_commands) * num_blocks, np.full(num_commands, num_blocks))
    return entries, dma.address_of(data) + np.arange(num_commands) * lengths, lengths, data


def test_facts(namespace, shared_target):
    assert (namespace.block_bytes, namespace.num_lbas) == (BLOCK, 64 << 20 >> 12)
    assert namespace.serial_number.startswith("KVFSTEST")
    assert namespace.max_transfer_lbas == (128 << 10) // BLOCK


def test_data(namespace):
    """Blocks, scattered extents and more than a command's worth; all come back."""
    data = content(2000)
    namespace.write(100, data)
    np.testing.assert_array_equal(namespace.read(100, 2000), data)
    extents = np.zeros(3, dma.EXTENT)
    extents["address"] = dma.address_of(data) + np.array([0, 700, 40]) * BLOCK
    extents["offset"] = np.array([5000, 4000, 4100]) * BLOCK
    extents["length"] = np.array([33, 1, 64]) * BLOCK
    namespace.write_extents(extents)
    namespace.flush()
    for first, source, count in ((5000, 0, 33), (4000, 700, 1), (4100, 40, 64)):
        expected = data[source * BLOCK : (source + count) * BLOCK]
        np.testing.assert_array_equal(namespace.read(first, count), expected)


def test_deallocate(namespace):
    """Deallocation is a hint: what it does not hit stays."""
    data = content(64)
    namespace.write(0, data)
    namespace.deallocate([(8, 8), (32, 4)])
    found = namespace.read(0, 64).reshape(64, BLOCK)
    kept = np.ones(64, bool)
    kept[8:16] = kept[32:36] = False
    np.testing.assert_array_equal(found[kept], data.reshape(64, BLOCK)[kept])


def test_errors_have_their_codes(namespace):
    with pytest.raises(NvmeStatusError) as caught:
        namespace.read(namespace.num_lbas - 1, 2)
    assert (caught.value.sct, caught.value.sc) == (0, 0x80)
    assert caught.value.status == Status.LBA_OUT_OF_RANGE
    with pytest.raises(NvmeStatusError) as caught:
        namespace.admin(command.identify(0xEE), np.zeros(4096, np.uint8))
    assert caught.value.status == Status.INVALID_FIELD
    np.testing.assert_array_equal(namespace.read(0, 1).shape, (BLOCK,))  # the connection has survived


def test_vendor_command_is_refused_and_survived(namespace):
    """A drive that knows nothing of attention answers with a status."""
    entry = command.vendor(IoOpcode.ATTENTION_SUBMIT, 1)
    with pytest.raises(NvmeStatusError) as caught:
        namespace._run(entry, [dma.allocate(BLOCK)])
    assert caught.value.status == Status.INVALID_OPCODE
    namespace.flush()


def test_513th_request(controller):
    """SPDK has so many requests; one more waits for room, and none is lost."""
    queue_pair = controller.create_queue_pair(1024)
    entries, addresses, lengths, _ = reads(3000)
    completions, was_lost = queue_pair.transfer(entries, addresses, lengths)
    assert not was_lost and not completions["status"].any()
    entries["cid"] = np.arange(len(entries)) % 65536
    started = queue_pair.submit(entries, addresses, lengths)
    assert queue_pair.depth <= 1024 and 0 < started <= queue_pair.depth
    found = []
    while len(found) < started:
        found += queue_pair.poll(wait=True)["cid"].tolist()
    assert sorted(found) == list(range(started))


def test_depth_is_held(location):
    transport = open_transport(location)
    queue_pair = transport.create_queue_pair(4)
    buffers = [dma.allocate(BLOCK) for _ in range(5)]
    with pytest.raises(QueueFull):
        queue_pair.submit(command.read(np.arange(5), np.ones(5, int)), buffers)
    cids = queue_pair.submit(command.read(np.arange(4), np.ones(4, int)), buffers[:4])
    with pytest.raises(QueueFull):
        queue_pair.submit(command.read(0, 1), buffers[:1])
    assert not queue_pair.wait(cids)["status"].any()
    transport.close()


def test_lengths_are_checked(controller):
    """What SPDK would send as it is, and a target ends the connection for."""
    facts = controller.namespaces()[0]
    queue_pair = controller.create_queue_pair(8, facts)
    too_large = dma.allocate(controller.max_transfer_bytes + BLOCK)
    entry = command.read(0, too_large.nbytes // BLOCK)
    with pytest.raises(ValueError, match="more than one command moves"):
        queue_pair.transfer(entry, *places([too_large]))
    with pytest.raises(ValueError, match="2 blocks with 4096 bytes of memory"):
        queue_pair.transfer(command.read(0, 2), *places([dma.allocate(BLOCK)]))
    with pytest.raises(ValueError, match="moves none"):
        queue_pair.transfer(command.flush(), *places([dma.allocate(BLOCK)]))
    with pytest.raises(ValueError, match="more than one command moves"):
        controller.admin(command.identify(Cns.CONTROLLER), too_large)
    block = dma.allocate(BLOCK)
    completions, was_lost = queue_pair.transfer(command.read(0, 1), *places([block]))
    assert not was_lost and not completions["status"].any()


def test_transfer_limit_is_split_above(namespace):
    """MDTS: a megabyte is eight commands."""
    data = content(256, seed=3)
    namespace.write(1000, data)
    np.testing.assert_array_equal(namespace.read(1000, 256), data)


def test_threads_with_a_queue_pair_each(namespace):
    """Two threads, and several more, at once on one controller."""
    failures = []

    def work(number):
        try:
            for round_number in range(20):
                data = content(40, seed=number * 100 + round_number)
                namespace.write(number * 1000, data)
                np.testing.assert_array_equal(namespace.read(number * 1000, 40), data)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_one_thread_at_a_time(controller):
    """A second thread on a busy queue pair is an error, not a race."""
    queue_pair = controller.create_queue_pair(64)
    entries, addresses, lengths, _ = reads(16000)
    lengths[:] = BLOCK
    refused = []

    def work():
        while not refused:
            try:
                queue_pair.transfer(entries, addresses, lengths)
            except QueuePairInUse as error:
                refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert refused
    assert not queue_pair.transfer(entries[:1], addresses[:1], lengths[:1])[0]["status"].any()


def test_close_with_commands_under_way(shared_target):
    """Nothing waits for ever, and memory stays until its commands have ended."""
    transport = open_transport(shared_target.location)
    queue_pair = transport.create_queue_pair(256)
    buffers = [dma.allocate(128 << 10) for _ in range(64)]
    queue_pair.submit(command.read(np.arange(64) * 32, np.full(64, 32)), buffers)
    queue_pair.close()
    transport.close()


def test_admin_commands(controller):
    data = np.zeros(4096, np.uint8)
    completion = controller.admin(command.identify(Cns.CONTROLLER), data)
    assert completion.dtype == COMPLETION_ENTRY and decode(completion["status"])[0] == Status.SUCCESS
    assert data.view(IDENTIFY_CONTROLLER)[0]["sn"].decode().startswith("KVFSTEST")


def test_dma_memory(controller):
    """SPDK's memory as arrays: aligned, zeroed, alive as long as a view of it is, then given back."""
    array = environment.allocate(3 * BLOCK)
    assert dma.address_of(array) % dma.ALIGNMENT == 0 and not array.any()
    array[:] = 7
    view = array[BLOCK:]
    del array
    gc.collect()
    assert (view == 7).all()
    for _ in range(2000):  # 16 times the memory that SPDK has, if any were lost
        environment.allocate(2 << 20)
    with pytest.raises(MemoryError, match="KVFS_SPDK_MEMORY_MB"):
        environment.allocate(1 << 40)


@pytest.mark.slow
def test_keep_alive_while_idle(controller):
    """30 seconds without a call, three times the keep-alive time: the keeper has polled."""
    queue_pair = controller.create_queue_pair(8)
    time.sleep(31)
    assert not controller.is_lost
    block = dma.allocate(BLOCK)
    completions, was_lost = queue_pair.transfer(command.read(0, 1), *places([block]))
    assert not was_lost and not completions["status"].any()


def test_bad_locations(shared_target):
    for text, what in [
        ("trtype:TCP traddr:127.0.0.1 trsvcid:1 subnqn:nqn.2026-11.io.kvfs:test", "no NVMe controller answers"),
        ("nonsense", "not a transport id"),
        (shared_target.transport_id.replace(":test", ":other"), "no NVMe controller answers"),
    ]:
        with pytest.raises(ConnectionRefused, match=what):
            SpdkTransport.connect(text)
    with pytest.raises(NvmeError, match=r"has no namespace 9 \(it has: 1, 2\)"):
        SpdkTransport.connect(f"{shared_target.transport_id} ns:9")


def test_closed(shared_target):
    controller = Controller(shared_target.transport_id)
    queue_pair = controller.create_queue_pair(8)
    controller.close()
    controller.close()
    for call in (
        controller.namespaces,
        lambda: controller.create_queue_pair(8),
        lambda: queue_pair.poll(False),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_affinity_is_kept(controller):
    """DPDK pins its caller to one CPU; threads of this process must not inherit that."""
    import os

    assert len(os.sched_getaffinity(0)) == os.cpu_count()
