"""DH-HMAC-CHAP against SPDK: our host with its target, its host with ours."""

import itertools
from contextlib import closing

import numpy as np
import pytest

from kvfs_bench.nvmf_target import SUBSYSTEM, Target
from spdk_glue.fabrics.authentication import (
    AuthenticationFailed,
    Credentials,
    DhGroup,
    FailureReason,
    Hash,
    HostAuthenticator,
    Key,
    Policy,
    write_key_file,
)
from spdk_glue.namespace import BlockNamespace
from spdk_glue.spdk_target.rpc import RpcRefused
from spdk_glue.transports.tcp import TcpTransport
from tests.unit.spdk_glue.fabrics.authenticated_target import DRIVE_NQN, AuthenticatedTarget, host_name
from tests.unit.spdk_glue.fabrics.socket_host import CommandRefused, SocketHost

MIB = 1 << 20
NULL = DhGroup.NULL


def by_name(choice):
    return "none" if choice is None else choice.name.lower()


@pytest.fixture(scope="module")
def spdk_target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spdk_target")
    target = Target(folder, {"memory": ("malloc", MIB)})
    target.rpc("nvmf_subsystem_allow_any_host", nqn=SUBSYSTEM, allow_any_host=False)
    yield target
    target.close()


class KnownHost:
    """A host whose keys SPDK's target has."""

    numbers = itertools.count(1)

    def __init__(self, target, key, controller_key=None):
        number = next(self.numbers)
        self.target, self.key, self.controller_key = target, key, controller_key
        self.nqn = host_name(number)
        names = {"dhchap_key": key, "dhchap_ctrlr_key": controller_key}
        params, self.files = {}, {}
        for role, one in names.items():
            if one is not None:
                path = target.folder / f"{role}_{number}"
                write_key_file(path, one)
                target.rpc("keyring_file_add_key", name=path.name, path=str(path))
                params[role], self.files[role] = path.name, path
        target.rpc("nvmf_subsystem_add_host", nqn=SUBSYSTEM, host=self.nqn, **params)

    def connect(self):
        host = SocketHost(self.target.port, self.nqn, SUBSYSTEM)
        assert host.must_authenticate
        return closing(host)

    def transport(self, is_bidirectional, other_files=()):
        files = self.files | dict(other_files)
        options = {"hostnqn": self.nqn, "key-file": files["dhchap_key"]}
        if is_bidirectional:
            options["controller-key-file"] = files["dhchap_ctrlr_key"]
        given = "&".join(f"{name}={value}" for name, value in options.items())
        return TcpTransport.connect(f"{self.target.address}?{given}", reconnect_ms=0)

    def authenticator(self, *, key=None, controller_key=None, policy=None):
        policy = policy or Policy((Hash.SHA256,), (NULL,))
        credentials = Credentials(key or self.key, controller_key, policy)
        return HostAuthenticator(self.nqn, SUBSYSTEM, credentials)


@pytest.mark.parametrize("is_bidirectional", [False, True], ids=["host", "both"])
@pytest.mark.parametrize("group", DhGroup, ids=by_name)
@pytest.mark.parametrize("hash_", Hash, ids=by_name)
def test_host_with_spdk_target(spdk_target, hash_, group, is_bidirectional):
    """A response that only our own controller takes authenticates nobody."""
    controller_key = Key.generate(hash_) if is_bidirectional else None
    known = KnownHost(spdk_target, Key.generate(hash_), controller_key)
    with known.connect() as host:
        policy = Policy((hash_,), (group,))
        authenticator = known.authenticator(controller_key=controller_key, policy=policy)
        host.authenticate(authenticator)
        assert authenticator.is_authenticated, authenticator.failure
        assert (authenticator.hash, authenticator.group) == (hash_, group)
        assert host.version() >> 16 in (1, 2)


@pytest.mark.parametrize("transform", [None, *Hash], ids=by_name)
@pytest.mark.parametrize("num_bytes", [32, 48, 64])
def test_every_form_of_key(spdk_target, transform, num_bytes):
    """A key that is bound to its NQN in another way than the peer's never fits."""
    known = KnownHost(spdk_target, Key.generate(transform, num_bytes), Key.generate(transform, num_bytes))
    with known.connect() as host:
        authenticator = known.authenticator(controller_key=known.controller_key)
        host.authenticate(authenticator)
        assert authenticator.is_authenticated, authenticator.failure


def test_again_while_connected(spdk_target):
    """Keys are exchanged for new ones on connections that stay."""
    known = KnownHost(spdk_target, Key.generate(), Key.generate())
    with known.connect() as host:
        for _ in range(3):
            authenticator = known.authenticator(controller_key=known.controller_key)
            host.authenticate(authenticator)
            assert authenticator.is_authenticated, authenticator.failure
            host.version()


def test_nothing_before_authentication(spdk_target):
    """A queue that serves before it knows whom."""
    known = KnownHost(spdk_target, Key.generate())
    with known.connect() as host, pytest.raises(CommandRefused):
        host.version()


def test_wrong_key(spdk_target):
    """Whoever has another key gets in, or learns nothing of why not."""
    known = KnownHost(spdk_target, Key.generate())
    with known.connect() as host:
        authenticator = known.authenticator(key=Key.generate())
        host.authenticate(authenticator)
        assert authenticator.has_failed and authenticator.failure.by_peer
        assert authenticator.failure.reason is FailureReason.AUTHENTICATION_FAILED


def test_wrong_controller_key(spdk_target):
    """A host that trusts any target sends its data to any."""
    known = KnownHost(spdk_target, Key.generate(), Key.generate())
    with known.connect() as host:
        authenticator = known.authenticator(controller_key=Key.generate())
        host.authenticate(authenticator)
        assert authenticator.has_failed and not authenticator.failure.by_peer
        assert authenticator.failure.reason is FailureReason.AUTHENTICATION_FAILED


def test_controller_without_key(spdk_target):
    """A target that cannot prove itself, taken for one that did."""
    known = KnownHost(spdk_target, Key.generate())
    with known.connect() as host:
        authenticator = known.authenticator(controller_key=Key.generate())
        host.authenticate(authenticator)
        assert authenticator.has_failed and authenticator.failure.by_peer


# Our initiator with SPDK's target, SPDK's host with our target.


@pytest.mark.parametrize("is_bidirectional", [False, True], ids=["host", "both"])
def test_initiator_with_spdk_target(spdk_target, is_bidirectional):
    """Data over nvme+tcp queues, each of which SPDK has let in."""
    known = KnownHost(spdk_target, Key.generate(Hash.SHA384), Key.generate())
    with closing(BlockNamespace(known.transport(is_bidirectional))) as namespace:
        data = np.random.default_rng(1).integers(0, 256, 16 * 4096, np.uint8)
        namespace.write(1, data)
        assert (namespace.read(1, 16) == data).all()


def test_initiator_with_wrong_keys(spdk_target, tmp_path):
    """Our key is refused, and the target's proof with another than its key."""
    known = KnownHost(spdk_target, Key.generate(), Key.generate())
    write_key_file(tmp_path / "strange", Key.generate())
    for role in ("dhchap_key", "dhchap_ctrlr_key"):
        with pytest.raises(AuthenticationFailed) as caught:
            known.transport(True, {role: tmp_path / "strange"})
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def spdk_host(tmp_path_factory):
    """SPDK's application in the host's part: it attaches to our target, and gives on what it finds there."""
    host = Target(tmp_path_factory.mktemp("spdk_host"), {}, is_polling=True)  # its TCP host knows no other way
    yield host
    host.close()


class SpdkHost:
    """One host of our target, played by SPDK."""

    numbers = itertools.count(1)

    def __init__(self, app, target, **options):
        """options: of the access file"""
        number = next(self.numbers)
        self.app, self.target, self.name = app, target, f"kvfs{number}"
        self.nqn = host_name(number)
        files = {}
        for role in ("key_file", "controller_key_file"):
            path = target.new_key(f"{role}_{number}", Key.generate(Hash.SHA256))
            files[role] = path.name
            app.rpc("keyring_file_add_key", name=f"{role}_{number}", path=str(path))
        self.keys = {"dhchap_key": f"key_file_{number}", "dhchap_ctrlr_key": f"controller_key_file_{number}"}
        self.params = {"hostnqn": self.nqn} | self.keys
        target.allow(self.nqn, **files, **options)

    def attach(self, **changes):
        """The names of the block devices that SPDK makes of our namespaces."""
        return self.app.rpc(
            "bdev_nvme_attach_controller",
            name=self.name,
            trtype="TCP",
            adrfam="IPv4",
            traddr="127.0.0.1",
            trsvcid=str(self.target.port),
            subnqn=DRIVE_NQN,
            **{name: value for name, value in (self.params | changes).items() if value is not None},
        )

    def detach(self):
        self.app.rpc("bdev_nvme_detach_controller", name=self.name)


@pytest.mark.parametrize("is_bidirectional", [False, True], ids=["host", "both"])
@pytest.mark.parametrize("group", DhGroup, ids=by_name)
@pytest.mark.parametrize("hash_", Hash, ids=by_name)
def test_spdk_host_with_our_target(spdk_host, tmp_path, hash_, group, is_bidirectional):
    """A host that no one here wrote takes our target's challenges, and its proof."""
    target = AuthenticatedTarget(tmp_path)
    host = SpdkHost(spdk_host, target, hashes=[by_name(hash_)], dh_groups=[by_name(group)])
    with target.serving():
        changes = {} if is_bidirectional else {"dhchap_ctrlr_key": None}
        assert host.attach(**changes) == [f"{host.name}n1"]
        host.detach()


def test_data_and_new_keys_of_spdk_host(spdk_host, tmp_path):
    """SPDK's I/O queues prove themselves, too; and all of them again, while data flow, when it is told to."""
    target = AuthenticatedTarget(tmp_path)
    host = SpdkHost(spdk_host, target)
    with target.serving():
        (bdev,) = host.attach()
        spdk_host.rpc("nvmf_subsystem_add_ns", nqn=SUBSYSTEM, namespace={"bdev_name": bdev})
        data = np.random.default_rng(2).integers(0, 256, 16 * 4096, np.uint8)
        with closing(BlockNamespace(TcpTransport.connect(spdk_host.address))) as namespace:
            namespace.write(5, data)
            assert (target.drive.blocks[5:21].reshape(-1) == data).all()
            spdk_host.rpc("bdev_nvme_set_keys", name=host.name, **host.keys)
            assert (namespace.read(5, 16) == data).all()
        spdk_host.rpc("nvmf_subsystem_remove_ns", nqn=SUBSYSTEM, nsid=1)
        host.detach()


def test_spdk_hosts_that_are_refused(spdk_host, tmp_path):
    """Another's key, no key, a controller key that the target does not have, a name that is not on the list."""
    target = AuthenticatedTarget(tmp_path)
    host, other = SpdkHost(spdk_host, target), SpdkHost(spdk_host, target)
    with target.serving():
        for changes in (
            {"dhchap_key": other.params["dhchap_key"]},
            {"dhchap_ctrlr_key": other.params["dhchap_ctrlr_key"]},
            {"dhchap_key": None, "dhchap_ctrlr_key": None},
            {"hostnqn": host_name(999)},
        ):
            with pytest.raises(RpcRefused):
                host.attach(**changes)
        assert not target.drive.seen
        assert host.attach()
        host.detach()
