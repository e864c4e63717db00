"""Our host and our target over TCP: who gets in, who does not, and what each is told."""

import logging
from contextlib import closing

import numpy as np
import pytest

from spdk_glue.fabrics.authentication import (
    AuthenticationFailed,
    Credentials,
    HostAuthenticator,
    Key,
    KeyFileError,
    read_key_file,
)
from spdk_glue.fabrics.records import DISCOVERY_NQN
from spdk_glue.fabrics.target.host_access import UnauthenticatedListener
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import NvmeError
from spdk_glue.transports.tcp import TcpTransport
from tests.unit.spdk_glue.fabrics.authenticated_target import DRIVE_NQN, AuthenticatedTarget, host_name
from tests.unit.spdk_glue.fabrics.socket_host import CommandRefused, SocketHost

HOST, OTHER, UNKNOWN = host_name(1), host_name(2), host_name(3)
BLOCK = 4096


@pytest.fixture
def target(tmp_path):
    target = AuthenticatedTarget(tmp_path)
    for name in ("host", "other", "drive", "strange"):
        target.new_key(name)
    target.allow(HOST, key_file="host", controller_key_file="drive")
    target.allow(OTHER, key_file="other")
    with target.serving():
        yield target


@pytest.fixture
def quiet_log(caplog):
    """Warnings of refused hosts belong to these tests; no secret belongs to any log."""
    caplog.set_level(logging.DEBUG)
    return caplog


def connect(target, hostnqn=HOST, **options):
    options = {name: target.folder / value for name, value in options.items()}
    return BlockNamespace(TcpTransport.connect(target.address(hostnqn=hostnqn, **options), reconnect_ms=0))


@pytest.mark.parametrize(
    "options", [{"key_file": "host"}, {"key_file": "host", "controller_key_file": "drive"}]
)
def test_host_with_its_key(target, options):
    """Data over queues that each had to prove themselves."""
    with closing(connect(target, **options)) as namespace:
        data = np.random.default_rng(1).integers(0, 256, 8 * BLOCK, np.uint8)
        namespace.write(3, data)
        assert (namespace.read(3, 8) == data).all()
    assert (target.drive.blocks[3:11].reshape(-1) == data).all()


REFUSED = [
    (HOST, {"key_file": "strange"}, AuthenticationFailed, "the keys of the two sides differ"),
    (HOST, {"key_file": "other"}, AuthenticationFailed, "the keys of the two sides differ"),
    (
        HOST,
        {"key_file": "host", "controller_key_file": "strange"},
        AuthenticationFailed,
        "does not have its key",
    ),
    (OTHER, {"key_file": "other", "controller_key_file": "drive"}, AuthenticationFailed, "it lacks one"),
    (HOST, {}, NvmeError, "name the host's key file"),
    (HOST, {"controller_key_file": "drive"}, NvmeError, "needs a key-file"),
    (UNKNOWN, {"key_file": "host"}, NvmeError, "not on the target's list"),
    (HOST, {"key_file": "absent"}, KeyFileError, "there is no such file"),
    (HOST, {"key_file": "open"}, KeyFileError, "others than its owner can read it"),
    (HOST, {"key_file": "damaged"}, KeyFileError, "checksum"),
]


@pytest.mark.parametrize("hostnqn, options, error, why", REFUSED)
def test_hosts_that_are_refused(target, quiet_log, hostnqn, options, error, why):
    """Each gets one line that says what to do; the drive sees no command, the log no secret."""
    target.new_key("open").chmod(0o644)
    damaged = target.new_key("damaged")
    damaged.write_text(damaged.read_text().replace(":01:", ":00:").swapcase().replace("dhhc", "DHHC"))
    with pytest.raises(error) as caught:
        connect(target, hostnqn, **options)
    message = str(caught.value)
    assert why in message and "\n" not in message
    assert not target.drive.seen
    shown = message + quiet_log.text
    for path in target.folder.iterdir():
        if path.name != "access.toml":
            assert path.read_text().split(":")[2] not in shown


def test_target_without_proof_is_not_taken_for_the_drive(target, tmp_path):
    """An impostor that simply does not ask for authentication."""
    impostor = AuthenticatedTarget(tmp_path / "impostor")
    impostor.folder.mkdir()
    impostor.allow(HOST)
    with impostor.serving():
        address = impostor.address(
            hostnqn=HOST, key_file=target.folder / "host", controller_key_file=target.folder / "drive"
        )
        with pytest.raises(NvmeError):
            TcpTransport.connect(address, reconnect_ms=0)
    assert not impostor.drive.seen


def socket_host(target, nqn=HOST, subsystem=DRIVE_NQN):
    return closing(SocketHost(target.port, nqn, subsystem))


def authenticator(target, key="host", controller_key=None, nqn=HOST):
    keys = [read_key_file(target.folder / name) if name else None for name in (key, controller_key)]
    return HostAuthenticator(nqn, DRIVE_NQN, Credentials(*keys))


def test_nothing_before_the_proof(target):
    """Properties tell of the drive, and enable it."""
    with socket_host(target) as host:
        assert host.must_authenticate
        for _ in range(3):
            with pytest.raises(CommandRefused):
                host.version()
        proof = authenticator(target)
        host.send(proof.next_message())
        with pytest.raises(CommandRefused):
            host.version()
        proof.receive(host.receive())
        host.authenticate(proof)
        assert proof.is_authenticated and host.version()


def test_again_while_connected(target):
    with socket_host(target) as host:
        for _ in range(3):
            proof = authenticator(target, controller_key="drive")
            host.authenticate(proof)
            assert proof.is_authenticated and host.version()
        proof = authenticator(target)
        host.send(proof.next_message())
        assert host.version(), "served while it goes on"


def test_again_with_a_wrong_key(target, quiet_log):
    """Who cannot repeat the proof is served nothing more, not even while it does not ask why."""
    with socket_host(target) as host:
        host.authenticate(authenticator(target))
        proof = authenticator(target, key="strange")
        host.send(proof.next_message())
        proof.receive(host.receive())
        host.send(proof.next_message())
        with pytest.raises((CommandRefused, ConnectionError)):
            host.version()
    assert host.host_nqn in quiet_log.text


def test_silent_hosts_are_let_go(target, quiet_log):
    """A stranger who connects and says nothing does not keep a place."""
    with target.serving(limits=Limits(authentication_seconds=0.3)):
        for num_messages in range(2):
            with socket_host(target) as host:
                if num_messages:
                    host.send(authenticator(target).next_message())
                with pytest.raises(ConnectionError):
                    host._take()


def test_discovery(target):
    """Hosts on the list find the drive; others learn not even its name."""
    with socket_host(target, HOST, DISCOVERY_NQN):
        pass
    with pytest.raises(CommandRefused):
        SocketHost(target.port, UNKNOWN, DISCOVERY_NQN)


def test_read_only_host(tmp_path):
    target = AuthenticatedTarget(tmp_path)
    target.new_key("host", Key.generate())
    target.allow(HOST, key_file="host", read_only=True)
    with target.serving(), closing(connect(target, key_file="host")) as namespace:
        assert not namespace.read(0, 1).any()
        with pytest.raises(NvmeError):
            namespace.write(0, np.ones(BLOCK, np.uint8))
    assert not target.drive.blocks.any()


def test_no_listening_for_everybody(target):
    """Off loopback every host has to have a key."""
    target.allow(UNKNOWN)
    with pytest.raises(UnauthenticatedListener, match=UNKNOWN), target.serving("0.0.0.0"):
        pass
