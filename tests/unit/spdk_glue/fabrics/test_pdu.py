"""PDUs of NVMe/TCP. If these fail, no peer understands us, or a header that lies is believed."""

import contextlib
import itertools

import numpy as np
import pytest

from spdk_glue.command import COMPLETION_ENTRY, SUBMISSION_ENTRY, read
from spdk_glue.fabrics import pdu
from spdk_glue.fabrics.crc32c import crc32c
from spdk_glue.fabrics.pdu import FatalError, FatalPduError, Framing, PduFlag, PduType

DIGESTS = list(itertools.product([False, True], repeat=2))
FROM_HOST = Framing(from_host=True)


def framing(header_digest=False, data_digest=False, **more) -> Framing:
    return Framing(True, header_digest, data_digest, **more)


def test_crc32c_has_the_known_values():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_ic_request_bytes():
    raw = pdu.ic_request(header_digest=True, data_digest=False, max_r2t=4, hpda=1).tobytes()
    assert raw == bytes([0, 0, 128, 0, 128, 0, 0, 0, 0, 0, 1, 1, 3, 0, 0, 0]) + bytes(112)


def test_ic_response_bytes():
    raw = pdu.ic_response(header_digest=True, data_digest=True, max_h2c_data_bytes=0x20000).tobytes()
    assert raw == bytes([1, 0, 128, 0, 128, 0, 0, 0, 0, 0, 0, 3, 0, 0, 2, 0]) + bytes(112)


def test_r2t_bytes():
    raw = pdu.r2t([0x1234], [0x55], [4096], [8192], Framing(from_host=False)).tobytes()
    assert raw.hex() == "0900180018000000" + "34125500" + "00100000" + "00200000" + "00000000"


def test_capsule_with_digests_bytes():
    entry = read(0x11, 1)
    data = bytes(range(8))
    raw = pdu.with_digests(pdu.capsule_commands(entry, framing(True, True, alignment=16), len(data)), data)
    assert raw[:8] == bytes([4, 3, 72, 80, 92, 0, 0, 0])
    assert raw[8:72] == entry.tobytes()
    assert raw[72:76] == crc32c(raw[:72]).to_bytes(4, "little")
    assert raw[76:80] == bytes(4)
    assert raw[80:88] == data
    assert raw[88:] == crc32c(data).to_bytes(4, "little")


@pytest.mark.parametrize("digests", DIGESTS)
def test_what_is_built_is_taken(digests):
    agreed = framing(*digests)
    body = bytes(range(256)) * 3
    entry = np.zeros(1, SUBMISSION_ENTRY)
    wire = b"".join(
        [
            pdu.with_digests(pdu.capsule_commands(entry, agreed)),
            pdu.with_digests(pdu.capsule_commands(entry, agreed, len(body)), body),
            pdu.with_digests(
                pdu.data(PduType.H2C_DATA, 7, len(body), agreed, offsets=512, ttags=9, flags=PduFlag.LAST), body
            ),
        ]
    )
    taken = []
    while wire:
        assert all(pdu.take_pdu(wire[:cut], agreed) is None for cut in range(0, 72))
        found, length = pdu.take_pdu(wire, agreed)
        taken.append(found)
        wire = wire[length:]
    assert [p.type for p in taken] == [PduType.CAPSULE_COMMAND, PduType.CAPSULE_COMMAND, PduType.H2C_DATA]
    assert [p.data for p in taken] == [b"", body, body]
    assert all(p.is_data_intact for p in taken)
    h2c = taken[2].record
    assert (h2c["cid"], h2c["ttag"], h2c["offset"], h2c["length"]) == (7, 9, 512, len(body))
    assert h2c["flags"] & PduFlag.LAST


def test_controllers_pdus_are_taken_by_a_host():
    to_host = Framing(from_host=False, header_digest=True, data_digest=True, alignment=128)
    wire = pdu.with_digests(pdu.data(PduType.C2H_DATA, 1, 4, to_host, flags=PduFlag.SUCCESS), b"abcd")
    found, length = pdu.take_pdu(wire, to_host)
    assert (found.data, length, found.record["pdo"]) == (b"abcd", len(wire), 128)
    for record in (
        pdu.capsule_responses(np.zeros(1, COMPLETION_ENTRY), to_host),
        pdu.r2t([1], [2], [0], [4], to_host),
    ):
        assert pdu.take_pdu(pdu.with_digests(record), to_host)[1] == 28


def test_a_batch_mixes_lengths():
    records = pdu.capsule_commands(np.zeros(3, SUBMISSION_ENTRY), framing(True, True), np.array([0, 512, 0]))
    assert records["plen"].tolist() == [76, 76 + 512 + 4, 76]
    assert records["pdo"].tolist() == [0, 76, 0]
    assert records["flags"].tolist() == [1, 3, 1]


def _command(**fields) -> bytes:
    record = pdu.capsule_commands(np.zeros(1, SUBMISSION_ENTRY), FROM_HOST, 8)
    for name, value in fields.items():
        record[name] = value
    return record.tobytes() + bytes(8)


@pytest.mark.parametrize(
    "fields, at",
    [
        ({"type": 0x0A}, pdu.TYPE_OFFSET),
        ({"type": 0xFF}, pdu.TYPE_OFFSET),
        ({"type": PduType.C2H_DATA}, pdu.TYPE_OFFSET),  # the other side's
        ({"hlen": 0}, pdu.HLEN_OFFSET),
        ({"hlen": 255}, pdu.HLEN_OFFSET),
        ({"hlen": 24}, pdu.HLEN_OFFSET),
        ({"flags": 1}, pdu.FLAGS_OFFSET),
        ({"flags": 2}, pdu.FLAGS_OFFSET),
        ({"pdo": 0}, pdu.PDO_OFFSET),
        ({"pdo": 71}, pdu.PDO_OFFSET),
        ({"pdo": 74}, pdu.PDO_OFFSET),
        ({"pdo": 80}, pdu.PDO_OFFSET),  # nothing left for the data
        ({"pdo": 252}, pdu.PDO_OFFSET),
        ({"plen": 0}, pdu.PLEN_OFFSET),
        ({"plen": 71}, pdu.PLEN_OFFSET),
    ],
)
def test_a_header_that_lies_is_refused(fields, at):
    with pytest.raises(FatalPduError) as raised:
        pdu.take_pdu(_command(**fields), FROM_HOST)
    assert (raised.value.fes, raised.value.fei) == (FatalError.INVALID_HEADER_FIELD, at)


def test_a_giant_length_is_refused_from_its_first_eight_bytes():
    with pytest.raises(FatalPduError) as raised:
        pdu.take_pdu(_command(plen=0xFFFFFFFF)[:8], FROM_HOST)
    assert raised.value.fes == FatalError.LIMIT_EXCEEDED


def test_data_where_none_belong_and_none_where_they_belong():
    to_host = Framing(from_host=False)
    for record, plen in (
        (pdu.r2t([1], [2], [0], [4], to_host), 28),
        (pdu.data(PduType.C2H_DATA, 1, 4, to_host), 24),
    ):
        record["plen"] = plen
        with pytest.raises(FatalPduError, match="bytes of PDU type"):
            pdu.take_pdu(record.tobytes() + bytes(8), to_host)


def test_digests_that_are_wrong():
    agreed = framing(True, True)
    good = pdu.with_digests(pdu.capsule_commands(np.zeros(1, SUBMISSION_ENTRY), agreed, 8), bytes(8))
    for at in (20, 73):
        bad = bytearray(good)
        bad[at] ^= 1
        with pytest.raises(FatalPduError) as raised:
            pdu.take_pdu(bytes(bad), agreed)
        assert raised.value.fes == FatalError.HEADER_DIGEST_ERROR
    for at in (77, len(good) - 1):  # the command fails, not the connection
        bad = bytearray(good)
        bad[at] ^= 1
        assert not pdu.take_pdu(bytes(bad), agreed)[0].is_data_intact


def test_terminate_request_carries_the_header_at_fault():
    error = FatalPduError(FatalError.INVALID_HEADER_FIELD, "", 2)
    wire = pdu.terminate(PduType.C2H_TERMINATE, error, _command(hlen=9))
    assert len(wire) == 24 + 80
    found, _ = pdu.take_pdu(wire, Framing(from_host=False, header_digest=True, data_digest=True))
    assert (found.record["fes"], found.record["fei"], found.data[2]) == (1, 2, 9)
    too_long = pdu.headers(PduType.C2H_TERMINATE, 1, Framing(from_host=False), 129)
    with pytest.raises(FatalPduError):
        pdu.take_pdu(too_long.tobytes() + bytes(129), Framing(from_host=False))


def test_any_bytes_are_a_pdu_too_short_or_refused():
    rng = np.random.default_rng(7)
    agreed = framing(True, True)
    for _ in range(2000):
        raw = rng.integers(0, 256, 160, np.uint8)
        raw[0] = rng.integers(0, 11)
        raw[2] = pdu.RULES["hlen"][raw[0]]
        raw[4:8] = np.array([rng.integers(0, 300)], "<u4").view(np.uint8)
        with contextlib.suppress(FatalPduError):
            pdu.take_pdu(raw.tobytes(), agreed)
