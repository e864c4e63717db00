"""Addresses of drives on the wire: what is taken, what is refused, who comes."""

import uuid
from pathlib import Path

import pytest

from spdk_glue.fabrics.initiator import address
from spdk_glue.fabrics.initiator.address import Address
from spdk_glue.status import BadLocation
from spdk_glue.transports.url import is_nvme, open_transport

NQN = "nqn.2026-11.io.kvfs:drive"


def test_the_shortest():
    found = Address.parse(f"nvme+tcp://storage/{NQN}")
    assert found == Address("storage", 4420, NQN)
    assert str(found) == f"nvme+tcp://storage:4420/{NQN}" == found.target


def test_through_a_path():
    """The command line's arguments are paths, which fold slashes."""
    text = f"nvme+tcp://storage:4421/{NQN}?key-file=/etc/key"
    assert Address.parse(str(Path(text))) == Address.parse(text)


def test_all_of_it():
    text = (
        f"nvme+tcp://[::1]:4421/{NQN}?nsid=3&hostnqn=nqn.2026-11.io.kvfs:me&header-digest=on&data-digest=on"
        "&key-file=/etc/kvfs/key&controller-key-file=/etc/kvfs/theirs&reauthenticate=3600"
    )
    found = Address.parse(text)
    assert (found.host, found.port, found.nsid, found.hostnqn) == ("::1", 4421, 3, "nqn.2026-11.io.kvfs:me")
    assert found.header_digest and found.data_digest
    assert (found.key_file, found.controller_key_file) == ("/etc/kvfs/key", "/etc/kvfs/theirs")
    assert str(found) == text and found.target == f"nvme+tcp://[::1]:4421/{NQN}"
    assert Address.parse("nvme+tcp://h/nqn.2026-11.io.kvfs:gr%C3%B6%C3%9Fe").subnqn.endswith("größe")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("nvme+tcp:", "not nvme"),
        (f"nvme+tcp:/{NQN}", "Port"),
        (f"nvme+tcp:///{NQN}", "not nvme"),
        ("nvme+tcp://host/iqn.2026-11.io.kvfs:drive", "qualified name"),
        (f"nvme+tcp://host:port/{NQN}", "port"),
        (f"nvme+tcp://host:99999/{NQN}", "[Pp]ort"),
        (f"nvme+tcp://me:secret@host/{NQN}", "no user"),
        (f"nvme+tcp://host/{NQN}#2", "no user"),
        (f"nvme+tcp://host/{NQN}?nsid=0", "nsid"),
        (f"nvme+tcp://host/{NQN}?nsid=x", "nsid"),
        (f"nvme+tcp://host/{NQN}?reauthenticate=0", "reauthenticate"),
        (f"nvme+tcp://host/{NQN}?nsid=1&nsid=2", "each once"),
        (f"nvme+tcp://host/{NQN}?key=DHHC", "options are"),
        (f"nvme+tcp://host/{NQN}?header-digest=yes", "on or off"),
        (f"nvme+tcp://host/{NQN}?hostnqn=me", "qualified name"),
    ],
)
def test_what_is_refused(text, what):
    """With a line that says why; is_nvme knows it for ours, so no file of that name is made."""
    assert is_nvme(text)
    with pytest.raises(BadLocation, match=what):
        open_transport(text)


def test_a_host_is_itself_again(tmp_path, monkeypatch):
    """A host that comes under another name is a stranger to the target, refused or beside itself."""
    monkeypatch.setattr(address, "HOSTNQN_FILE", tmp_path / "hostnqn")
    monkeypatch.setattr(address, "HOSTID_FILE", tmp_path / "hostid")
    where = Address.parse(f"nvme+tcp://host/{NQN}")
    assert where.identity() == where.identity()
    host_id, hostnqn = where.identity()
    assert hostnqn == f"nqn.2014-08.org.nvmexpress:uuid:{host_id}"
    (tmp_path / "hostnqn").write_text("nqn.2026-11.io.kvfs:configured\n")
    assert where.identity()[1] == "nqn.2026-11.io.kvfs:configured"
    (tmp_path / "hostid").write_text("00000000-0000-0000-0000-000000000007\n")
    assert where.identity()[0] == uuid.UUID(int=7)
    (tmp_path / "hostid").write_text("no identifier")
    with pytest.raises(BadLocation, match="hostid"):
        where.identity()
    named = Address.parse(f"nvme+tcp://host/{NQN}?hostnqn=nqn.2026-11.io.kvfs:named")
    assert named.identity()[1] == "nqn.2026-11.io.kvfs:named" and named.identity() == named.identity()
    ours = f"nqn.2014-08.org.nvmexpress:uuid:{uuid.UUID(int=9)}"
    assert Address.parse(f"nvme+tcp://host/{NQN}?hostnqn={ours}").identity()[0] == uuid.UUID(int=9)
