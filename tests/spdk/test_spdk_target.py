"""A kvfs drive behind SPDK's own target: what hosts see over TCP and vfio-user is the embedded drive."""

import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from accel.drive import Drive, DriveConfig
from ftl.geometry import Geometry
from kvfs_bench.nvmf_target import free_port
from kvfs_bench.served_drive import NQN, ServedDrive
from spdk_glue import command, spdk_target
from spdk_glue.fabrics.authentication import Credentials, HostAuthenticator, Key, write_key_file
from spdk_glue.flash_admin import FlashAdmin
from spdk_glue.identify import (
    ERROR_LOG_ENTRY,
    OACS_GET_LBA_STATUS,
    ONCS_DATASET_MANAGEMENT,
    ONCS_VERIFY,
    LogPage,
)
from spdk_glue.namespace import Namespace
from spdk_glue.status import ConnectionLost, NvmeStatusError, Status
from spdk_glue.transports.url import open_transport
from spdk_glue.vendor_command import ANSWER_HEADER, COMPACT, GROUP_EXTENT, SEAL_HEADER, SEAL_MAGIC
from tests.unit.accel.test_drive import (
    ANSWER,
    GROUP,
    HEAD_DIM,
    HEADS,
    LAYER_LBAS,
    blocks,
    descriptor,
    groups,
    out_of,
    plain,
    status_of,
)
from tests.unit.spdk_glue.fabrics.socket_host import CommandRefused, SocketHost

pytestmark = [
    pytest.mark.skipif(not spdk_target.available()[0], reason=spdk_target.available()[1]),
    pytest.mark.timeout(180),
]
LOAD = ["spdk_nvme_perf", "-q", "64", "-o", "65536", "-t", "60", "-s", "256", "--no-huge"]
GEOMETRY = Geometry(pages_per_erase_block=64, num_superblocks=64)  # some 128 MiB


@pytest.fixture(scope="module", params=["tcp", "vfio-user"])
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    Drive.format(folder / "drive", GEOMETRY)
    if request.param == "vfio-user":
        (folder / "bar").mkdir()
        served = ServedDrive(folder / "drive", f"vfio-user:{folder / 'bar'}")
        served.host_location = f"spdk:trtype:VFIOUSER traddr:{folder / 'bar'} subnqn:{NQN}"
    else:
        served = ServedDrive(folder / "drive")
        served.host_location = served.location
    yield served
    served.close()


@pytest.fixture
def namespace(served):
    namespace = Namespace(open_transport(served.host_location))
    yield namespace
    namespace.close()


@pytest.fixture
def own(tmp_path):
    """A drive of one test's own, over TCP."""
    Drive.format(tmp_path / "drive", GEOMETRY)
    served = ServedDrive(tmp_path / "drive")
    yield served
    served.close()


def connect(served, host: str = "one") -> Namespace:
    """As a host of this name: in one process, SPDK gives all users of a name the same connection."""
    return Namespace(open_transport(f"{served.location} hostnqn:nqn.2026-11.io.kvfs:{host}"))


# what the drive says of itself


def test_identity(served, namespace):
    """A host finds the drive's abilities where the embedded drive has them."""
    assert namespace.controller["mn"].strip() == b"kvfs computational drive"
    assert namespace.controller["oncs"] & ONCS_VERIFY
    assert namespace.controller["oncs"] & ONCS_DATASET_MANAGEMENT
    assert namespace.controller["vwc"] & 1
    assert namespace.attention["num_workers"] == 2
    limit = 1 << 20 if "TCP" in served.host_location else 128 << 10
    assert namespace.attention["max_transfer_bytes"] == limit
    assert namespace.block_bytes == 4096


def test_health(namespace):
    """Health log pages are the drive's, reads beside the reactor counted in."""
    flash = FlashAdmin(namespace)
    namespace.write(0, blocks(64, 5))
    before = flash.health()
    namespace.read(0, 64)
    after = flash.health()
    assert after["host_pages_read"] - before["host_pages_read"] == 64
    assert after["media_pages_read"] - before["media_pages_read"] == 64
    assert flash.smart()["available_spare"] == 100
    with pytest.raises(NvmeStatusError) as caught:
        namespace.log_page(0xEE, np.dtype([("any", "u1", 512)]))
    assert caught.value.status == Status.INVALID_LOG_PAGE


def test_maintenance(served, namespace):
    """The drive's own check, its allocated blocks: what a wire does not carry is not offered on it."""
    namespace.write(100, blocks(10))
    assert FlashAdmin(namespace).check()[0] == 0
    if namespace.controller["oacs"] & OACS_GET_LBA_STATUS:
        assert any(first <= 100 and first + count >= 110 for first, count in namespace.allocated())
    else:
        assert "VFIOUSER" in served.host_location
    namespace.verify(100, 10)


# blocks


@pytest.mark.parametrize("seed", range(2))
def test_blocks(namespace, seed):
    """Writes, deallocations and reads of any length and place, against a copy in memory."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    size = 3000
    want = namespace.read(0, size).reshape(size, 4096).copy()
    for _ in range(150):
        first = int(random.integers(0, size))
        count = min(int(random.choice([1, 2, 31, 32, 33, 200, 300])), size - first)
        match random.integers(0, 8):
            case 0:
                namespace.deallocate([(first, count)])
                want[first : first + count] = 0
            case 1 | 2 | 3:
                data = random.integers(0, 256, (count, 4096), np.uint8)
                namespace.write(first, data.reshape(-1), placement_id=int(random.integers(0, 4)))
                want[first : first + count] = data
            case 4:
                namespace.flush()
            case _:
                found = namespace.read(first, count).reshape(count, 4096)
                np.testing.assert_array_equal(found, want[first : first + count])
    np.testing.assert_array_equal(namespace.read(0, size).reshape(size, 4096), want)


def test_many_reads_and_writes_at_once(namespace):
    """A queue full of transfers, of many threads: each gets its own data."""
    data = blocks(2048, 9)
    namespace.write(0, data)
    failures = []

    def run(seed):
        try:
            random = np.random.default_rng(seed)
            for _ in range(30):
                first = int(random.integers(0, 1500))
                np.testing.assert_array_equal(
                    namespace.read(first, 500), data[first * 4096 : (first + 500) * 4096]
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_errors(namespace):
    """Bad commands have their status, and what the drive says of it."""
    last = namespace.num_lbas
    assert status_of(lambda: namespace.read(last, 1)) == Status.LBA_OUT_OF_RANGE
    assert status_of(lambda: namespace.write(last - 1, blocks(2))) == Status.LBA_OUT_OF_RANGE
    assert status_of(lambda: namespace.verify(last, 1)) == Status.LBA_OUT_OF_RANGE
    entry = command.vendor(command.IoOpcode.ATTENTION_CANCEL, 7)
    entry["opcode"] = 0x90
    assert status_of(lambda: namespace.execute(entry)) == Status.INVALID_OPCODE
    compare = command.read(0, 1)
    compare["opcode"] = command.IoOpcode.COMPARE
    assert status_of(lambda: namespace.execute(compare, blocks(1))) == Status.INVALID_OPCODE
    assert status_of(lambda: namespace.attention_cancel(4711)) == Status.UNKNOWN_TICKET
    newest = namespace.log_page(LogPage.ERROR_INFORMATION, ERROR_LOG_ENTRY)[0]
    assert (newest["opcode"], newest["detail"]) == (command.IoOpcode.ATTENTION_CANCEL, b"ticket 4711")
    assert newest["sqid"] > 0


# vendor commands


@pytest.mark.parametrize("num_groups", [1, 3, 40])
def test_attention(namespace, num_groups):
    """The numbers, however much there is to read."""
    keys, values = groups(namespace, num_groups)
    for _ in range(2):
        data, queries = descriptor(num_groups)
        answer = namespace.attend(data, ANSWER)
        np.testing.assert_allclose(out_of(answer), plain(queries, keys, values), atol=1e-5)


def test_as_embedded(own):
    """Bit for bit what the embedded drive answers."""
    namespace = connect(own)
    groups(namespace, 40)
    data, _ = descriptor(40)
    over_the_wire = namespace.attend(data, ANSWER)
    namespace.close()
    own.end()
    drive = Drive.open(own.drive, DriveConfig(cache_bytes=16 << 20, num_workers=2))
    embedded = Namespace(drive.transport).attend(data, ANSWER)
    drive.close()
    np.testing.assert_array_equal(over_the_wire[ANSWER_HEADER.itemsize :], embedded[ANSWER_HEADER.itemsize :])


def test_large_descriptor_and_answer(namespace):
    """As much as a command moves, more than one buffer of the target over TCP: there, and back."""
    groups(namespace, 2)
    limit = int(namespace.attention["max_transfer_bytes"])
    num_queries = (limit - 1024) // (4 * HEADS * GROUP * (HEAD_DIM + 1))
    queries = np.random.default_rng(1).standard_normal((1, num_queries, HEADS * GROUP, HEAD_DIM), np.float32)
    data, queries = descriptor(2, queries=queries, num_queries=num_queries)
    size = ANSWER_HEADER.itemsize + 4 * num_queries * HEADS * GROUP * (HEAD_DIM + 1)
    assert limit - 8192 < size <= limit
    out = namespace.attend(data, size)[ANSWER_HEADER.itemsize :][: queries.nbytes].view(np.float32)
    alone, _ = descriptor(2, queries=queries[:, 7:8])
    np.testing.assert_allclose(
        out.reshape(queries.shape)[0, 7],
        out_of(namespace.attend(alone, ANSWER))[0, 0],
        atol=1e-6,
    )


def test_an_answer_is_filled(namespace):
    """A buffer longer than the answer: the length is told, and no byte of another command is in the rest."""
    groups(namespace, 2)
    namespace.read(0, 256)  # fills the target's buffers with data
    ticket = namespace.attention_submit(descriptor(2)[0])
    answer = np.full(64 << 10, 0x5A, np.uint8)
    entry = command.vendor(command.IoOpcode.ATTENTION_FETCH, ticket, answer.nbytes // 4096)
    assert namespace.execute(entry, answer) == ANSWER
    assert answer[:ANSWER].any() and not answer[ANSWER:].any()


def test_bad_descriptors(namespace):
    """Random damage: an error status each time, and the target lives."""
    groups(namespace, 2)
    good, _ = descriptor(2)
    random = np.random.default_rng(11)
    for _ in range(200):
        data = good.copy()
        for position in random.integers(0, 112, random.integers(1, 4)):
            data[position] = random.integers(0, 256)
        data = data[: random.integers(1, len(data) + 1)]
        try:
            ticket = namespace.attention_submit(data)
        except NvmeStatusError:
            continue
        namespace.attention_cancel(ticket)
    namespace.attend(good, ANSWER)


def test_an_older_host_is_told(namespace):
    """What is wrong with its descriptor, before it takes an answer of another layout for its own."""
    groups(namespace, 2)
    older, _ = descriptor(2, version=1)
    assert status_of(lambda: namespace.attend(older, ANSWER)) == Status.INVALID_DESCRIPTOR
    assert namespace.log_page(LogPage.ERROR_INFORMATION, ERROR_LOG_ENTRY)[0]["detail"] == b"version 1, not 2"


def test_seal_groups(namespace):
    """Compaction over the wire: content stays."""
    groups(namespace, 4, seed=3)
    header, extent = np.zeros(1, SEAL_HEADER), np.zeros(1, GROUP_EXTENT)
    header["magic"], header["version"], header["derive"] = SEAL_MAGIC, 1, COMPACT
    header["num_extents"], header["num_layers"], header["layer_lbas"] = 1, 1, LAYER_LBAS
    extent["base_lba"], extent["num_groups"] = 64, 4
    before = namespace.read(64, 4 * LAYER_LBAS)
    namespace.seal_groups(np.concatenate([header.view(np.uint8), extent.view(np.uint8)]))
    np.testing.assert_array_equal(namespace.read(64, 4 * LAYER_LBAS), before)


def test_two_hosts(own):
    """They choose the same ticket numbers, and neither reaches the other's attention or errors."""
    one, two = connect(own, "one"), connect(own, "two")
    keys, values = groups(one, 2)
    data, queries = descriptor(2)
    first = one.attention_submit(data)
    assert status_of(lambda: two.attention_fetch(first, ANSWER)) == Status.UNKNOWN_TICKET
    assert status_of(lambda: two.attention_cancel(first)) == Status.UNKNOWN_TICKET
    assert two.attention_submit(data) == first
    assert (
        one.log_page(LogPage.ERROR_INFORMATION, np.dtype([("error_count", "<u8"), ("rest", "V56")]))[
            "error_count"
        ]
        == 0
    )
    for host in (one, two):
        np.testing.assert_allclose(
            out_of(host.attention_fetch(first, ANSWER)), plain(queries, keys, values), atol=1e-5
        )
        host.close()


def test_many_fetches_wait_while_others_go_on(own):
    """Sixteen threads that wait for attention: reads and writes of others do not."""
    namespace = connect(own)
    groups(namespace, 90)
    data, _ = descriptor(90)
    failures = []

    def attend():
        try:
            for _ in range(4):
                namespace.attend(data, ANSWER)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=attend) for _ in range(16)]
    for thread in threads:
        thread.start()
    start, done = time.monotonic(), 0
    while any(thread.is_alive() for thread in threads):
        namespace.write(9000, blocks(1, done))
        np.testing.assert_array_equal(namespace.read(9000, 1), blocks(1, done))
        done += 1
    assert not failures
    assert done > 3, f"{done} writes in {time.monotonic() - start:.1f} s"
    namespace.close()


# corruption


def test_corrupt_page(own):
    """Bit rot: no wrong data beside the reactor, but the drive's error, with the block."""
    namespace = connect(own)
    namespace.write(50, blocks(20))
    namespace.flush()
    namespace.close()
    own.end()
    drive = Drive.open(own.drive, DriveConfig(num_workers=1))
    page = int(drive.ftl.resolve(np.array([55]))[0])
    offset = drive.ftl.media.layout.data_start + page * 4096 + 77
    drive.close()
    with own.drive.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 8]))
    own.start()
    namespace = connect(own)
    for first, count in ((55, 1), (50, 20)):
        with pytest.raises(NvmeStatusError) as caught:
            namespace.read(first, count)
        assert caught.value.status == Status.UNRECOVERED_READ_ERROR
        assert namespace.log_page(LogPage.ERROR_INFORMATION, ERROR_LOG_ENTRY)[0]["lba"] == 55
    np.testing.assert_array_equal(namespace.read(56, 14), blocks(20)[6 * 4096 :])
    namespace.write(55, blocks(1))
    np.testing.assert_array_equal(namespace.read(55, 1), blocks(1))
    namespace.close()
    assert "LBA 55" in own.end()


# SPDK's own programs


def test_spdk_nvme_identify(own):
    """SPDK's program finds the drive, and a namespace of its size."""
    done = subprocess.run(
        ["spdk_nvme_identify", "--no-huge", "-s", "256", "-r", own.transport_id], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "kvfs computational drive" in done.stdout
    assert re.search(r"Deallocate:\s+Supported", done.stdout)


@pytest.mark.parametrize("pattern", ["read", "randwrite", "randrw"])
def test_spdk_nvme_perf(own, pattern):
    """SPDK's load: no command fails."""
    namespace = connect(own)
    namespace.write(0, blocks(2000))
    namespace.close()
    arguments = ["-q", "32", "-o", "16384", "-w", pattern, "-t", "2", "-s", "256", "--no-huge"]
    done = subprocess.run(
        ["spdk_nvme_perf", *arguments, *(["-M", "50"] if pattern == "randrw" else []), "-r", own.transport_id],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"^Total\s*:\s*([\d.]+)", done.stdout, re.MULTILINE)[1]) > 100
    assert own.process.poll() is None


# ends


def test_killed_host(own):
    """A host that dies in the middle of its commands: the others go on, and the target ends as it should."""
    namespace = connect(own)
    groups(namespace, 2)
    for _ in range(3):
        host = subprocess.Popen(
            [*LOAD, "-w", "randrw", "-M", "50", "-r", own.transport_id],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(2)
        host.kill()
        host.wait()
        data = blocks(8)
        namespace.write(12_000, data)
        np.testing.assert_array_equal(namespace.read(12_000, 8), data)
    namespace.close()


def test_closed_cleanly_under_load(own):
    """SIGTERM while hosts write: the drive is closed, all that was flushed is there."""
    namespace = connect(own)
    data = blocks(500, 4)
    namespace.write(100, data)
    namespace.flush()
    load = subprocess.Popen(
        [*LOAD, "-w", "randread", "-r", own.transport_id],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(2)
        own.end()
    finally:
        load.kill()
        load.wait()
    namespace.close()
    scanned = []
    drive = Drive.open(own.drive, DriveConfig(num_workers=1, progress=lambda done, total: scanned.append(done)))
    np.testing.assert_array_equal(Namespace(drive.transport).read(100, 500), data)
    assert drive.ftl.check() == []
    drive.close()


def test_killed_target(own):
    """SIGKILL: what was flushed is there when it is served again."""
    namespace = connect(own)
    data = blocks(500, 6)
    namespace.write(100, data)
    namespace.flush()
    namespace.write(3000, blocks(100))
    own.kill()
    own.start()
    np.testing.assert_array_equal(namespace.read(100, 500), data)
    with pytest.raises(ConnectionLost):  # the write that no flush had covered may be gone
        namespace.flush()
    namespace.close()


def test_port_in_use(tmp_path):
    """One line that says which address, and why."""
    Drive.format(tmp_path / "drive", GEOMETRY)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RuntimeError) as caught:
            ServedDrive(tmp_path / "drive", address)
    last = str(caught.value).strip().splitlines()[-1]
    assert f"cannot listen on {address}: Address already in use" in last
    Drive.open(tmp_path / "drive", DriveConfig(num_workers=1)).close()  # it was let go of


def test_authentication(tmp_path):
    """Only hosts of the access file, and only with their keys; the target proves itself, too."""
    nqn = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-000000000001"
    key, controller_key = Key.generate(), Key.generate()
    write_key_file(tmp_path / "host.key", key)
    write_key_file(tmp_path / "drive.key", controller_key)
    access = tmp_path / "access.toml"
    access.write_text(f'[[host]]\nnqn = "{nqn}"\nkey_file = "host.key"\ncontroller_key_file = "drive.key"\n')
    access.chmod(0o600)
    Drive.format(tmp_path / "drive", GEOMETRY)
    served = ServedDrive(tmp_path / "drive", options=["--host-access", str(access)])
    try:
        with closing(SocketHost(served.port, nqn, NQN)) as host:
            assert host.must_authenticate
            authenticator = HostAuthenticator(nqn, NQN, Credentials(key, controller_key))
            host.authenticate(authenticator)
            assert authenticator.is_authenticated, authenticator.failure
            assert host.version() >> 16 == 2
        with closing(SocketHost(served.port, nqn, NQN)) as host, pytest.raises(CommandRefused):
            host.version()
        with closing(SocketHost(served.port, nqn, NQN)) as host:
            authenticator = HostAuthenticator(nqn, NQN, Credentials(Key.generate(), controller_key))
            host.authenticate(authenticator)
            assert authenticator.has_failed
        with pytest.raises((CommandRefused, ConnectionError)):
            SocketHost(served.port, f"{nqn[:-1]}2", NQN)
    finally:
        served.close()


@pytest.mark.parametrize(
    "options, line",
    [
        ({"listen": "0.0.0.0:4455"}, "can be reached from other machines"),
        ({"listen": "somewhere:4455"}, "SPDK listens on numeric addresses only"),
        ({"listen": "127.0.0.1"}, "an address to listen on is HOST:PORT"),
        ({"listen": "vfio-user:/no/such/folder"}, "no folder for a vfio-user socket"),
        ({"options": ["--host-access", "/no/such/file"]}, "/no/such/file: "),
        ({"options": ["--nqn", "no name"]}, "no name"),
    ],
)
def test_bad_input(tmp_path, options, line):
    """One clear line, before the drive is opened."""
    with pytest.raises(RuntimeError) as caught:
        ServedDrive(tmp_path / "no_drive", **options)
    (said,) = str(caught.value).strip().splitlines()
    assert said.startswith("kvfsctl: ") and line in said


def test_no_memory_for_spdk(tmp_path):
    """More huge pages than there are: one line. (All other tests run without any.)"""
    done = in_process(tmp_path, "TargetConfig(LISTEN, hugepages=True, memory_mb=1 << 30)")
    assert "does not start" in done.stderr.strip().splitlines()[-1]


def test_second_start(tmp_path):
    """SPDK starts once in a process: the second drive is told, the first goes on."""
    done = in_process(tmp_path, "TargetConfig(LISTEN)", "SpdkTarget(drive, TargetConfig(LISTEN))")
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("SPDK was started in this process before: its target needs a process of its own")
    )
    assert "closed" in done.stdout


def test_silent_hosts_are_forgotten(tmp_path):
    """What a host that is gone left under way ends; one that is heard keeps its tickets."""
    host = (
        "from tests.unit.accel.test_drive import *; from spdk_glue.transports.url import open_transport;"
        "import sys; namespace = Namespace(open_transport(sys.argv[1])); groups(namespace, 2);"
        "print(namespace.attention_submit(descriptor(2)[0]), flush=True); import os; os.kill(os.getpid(), 9)"
    )
    steps = f"""
import subprocess, sys, time
def submit():
    program = [sys.executable, "-c", {host!r}, "spdk:" + TRANSPORT_ID]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr
submit()
assert target.forget_silent_hosts(60) == []
time.sleep(1.5)
submit()  # the same number: the other host's is not in its way
print("forgotten", target.forget_silent_hosts(1))
"""
    done = in_process(tmp_path, "TargetConfig(LISTEN)", steps)
    assert re.search(r"forgotten \[\d+\]", done.stdout), done.stdout + done.stderr


def in_process(folder, config: str, steps: str = "") -> subprocess.CompletedProcess:
    """A process that serves a new drive, does some steps, and closes both."""
    Drive.format(folder / "drive", GEOMETRY)
    port = free_port()
    code = f"""
from accel.drive import Drive, DriveConfig
from spdk_glue.spdk_target.configuration import Listener, TargetConfig
from spdk_glue.spdk_target.target import SpdkTarget
LISTEN = (Listener("TCP", "127.0.0.1", {port}),)
TRANSPORT_ID = "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{port} subnqn:"
drive = Drive.open({str(folder / "drive")!r}, DriveConfig(cache_bytes=16 << 20, num_workers=2))
try:
    with SpdkTarget(drive, {config}) as target:
        TRANSPORT_ID += target.nqn
{textwrap.indent(steps, "        ")}
finally:
    drive.close()
    print("closed")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
