"""The access file of a target, and where a target may listen."""

import pytest

from spdk_glue.fabrics.authentication import DhGroup, Hash, Key, write_key_file
from spdk_glue.fabrics.target.host_access import (
    HostAccess,
    HostAccessError,
    UnauthenticatedListener,
    is_loopback,
)

HOST = "nqn.2014-08.org.nvmexpress:uuid:7a9e53a4-0a2e-4b3c-9a8e-0f4a2f3b6c11"
OTHER = "nqn.2026-11.io.kvfs:host-b"
DRIVE = "nqn.2026-11.io.kvfs:drive"


@pytest.fixture
def folder(tmp_path):
    write_key_file(tmp_path / "host.key", Key.generate(Hash.SHA256))
    write_key_file(tmp_path / "drive.key", Key.generate())
    return tmp_path


def access(folder, text):
    path = folder / "access.toml"
    path.write_text(text)
    path.chmod(0o644)
    return HostAccess.read(path)


def test_access_file(folder):
    hosts = access(
        folder,
        f"""
        [[host]]
        nqn = "{HOST}"
        key_file = "host.key"
        controller_key_file = "{folder}/drive.key"
        hashes = ["sha384", "sha256"]
        dh_groups = ["ffdhe2048", "null"]
        read_only = true

        [[host]]
        nqn = "{OTHER}"
        """,
    )
    first, second = hosts.allowed(HOST), hosts.allowed(OTHER)
    assert hosts.allowed(HOST.upper()) is None and hosts.allowed("") is None
    assert first.read_only and not second.read_only
    assert first.credentials.policy.hashes == (Hash.SHA384, Hash.SHA256)
    assert first.credentials.policy.groups == (DhGroup.FFDHE2048, DhGroup.NULL)
    assert first.credentials.controller_key is not None
    authenticator = first.authenticator(DRIVE)
    assert (authenticator.host_nqn, authenticator.subsystem_nqn) == (HOST, DRIVE)
    assert second.authenticator(DRIVE) is None


def test_defaults(folder):
    """Who says nothing of hashes and groups does not get the weakest."""
    credentials = access(folder, f'[[host]]\nnqn = "{HOST}"\nkey_file = "host.key"').allowed(HOST).credentials
    assert DhGroup.NULL not in credentials.policy.groups and credentials.controller_key is None


KEYED = f'[[host]]\nnqn = "{HOST}"\nkey_file = "host.key"\n'


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "names no host"),
        ("host = 3", "names no host"),
        ("host = []", "names no host"),
        ("hosts = 3", "unknown: hosts"),
        (KEYED + "[listen]\nport = 3", "unknown: listen"),
        ("[[host]\n", "not TOML"),
        ("[[host]]\nkey_file = 'host.key'", "host number 1: it has no nqn"),
        ("[[host]]\nnqn = 3", "host 3: nqn is not a str"),
        ("[[host]]\nnqn = 'somebody'", "somebody"),
        (KEYED + KEYED, f"host {HOST}: there twice"),
        (KEYED + "key = 3", "key is unknown, it may have nqn, key_file"),
        (KEYED + "read_only = 1", "read_only is not a bool"),
        (KEYED + "read_only = 'no'", "read_only is not a bool"),
        (KEYED + "hashes = 'sha256'", "hashes is not a list"),
        (KEYED + "hashes = ['md5']", "'md5' in hashes; there are sha256, sha384, sha512"),
        (KEYED + "hashes = [1]", "1 in hashes"),
        (KEYED + "hashes = []", "hashes is empty"),
        (KEYED + "hashes = ['sha256', 'sha256']", "twice"),
        (KEYED + "dh_groups = ['modp1024']", "there are null, ffdhe2048"),
        (f'[[host]]\nnqn = "{HOST}"\ndh_groups = ["ffdhe2048"]', "dh_groups without a key_file"),
        (f'[[host]]\nnqn = "{HOST}"\ncontroller_key_file = "drive.key"', "without a key_file"),
        (f'[[host]]\nnqn = "{HOST}"\nkey_file = "absent"', "there is no such file"),
        (f'[[host]]\nnqn = "{HOST}"\nkey_file = ""', "not a regular file"),
        (f'[[host]]\nnqn = "{HOST}"\nkey_file = "a\\u0000b"', "cannot be opened"),
        (KEYED + "controller_key_file = 'host.key'", "the same secret"),
    ],
)
def test_bad_access_files(folder, text, why):
    """One line that names the file, the host and what is wrong; and no host gets in by a mistake."""
    with pytest.raises(HostAccessError) as caught:
        access(folder, text)
    message = str(caught.value)
    assert why in message and message.startswith(str(folder / "access.toml"))
    assert "\n" not in message


def test_key_that_others_can_read(folder):
    (folder / "host.key").chmod(0o644)
    with pytest.raises(HostAccessError, match=f"host {HOST}: key file .*host.key: others than its owner"):
        access(folder, KEYED)


def test_access_file_that_others_can_write(folder):
    """Who can write the list is on it."""
    path = folder / "access.toml"
    path.write_text(KEYED)
    for mode in (0o664, 0o646):
        path.chmod(mode)
        with pytest.raises(HostAccessError, match="can change it"):
            HostAccess.read(path)
    with pytest.raises(HostAccessError, match="no such file"):
        HostAccess.read(folder / "absent")
    with pytest.raises(HostAccessError, match="not a regular file"):
        HostAccess.read(folder)
    path.chmod(0o600)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(HostAccessError, match="not UTF-8"):
        HostAccess.read(path)


LOCAL = ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"]
REACHABLE = ["0.0.0.0", "::", "192.168.1.2", "10.0.2.2", "fe80::1", "::ffff:10.0.0.1", "::ffff:0.0.0.0"]


@pytest.mark.parametrize("address", LOCAL + REACHABLE)
def test_loopback(address):
    assert is_loopback(address) == (address in LOCAL)


@pytest.mark.parametrize("address", REACHABLE)
def test_no_listening_without_authentication(folder, address):
    """A drive that anyone in the network may read because its owner forgot one line."""
    anyone = HostAccess.anyone()
    anyone.check_listen(LOCAL)
    with pytest.raises(UnauthenticatedListener, match="--host-access"):
        anyone.check_listen([*LOCAL, address])
    mixed = access(folder, KEYED + f'[[host]]\nnqn = "{OTHER}"\n')
    mixed.check_listen(LOCAL)
    with pytest.raises(UnauthenticatedListener, match=f"host {OTHER} needs a key_file"):
        mixed.check_listen([address])
    access(folder, KEYED).check_listen([address, *LOCAL])


def test_anyone_is_anyone():
    host = HostAccess.anyone().allowed(OTHER)
    assert host.credentials is None and not host.read_only and host.authenticator(DRIVE) is None
