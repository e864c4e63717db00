"""Status codes into completion fields and back, and what the errors say."""

import pytest

from spdk_glue.status import (
    CommandFailed,
    NvmeError,
    NvmeStatusError,
    QueueFull,
    Status,
    decode,
    describe,
    encode,
    has_more,
)


@pytest.mark.parametrize("status", Status)
def test_roundtrip(status):
    for more in (False, True):
        for do_not_retry in (False, True):
            field = encode(status, more, do_not_retry)
            assert Status(decode(field)) is status
            assert has_more(field) is more
            assert bool(field & 0x8000) is do_not_retry
            assert field & 1 == 0  # the phase tag is the queue's
            assert field <= 0xFFFF


def test_every_code_roundtrips():
    """sct and sc are 3 and 8 bits: no code may reach into the flags beside it."""
    for status in range(0x800):
        assert decode(encode(status)) == decode(encode(status, True, True)) == status
        assert not has_more(encode(status, do_not_retry=True))


@pytest.mark.parametrize(
    ("status", "field"),
    [
        (Status.SUCCESS, 0),
        (Status.INVALID_OPCODE, 0x01 << 1),
        (Status.INVALID_NAMESPACE, 0x0B << 1),
        (Status.LBA_OUT_OF_RANGE, 0x80 << 1),
        (Status.INVALID_LOG_PAGE, 1 << 9 | 0x09 << 1),
        (Status.UNRECOVERED_READ_ERROR, 2 << 9 | 0x81 << 1),
        (Status.UNKNOWN_TICKET, 7 << 9 | 0xC1 << 1),
    ],
)
def test_fields(status, field):
    """Bits as the specification has them: sc 8:1, sct 11:9."""
    assert encode(status) == field


def test_decode_ignores_phase_and_retry_delay():
    assert decode(encode(Status.WRITE_FAULT) | 1 | 3 << 12) == Status.WRITE_FAULT


def test_describe():
    assert describe(Status.LBA_OUT_OF_RANGE) == "lba out of range"
    assert describe(0x3A5) == "status code type 0x3 code 0xa5"


def test_status_error():
    error = NvmeStatusError(2, Status.UNRECOVERED_READ_ERROR, nsid=1, lba=0, detail="page checksum")
    assert (error.sct, error.sc) == (2, 0x81)
    assert str(error) == "NVMe command 0x02 failed: unrecovered read error at LBA 0 (page checksum)"
    assert str(NvmeStatusError(0x81, 0x7FF)) == "NVMe command 0x81 failed: status code type 0x7 code 0xff"
    assert isinstance(error, NvmeError)


def test_other_errors():
    assert str(QueueFull(4)) == "the queue pair holds at most 4 outstanding commands"
    failure = CommandFailed(Status.CAPACITY_EXCEEDED, detail="no free flash")
    assert str(failure) == "capacity exceeded: no free flash"
    assert str(CommandFailed(Status.INVALID_FIELD)) == "invalid field"
    assert failure.do_not_retry
