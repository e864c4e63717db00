"""DH-HMAC-CHAP against SPDK: our host with its target."""

import itertools
from contextlib import closing

import pytest

from kvfs_bench.nvmf_target import SUBSYSTEM, Target
from spdk_glue.fabrics.authentication import (
    Credentials,
    DhGroup,
    FailureReason,
    Hash,
    HostAuthenticator,
    Key,
    Policy,
    write_key_file,
)
from tests.unit.spdk_glue.fabrics.socket_host import CommandRefused, SocketHost

MIB = 1 << 20
NULL = DhGroup.NULL


def host_name(number):
    return f"nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-{number:012x}"


def by_name(choice):
    return choice.name.lower() if choice else "none"


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
        params = {}
        for role, one in names.items():
            if one is not None:
                path = target.folder / f"{role}_{number}"
                write_key_file(path, one)
                target.rpc("keyring_file_add_key", name=path.name, path=str(path))
                params[role] = path.name
        target.rpc("nvmf_subsystem_add_host", nqn=SUBSYSTEM, host=self.nqn, **params)

    def connect(self):
        host = SocketHost(self.target.port, self.nqn, SUBSYSTEM)
        assert host.must_authenticate
        return closing(host)

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
