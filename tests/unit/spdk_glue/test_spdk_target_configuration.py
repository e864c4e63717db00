"""What SPDK's target is told: addresses, hosts and keys, without an SPDK."""

import os
import socket
import threading

import pytest

from spdk_glue.fabrics.authentication import Key, KeyFileError, write_key_file
from spdk_glue.fabrics.records import BadNqn
from spdk_glue.fabrics.target.host_access import HostAccessError
from spdk_glue.spdk_target import rpc
from spdk_glue.spdk_target.configuration import AllowedHost, Listener, TargetConfig, hosts_of_access_file

NQN = "nqn.2026-11.io.kvfs:test"
HOST = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-000000000001"
LOCAL = Listener("TCP", "127.0.0.1", 4420)
FOREIGN = Listener("TCP", "192.0.2.1", 4420)


@pytest.fixture
def key_file(tmp_path):
    write_key_file(tmp_path / "host.key", Key.generate())
    return tmp_path / "host.key"


@pytest.mark.parametrize(
    "text, transport, address, port, is_local",
    [
        ("127.0.0.1:4420", "TCP", "127.0.0.1", 4420, True),
        ("localhost:1", "TCP", "127.0.0.1", 1, True),
        ("[::1]:65535", "TCP", "::1", 65535, True),
        ("0.0.0.0:4420", "TCP", "0.0.0.0", 4420, False),
        ("[::]:4420", "TCP", "::", 4420, False),
        ("rdma:192.0.2.7:4420", "RDMA", "192.0.2.7", 4420, False),
        ("vfio-user:/", "VFIOUSER", "/", 0, True),
    ],
)
def test_listeners(text, transport, address, port, is_local):
    """An address that is taken for a local one needs no key."""
    listener = Listener.parse(text)
    assert listener == Listener(transport, address, port)
    assert listener.is_local == is_local
    assert Listener.parse(str(listener)) == listener


@pytest.mark.parametrize(
    "text", ["", ":", "4420", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "::1:x", "host:1"]
)
def test_bad_listeners(text):
    with pytest.raises(ValueError):
        Listener.parse(text)


@pytest.mark.parametrize("hosts", [(), (AllowedHost(HOST),)], ids=["anyone", "no-key"])
def test_no_listening_without_authentication(hosts):
    """Off loopback, one host without a key is as good as no authentication at all."""
    with pytest.raises(ValueError, match="other machines"):
        TargetConfig((LOCAL, FOREIGN), NQN, hosts)
    TargetConfig((LOCAL,), NQN, hosts)


def test_one_host_without_a_key_is_too_many(key_file):
    other = AllowedHost(HOST[:-1] + "2")
    with pytest.raises(ValueError, match="other machines"):
        TargetConfig((FOREIGN,), NQN, (AllowedHost(HOST, key_file), other))


def test_calls(key_file):
    """What SPDK is told, in order: nobody may connect before it is known who may."""
    config = TargetConfig((FOREIGN,), NQN, (AllowedHost(HOST, key_file, key_file),))
    calls = list(config.calls(NQN, "SERIAL", "model"))
    assert [method for method, _ in calls] == [
        "nvmf_create_transport",
        "nvmf_create_subsystem",
        "nvmf_subsystem_add_ns",
        "keyring_file_add_key",
        "keyring_file_add_key",
        "nvmf_subsystem_add_host",
        "nvmf_subsystem_add_listener",
    ]
    assert calls[0][1]["masked_oncs"] == ["nvmcmps", "nvmcpys"]
    assert calls[1][1]["allow_any_host"] is False
    assert calls[5][1] == {
        "nqn": NQN,
        "host": HOST,
        "dhchap_key": "dhchap_key_0",
        "dhchap_ctrlr_key": "dhchap_ctrlr_key_0",
    }
    assert calls[3][1] == {"name": "dhchap_key_0", "path": str(key_file)}
    anyone = dict(TargetConfig((LOCAL,), NQN).calls(NQN, "SERIAL", "model"))
    assert anyone["nvmf_create_subsystem"]["allow_any_host"] is True
    assert not any("key" in method for method in anyone)


def test_bad_configurations(key_file, tmp_path):
    """Refused before anything starts."""
    with pytest.raises(ValueError, match="at least one"):
        TargetConfig((), NQN)
    with pytest.raises(BadNqn):
        TargetConfig((LOCAL,), "no name")
    with pytest.raises(ValueError, match="CPUs"):
        TargetConfig((LOCAL,), NQN, cpus=(4095,))
    with pytest.raises(ValueError, match="too"):
        AllowedHost(HOST, None, key_file)
    key_file.chmod(0o644)
    with pytest.raises(KeyFileError, match="0644"):
        AllowedHost(HOST, key_file)
    with pytest.raises(KeyFileError):
        AllowedHost(HOST, tmp_path / "none")


def test_access_files(key_file, tmp_path):
    """The same file as for kvfs's own target; what SPDK cannot do for one host is refused, not forgotten."""
    access = tmp_path / "access.toml"
    access.write_text(f'[[host]]\nnqn = "{HOST}"\nkey_file = "host.key"\n')
    access.chmod(0o600)
    assert hosts_of_access_file(access) == (AllowedHost(HOST, key_file),)
    access.write_text(access.read_text() + "read_only = true\n")
    with pytest.raises(HostAccessError, match="read_only"):
        hosts_of_access_file(access)
    access.write_text("[[host]]\n")
    with pytest.raises(HostAccessError, match="nqn"):
        hosts_of_access_file(access)


def test_vfio_user_polls(tmp_path):
    assert not TargetConfig((LOCAL,)).polls
    assert TargetConfig((LOCAL, Listener("VFIOUSER", os.fspath(tmp_path)))).polls


@pytest.mark.parametrize(
    "answer, error",
    [
        (b'{"jsonrpc": "2.0", "id": 1, "error": {"code": -1, "message": "no"}}', rpc.RpcRefused),
        (b'{"jsonrpc": "2.0", "id":', ConnectionError),
        (b"", ConnectionError),
    ],
)
def test_rpc_errors(tmp_path, answer, error):
    """A refusal has its reason; half an answer is none."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tmp_path / "socket"))
        server.listen()

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(error):
            rpc.call(tmp_path / "socket", "method", name=1)
        thread.join()
