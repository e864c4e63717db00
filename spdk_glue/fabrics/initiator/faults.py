"""What ends a queue's connection, in words. The numbers are those of tcp_glue/host_records.h."""

import os

from spdk_glue.fabrics.pdu import FatalError
from spdk_glue.fabrics.tcp_glue._tcp_glue import lib


def _terminated(fes: int) -> str:
    try:
        reason = FatalError(fes).name.lower().replace("_", " ")
    except ValueError:
        reason = f"reason {fes:#x}"
    return f"the target ended the connection: {reason}"


_BROKEN = "the target breaks the protocol: "
TEXTS = {
    lib.HOST_FAULT_CLOSED: lambda _: "the target closed the connection",
    lib.HOST_FAULT_SOCKET: lambda number: f"the connection broke: {os.strerror(number)}",
    lib.HOST_FAULT_SILENT: lambda ms: f"no answer in {ms / 1000:g} s",
    lib.HOST_FAULT_TERMINATED: _terminated,
    lib.HOST_FAULT_TYPE: lambda kind: f"{_BROKEN}PDU type {kind:#04x}",
    lib.HOST_FAULT_HEADER_LENGTH: lambda kind: f"{_BROKEN}header length of PDU type {kind:#04x}",
    lib.HOST_FAULT_FLAGS: lambda kind: f"{_BROKEN}flags of PDU type {kind:#04x}",
    lib.HOST_FAULT_DATA_OFFSET: lambda kind: f"{_BROKEN}data offset in PDU type {kind:#04x}",
    lib.HOST_FAULT_LENGTH: lambda kind: f"{_BROKEN}length of PDU type {kind:#04x}",
    lib.HOST_FAULT_HEADER_DIGEST: lambda kind: f"wrong header digest in PDU type {kind:#04x}",
    lib.HOST_FAULT_DATA_DIGEST: lambda cid: f"wrong data digest for command {cid}",
    lib.HOST_FAULT_NO_SUCH_COMMAND: lambda cid: f"{_BROKEN}no command {cid} is under way",
    lib.HOST_FAULT_OUT_OF_ORDER: lambda cid: f"{_BROKEN}PDU out of order for command {cid}",
    lib.HOST_FAULT_DATA_RANGE: lambda cid: f"{_BROKEN}data outside of command {cid}",
    lib.HOST_FAULT_GRANT_RANGE: lambda cid: f"{_BROKEN}asks for data outside of command {cid}",
    lib.HOST_FAULT_INCOMPLETE: lambda cid: f"{_BROKEN}command {cid} succeeded without all its data",
}


def describe(fault: int, detail: int) -> str:
    return TEXTS[fault](detail)
