"""Our NVMe/TCP target with initiators that were not written here: SPDK's driver and tools."""

import subprocess
import time

import numpy as np
import pytest

import kvfs
from spdk_glue import dma
from spdk_glue.identify import FLASH_HEALTH_LOG, LogPage
from spdk_glue.namespace import Namespace
from spdk_glue.status import NvmeStatusError, Status
from spdk_glue.transports.url import open_transport
from spdk_glue.vendor_command import ANSWER_HEADER
from tests.spdk.serving import NQN, ServedProcess

MIB = 1 << 20
SHAPE = {"num_layers": 2, "num_query_heads": 8, "num_kv_heads": 2, "head_dim": 64}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(path, commands): a drive with a sequence, and what the embedded drive answered to attention over it:
    (descriptor, answer) of each command."""
    path = tmp_path_factory.mktemp("served") / "drive.kvfs"
    kvfs.format(path, "64MiB")
    rng = np.random.default_rng(5)
    commands = []
    with kvfs.open(path, cache_bytes="16MiB", num_workers=2) as store:
        model = store.add_model("m", **SHAPE)
        sequence = store.create_sequence(model, "s")
        for layer in range(2):
            keys = rng.standard_normal((1500, 2, 64), np.float32).astype(np.float16)
            sequence.append(layer, keys, keys[::-1].copy())
        sequence.flush()
        namespace = store._namespace
        submit, fetch = namespace.attention_submit, namespace.attention_fetch
        descriptors = {}

        def recording_submit(descriptor):
            ticket = submit(descriptor)
            descriptors[ticket] = descriptor.copy()
            return ticket

        def recording_fetch(ticket, answer_bytes):
            answer = fetch(ticket, answer_bytes)
            commands.append((descriptors[ticket], answer.copy()))
            return answer

        namespace.attention_submit, namespace.attention_fetch = recording_submit, recording_fetch
        for layer in range(2):
            for num_queries in (1, 3):
                queries = rng.standard_normal((1, num_queries, 8, 64), np.float32).astype(np.float16)
                store.attend(layer, queries, [sequence])
    assert commands
    return path, commands


@pytest.fixture(scope="module")
def served(recorded):
    served = ServedProcess(recorded[0], "--num-workers", "2")
    yield served
    assert served.close() == 0


@pytest.fixture
def namespace(served):
    namespace = Namespace(open_transport(served.location))
    yield namespace
    namespace.close()


def test_attention_as_in_the_embedded_drive(namespace, recorded):
    """The purpose of it all: the vendor commands over a wire, to the last bit of the answers."""
    for descriptor, expected in recorded[1] * 3:
        answer = namespace.attend(descriptor, len(expected))
        assert (answer[ANSWER_HEADER.itemsize :] == expected[ANSWER_HEADER.itemsize :]).all()


def test_tickets(namespace, recorded):
    descriptor, expected = recorded[1][0]
    tickets = [namespace.attention_submit(descriptor) for _ in range(20)]
    namespace.attention_cancel(tickets[3])
    with pytest.raises(NvmeStatusError) as raised:
        namespace.attention_fetch(tickets[3], len(expected))
    assert raised.value.status == Status.UNKNOWN_TICKET
    for ticket in tickets[4:][::-1] + tickets[:3]:
        answer = namespace.attention_fetch(ticket, len(expected))
        assert (answer[ANSWER_HEADER.itemsize :] == expected[ANSWER_HEADER.itemsize :]).all()


def test_a_bad_descriptor_is_explained(namespace):
    """The error log page of one's own controller says why."""
    with pytest.raises(NvmeStatusError) as raised:
        namespace.attention_submit(np.zeros(4096, np.uint8))
    assert raised.value.status == Status.INVALID_DESCRIPTOR and raised.value.detail


def test_vendor_log_pages(namespace):
    record = namespace.log_page(LogPage.FLASH_HEALTH, FLASH_HEALTH_LOG)
    assert record["page_size"] == 4096


def test_blocks(namespace):
    """Behind the store's blocks: what is written is read, by every size that a command has."""
    last = namespace.num_lbas
    rng = np.random.default_rng(1)
    for num_lbas in (1, 2, 3, 16, 64, 256, 1000):
        data = dma.allocate(num_lbas * 4096)
        data[:] = rng.integers(0, 256, data.size, np.uint8)
        namespace.write(last - num_lbas, data)
        namespace.flush()
        assert (namespace.read(last - num_lbas, num_lbas) == data).all()
    namespace.deallocate([(last - 1000, 1000)])
    assert not namespace.read(last - 1000, 1000).any()
    assert not namespace.lost(0, 1000)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A drive that may be overwritten."""
    path = tmp_path_factory.mktemp("scratch") / "drive.kvfs"
    kvfs.format(path, "64MiB")
    served = ServedProcess(path)
    yield served
    assert served.close() == 0


@pytest.mark.parametrize("digests", [(), ("-H",), ("-I",), ("-H", "-I")])
def test_spdk_nvme_perf(scratch, digests):
    for pattern, size in (("randrw", 4096), ("randrw", 131072)):
        done = subprocess.run(
            [
                *("spdk_nvme_perf", "--no-huge", "-s", "256", "-q", "32", "-o", str(size), "-w", pattern),
                *("-M", "70", "-t", "1", "-r", f"{scratch.transport_id()} ns:1", *digests),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "Total" in done.stdout, done.stdout + done.stderr


def test_spdk_nvme_identify(served):
    done = subprocess.run(
        ["spdk_nvme_identify", "--no-huge", "-s", "256", "-r", served.transport_id()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for line in ("kvfs computational drive", NQN, "Keep Alive:                            Supported"):
        assert line in done.stdout
    done = subprocess.run(
        [
            *("spdk_nvme_identify", "--no-huge", "-s", "256", "-r"),
            served.transport_id().replace(NQN, "nqn.2014-08.org.nvmexpress.discovery"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and NQN in done.stdout.partition("Discovery Log Entry 0")[2]


def test_hosts_side_by_side(served, recorded):
    """Two hosts with the same ticket numbers get their own answers."""
    hosts = [Namespace(open_transport(f"{served.location} hostnqn:nqn.2026-11.io.kvfs:{n}")) for n in "ab"]
    (one, expected_one), (two, expected_two) = recorded[1][0], recorded[1][-1]
    try:
        tickets = [host.attention_submit(d) for host, d in zip(hosts, (one, two), strict=True)]
        assert tickets[0] == tickets[1]
        for host, ticket, expected in zip(hosts, tickets, (expected_one, expected_two), strict=True):
            answer = host.attention_fetch(ticket, len(expected))
            assert (answer[ANSWER_HEADER.itemsize :] == expected[ANSWER_HEADER.itemsize :]).all()
    finally:
        for host in hosts:
            host.close()


def test_killed_under_load(tmp_path):
    """What was flushed before the target died is there when it is back."""
    kvfs.format(tmp_path / "d.kvfs", "64MiB")
    served = ServedProcess(tmp_path / "d.kvfs")
    load = subprocess.Popen(
        [
            *("spdk_nvme_perf", "--no-huge", "-s", "256", "-q", "32", "-o", "4096", "-w", "randrw", "-M", "50"),
            *("-t", "20", "-r", f"{served.transport_id()} ns:1"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    namespace = Namespace(open_transport(served.location))
    last = namespace.num_lbas - 16
    for number in range(20):
        data = np.full(16 * 4096, number, np.uint8)
        namespace.write(last, data)
    namespace.deallocate([(0, 4)])
    namespace.flush()
    served.kill()
    load.kill()
    load.wait()
    port = served.port
    served.start(port)  # at once, where the old one was
    try:
        # as another host: SPDK would give it the connection that `namespace` still tries to restore
        again = Namespace(open_transport(f"{served.location} hostnqn:nqn.2026-11.io.kvfs:again"))
        assert again.num_lbas == namespace.num_lbas
        assert not again.lost(0, again.num_lbas)
        again.close()
    finally:
        assert served.close() == 0


def test_64_connections(tmp_path):
    """Hosts enough to fill a rack, all with work, and nothing left behind when they go."""
    kvfs.format(tmp_path / "d.kvfs", "64MiB")
    served = ServedProcess(tmp_path / "d.kvfs")
    try:
        before = served.num_descriptors(), served.num_threads()
        hosts = [
            Namespace(open_transport(f"{served.location} hostnqn:nqn.2026-11.io.kvfs:h{n}")) for n in range(32)
        ]  # each with an admin and an I/O queue
        for number, host in enumerate(hosts):
            host.write(number * 8, np.full(8 * 4096, number, np.uint8))
        assert served.num_threads() >= before[1] + 64
        for number, host in enumerate(hosts):
            assert (host.read(number * 8, 8) == number).all()
            host.close()
        give_up = time.monotonic() + 10
        while served.num_threads() > before[1] + 4 and time.monotonic() < give_up:
            time.sleep(0.05)
        assert served.num_threads() <= before[1] + 4  # threads for long commands stay
        assert served.num_descriptors() <= before[0] + 2
    finally:
        assert served.close() == 0
