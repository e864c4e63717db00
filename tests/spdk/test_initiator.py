"""Our initiator against SPDK's target: losses, idleness, authentication, and a kvfs drive on it."""

import time

import numpy as np
import pytest

import kvfs
from kvfs.errors import DriveBusy, MediaFailure, NamespaceHoldsData
from kvfs_bench.nvmf_target import SUBSYSTEM, Target
from spdk_glue import command, dma
from spdk_glue.fabrics.authentication import AuthenticationFailed, Hash, Key, KeyFileError, write_key_file
from spdk_glue.identify import SMART_LOG, LogPage
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import ConnectionRefused, NvmeStatusError, Status
from spdk_glue.transports.tcp import TcpTransport

BLOCK, MIB = 4096, 1 << 20


def connect(target, options="", **kwargs):
    return BlockNamespace(TcpTransport.connect(target.address + options, **kwargs))


def content(num_blocks, seed=0):
    data = dma.allocate(num_blocks * BLOCK)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.size, np.uint8)
    return data


def test_idle_for_half_a_minute(shared_target):
    """The target drops hosts that it does not hear of: keep-alives go out with nobody doing anything."""
    namespace = connect(shared_target, keep_alive_ms=5000)
    before = namespace.transport._controller.generation
    time.sleep(31)
    namespace.read(0, 1)
    assert namespace.transport._controller.generation == before
    namespace.close()


def test_two_namespaces(shared_target):
    first, second = connect(shared_target), connect(shared_target, "?nsid=2")
    assert (first.nsid, second.nsid) == (1, 2)
    data = [content(10, seed) for seed in (1, 2)]
    for namespace, one in zip((first, second), data, strict=True):
        namespace.write(0, one)
    for namespace, one in zip((first, second), data, strict=True):
        np.testing.assert_array_equal(namespace.read(0, 10), one)
        namespace.close()


def test_commands_beside_reads_and_writes(shared_target):
    """Log pages, Compare, deallocation, and an opcode that the target does not know."""
    namespace = connect(shared_target)
    assert namespace.log_page(LogPage.SMART, SMART_LOG)["temperature_kelvin"] < 1000
    data = content(4)
    namespace.write(40, data)
    entry = command.write(40, 4)
    entry["opcode"] = command.IoOpcode.COMPARE
    entry["nsid"] = 1
    namespace.execute(entry, data)
    with pytest.raises(NvmeStatusError) as caught:
        namespace.execute(entry, content(4, 1))
    assert caught.value.status == Status.COMPARE_FAILURE
    namespace.deallocate([(40, 2)])
    with pytest.raises(NvmeStatusError) as caught:
        namespace.execute(command.vendor(command.IoOpcode.ATTENTION_SUBMIT, 1), content(1))
    assert caught.value.status == Status.INVALID_OPCODE
    namespace.read(0, 1)
    namespace.close()


def test_refused(shared_target):
    for address, what in (
        (f"{shared_target.address}x", f"there is no subsystem {SUBSYSTEM}x"),
        ("nvme+tcp://127.0.0.1:1/" + SUBSYSTEM, "refused"),
    ):
        with pytest.raises(ConnectionRefused, match=what):
            TcpTransport.connect(address)


# authentication

HOST = "nqn.2026-11.io.kvfs:secret-host"


@pytest.fixture
def keyed_target(tmp_path):
    """(target, host's key file, controller's key file): it takes HOST alone, with these keys."""
    target = Target(tmp_path, {"memory": ("malloc", 16 * MIB)})
    files = []
    for name, key in (("host", Key.generate(Hash.SHA256)), ("controller", Key.generate(Hash.SHA384))):
        files.append(tmp_path / f"{name}-key")
        write_key_file(files[-1], key)
        target.rpc("keyring_file_add_key", name=name, path=str(files[-1]))
    target.rpc("nvmf_subsystem_allow_any_host", nqn=SUBSYSTEM, allow_any_host=False)
    target.rpc(
        "nvmf_subsystem_add_host", nqn=SUBSYSTEM, host=HOST, dhchap_key="host", dhchap_ctrlr_key="controller"
    )
    yield target, *files
    target.close()


def test_authentication(keyed_target, tmp_path):
    """One way and both, on every queue; each failure is one line."""
    target, host_key, controller_key = keyed_target
    one_way = f"?hostnqn={HOST}&key-file={host_key}"
    both_ways = f"{one_way}&controller-key-file={controller_key}"
    for options in (one_way, both_ways):
        namespace = connect(target, options)
        data = content(20)
        namespace.write(0, data)
        np.testing.assert_array_equal(namespace.read(0, 20), data)
        namespace.close()
    wrong, open_to_all = tmp_path / "wrong", tmp_path / "open"
    for path in (wrong, open_to_all):
        write_key_file(path, Key.generate(Hash.SHA256))
    open_to_all.chmod(0o644)
    for options, error, what in (
        (f"?hostnqn={HOST}x", ConnectionRefused, "not on the target's list"),
        (f"?hostnqn={HOST}", ConnectionRefused, "key-file"),
        (f"?hostnqn={HOST}&key-file={wrong}", AuthenticationFailed, "keys of the two sides differ"),
        (f"{one_way}&controller-key-file={wrong}", AuthenticationFailed, "does not have its key"),
        (f"?hostnqn={HOST}&key-file={tmp_path}/none", KeyFileError, "no such file"),
        (f"?hostnqn={HOST}&key-file={open_to_all}", KeyFileError, "open"),
    ):
        with pytest.raises(error, match=what):
            connect(target, options)


def test_authentication_after_a_restart(keyed_target):
    """Each new connection proves itself again."""
    target, host_key, controller_key = keyed_target
    namespace = connect(target, f"?hostnqn={HOST}&key-file={host_key}&controller-key-file={controller_key}")
    data = content(20)
    namespace.write(0, data)
    for queue_pair in target.rpc("nvmf_subsystem_get_qpairs", nqn=SUBSYSTEM):
        assert queue_pair["auth"]["state"] == "completed"
    namespace.transport._controller.lose(namespace.transport._controller.generation, "a test says so")
    np.testing.assert_array_equal(namespace.read(0, 20), data)
    namespace.close()


# a kvfs drive whose flash is the target's namespace


def test_a_kvfs_drive(target):
    """Format, write, open again, check: flash by our own wire."""
    kvfs.format(target.address)
    with pytest.raises(NamespaceHoldsData):
        kvfs.format(target.address)
    random = np.random.default_rng(1)
    rows = random.standard_normal((600, 2, 64), np.float32).astype(np.float16)
    queries = random.standard_normal((1, 1, 8, 64), np.float32)
    answers = []
    with kvfs.open(target.address, cache_bytes="8MiB") as store:
        with pytest.raises(DriveBusy):
            kvfs.open(target.address)
        model = store.add_model("m", num_layers=1, num_query_heads=8, num_kv_heads=2, head_dim=64)
        sequence = store.create_sequence(model, "s")
        sequence.append(0, rows, rows)
        sequence.flush()
        answers.append(store.attend(0, queries, [sequence])[0])
    with kvfs.open(target.address, cache_bytes="8MiB") as store:
        answers.append(store.attend(0, queries, [store.sequence("s")])[0])
        assert store.check() == []
    np.testing.assert_allclose(*answers, atol=1e-6)
    target.kill()
    with pytest.raises(MediaFailure, match="refused"):
        kvfs.open(target.address)
