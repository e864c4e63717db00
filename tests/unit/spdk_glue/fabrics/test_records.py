"""Fabrics commands, properties and names, byte by byte."""

import uuid

import numpy as np
import pytest

from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.fabrics import records
from spdk_glue.fabrics.records import BadNqn, FabricsType, Property

HOST_ID = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")
SUBNQN = "nqn.2026-11.io.kvfs:drive"


def test_connect_has_the_specifications_bytes():
    """A field beside its place connects to no other target."""
    entry = records.connect(3, 128, keep_alive_ms=10_000)
    entry["cid"] = 0x1234
    assert entry.tobytes() == (
        bytes.fromhex("7f403412 01") + bytes(35) + bytes.fromhex("0000 0300 7f00 00 00 10270000") + bytes(12)
    )


def test_connect_data_has_the_specifications_bytes():
    """A target would look up another subsystem, or another host."""
    data = records.connect_data(HOST_ID, records.hostnqn_of(HOST_ID), SUBNQN, cntlid=5).tobytes()
    assert len(data) == 1024
    assert data[:18] == HOST_ID.bytes + b"\x05\x00" and not any(data[18:256])
    assert data[256:512] == SUBNQN.encode().ljust(256, b"\0")
    assert data[512:768] == b"nqn.2014-08.org.nvmexpress:uuid:01234567-89ab-cdef-0123-456789abcdef".ljust(
        256, b"\0"
    )
    assert not any(data[768:])


@pytest.mark.parametrize(("which", "attrib"), [(Property.CAP, 1), (Property.CC, 0), (Property.CSTS, 0)])
def test_a_property_is_asked_for_in_its_own_size(which, attrib):
    """A target refuses CAP in four bytes."""
    entry = records.property_get(which)
    assert entry.tobytes()[:5] == bytes([0x7F, 0x40, 0, 0, 4])
    assert entry.tobytes()[40:56] == bytes([attrib, 0, 0, 0, which]) + bytes(11)


def test_a_property_is_set_with_its_value():
    entry = records.property_set(Property.CC, records.CC_ENABLE | records.CC_ENTRY_SIZES)
    assert entry.tobytes()[4] == FabricsType.PROPERTY_SET
    assert entry.tobytes()[40:56] == bytes([0, 0, 0, 0, 0x14, 0, 0, 0, 0x01, 0x00, 0x46, 0, 0, 0, 0, 0])


def test_authentication_names_its_protocol_and_length():
    entry = records.authentication(FabricsType.AUTHENTICATION_RECEIVE, 4096).tobytes()
    assert entry[4] == 6 and entry[41:48] == bytes([1, 1, 0xE9, 0, 16, 0, 0])


def test_an_sgl_descriptor_says_where_the_data_are():
    assert records.sgl(records.SGL_IN_CAPSULE, 4096).tobytes() == bytes(8) + bytes([0, 16, 0, 0, 0, 0, 0, 1])
    assert records.sgl(records.SGL_TRANSPORT, [1, 2])["type"].tolist() == [0x5A, 0x5A]


def test_capabilities_come_back_as_they_were_put():
    cap = records.capabilities(1024, 15_000)
    assert records.cap_max_queue_entries(cap) == 1024 and records.cap_timeout_ms(cap) == 15_000
    assert cap & records.CAP_CONTIGUOUS_QUEUES and cap & records.CAP_NVM_COMMAND_SET
    for entries, timeout in ((1, 500), (65537, 500), (2, 0), (2, 200_000)):
        with pytest.raises(ValueError):
            records.capabilities(entries, timeout)


def test_results_are_read_from_the_completions_first_eight_bytes():
    completion = np.frombuffer(bytes.fromhex("0500 0600 00000000 0000 0000 0000 0000"), COMPLETION_ENTRY)
    granted = records.result_of(completion, records.CONNECT_RESULT)
    assert granted["cntlid"] == 5
    assert granted["authreq"] == records.AUTHREQ_TRANSACTION | records.AUTHREQ_SECURE_CHANNEL
    fault = records.result_of(completion, records.CONNECT_FAULT)
    assert (fault["ipo"], fault["iattr"]) == (5, 6)
    assert records.result_of(completion, records.PROPERTY_RESULT)["value"] == 0x0006_0005


@pytest.mark.parametrize(
    "nqn",
    [
        SUBNQN,
        records.DISCOVERY_NQN,
        records.hostnqn_of(HOST_ID),
        "nqn.2016-06.io.spdk:cnode1",
        "nqn.2026-11.io.kvfs:" + "x" * (223 - 20),
        "nqn.2026-11.io.kvfs:gr\u00f6\u00dfe",
    ],
)
def test_names_pass_through_their_field(nqn):
    assert records.nqn_of(records.nqn_field(nqn)) == nqn


@pytest.mark.parametrize(
    "nqn",
    [
        "",
        "nqn",
        "iqn.2026-11.io.kvfs:drive",
        "nqn.2026-13.io.kvfs:drive",
        "nqn.2026-11.io.kvfs:",
        "nqn.2026-11.io.kvfs:two words",
        "nqn.2026-11.io.kvfs:bell\a",
        "nqn.2026-11.io.kvfs:" + "x" * (224 - 20),
        "nqn.2014-08.org.nvmexpress:uuid:not-one",
    ],
)
def test_bad_names_are_refused(nqn):
    with pytest.raises(BadNqn):
        records.check_nqn(nqn)


@pytest.mark.parametrize("field", [b"n" * 256, b"nqn.2026-11.io.kvfs:\xff".ljust(256, b"\0"), bytes(256)])
def test_bad_fields_are_refused(field):
    """What a peer sends is no name until it was checked."""
    with pytest.raises(BadNqn):
        records.nqn_of(field)
