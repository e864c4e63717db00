"""Which subsystems a target has, asked of its discovery service: `nvme+tcp://HOST:PORT` without an NQN."""

from dataclasses import dataclass, replace

import numpy as np

from spdk_glue import command
from spdk_glue.fabrics import records
from spdk_glue.fabrics.initiator.address import Address
from spdk_glue.fabrics.initiator.bring_up import ADMIN_QUEUE_ENTRIES, ConnectQueue, EnableController, Names
from spdk_glue.fabrics.initiator.queue import Limits, Queue, connect_socket
from spdk_glue.fabrics.initiator.steps import run_steps, run_with_data
from spdk_glue.fabrics.records import DISCOVERY_ENTRY, DISCOVERY_HEADER, DISCOVERY_NQN, SubsystemType
from spdk_glue.status import BadLocation, ConnectionRefused, NvmeError, NvmeStatusError, decode

MAX_ENTRIES = 1024
MAX_TRIES = 5  # while the log changes
TRANSPORTS = {1: "rdma", 2: "fc", records.TRANSPORT_TCP: "tcp", 254: "loop"}
KINDS = {
    SubsystemType.REFERRAL: "referral",
    SubsystemType.NVM: "nvm",
    SubsystemType.CURRENT_DISCOVERY: "discovery",
}


@dataclass(frozen=True)
class Found:
    """An entry of the discovery log. port: as its transport has it; location: None where kvfs does not go"""

    kind: str
    transport: str
    host: str
    port: str
    subnqn: str
    location: str | None


def discover(where: Address) -> list[Found]:
    """What the target says that this host may connect to. Raises ConnectionRefused, NvmeError."""
    host_id, hostnqn = where.identity()
    try:
        connection, agreement = connect_socket(where.host, where.port, where.header_digest, where.data_digest)
        queue = Queue(connection, agreement, Limits(records.ADMIN_QUEUE_ID, ADMIN_QUEUE_ENTRIES - 1))
        try:
            names = Names(host_id, hostnqn, DISCOVERY_NQN)
            run_steps(ConnectQueue(names, records.ADMIN_QUEUE_ID, ADMIN_QUEUE_ENTRIES), queue)
            run_steps(EnableController(0), queue)
            entries = _log(queue)
        finally:
            queue.close()
    except ConnectionRefused as error:
        raise ConnectionRefused(f"{where.target}: {error}") from error
    return [_found(entry, where) for entry in entries]


def _log(queue: Queue) -> np.ndarray:
    """DISCOVERY_ENTRY [n], of one moment."""
    for _ in range(MAX_TRIES):
        header = _read(queue, 0, DISCOVERY_HEADER, 1)[0]
        count = int(header["numrec"])
        if header["recfmt"] or count > MAX_ENTRIES:
            raise NvmeError(f"a discovery log of format {header['recfmt']} with {count} entries")
        offsets = [DISCOVERY_HEADER.itemsize + i * DISCOVERY_ENTRY.itemsize for i in range(count)]
        entries = [_read(queue, offset, DISCOVERY_ENTRY, 1) for offset in offsets]
        if _read(queue, 0, DISCOVERY_HEADER, 1)[0]["genctr"] == header["genctr"]:
            return np.concatenate(entries) if entries else np.empty(0, DISCOVERY_ENTRY)
    raise NvmeError("the discovery log changes all the time")


def _read(queue: Queue, offset: int, form: np.dtype, count: int) -> np.ndarray:
    data = np.zeros(form.itemsize * count, np.uint8)
    entry = command.get_log_page(records.DISCOVERY_LOG_PAGE, data.nbytes, offset, nsid=0)
    completion = run_with_data(queue, entry, data)
    if completion["status"][0]:
        raise NvmeStatusError(int(entry["opcode"][0]), decode(int(completion["status"][0])))
    return data.view(form)


def _text(field: np.void | bytes) -> str:
    return bytes(field).rstrip(b"\0 ").decode("utf-8", "replace")


def _found(entry: np.void, where: Address) -> Found:
    transport = TRANSPORTS.get(int(entry["trtype"]), f"transport {int(entry['trtype'])}")
    kind = KINDS.get(int(entry["subtype"]), f"type {int(entry['subtype'])}")
    host, port, subnqn = _text(entry["traddr"]), _text(entry["trsvcid"]), _text(entry["subnqn"])
    location = None
    if transport == "tcp" and kind == "nvm" and port.isdecimal():
        location = str(replace(where, host=host, port=int(port), subnqn=subnqn))
    return Found(kind, transport, host, port, subnqn, location)


def the_only_subsystem(where: Address) -> Address:
    """For an address without an NQN. Raises BadLocation where there are several, or none."""
    locations = [found.location for found in discover(where) if found.location is not None]
    if len(locations) != 1:
        have = ", ".join(locations) or "none"
        raise BadLocation(f"{where.target}: name one of the subsystems there: {have}")
    # reached as asked: the target may not know the way through a tunnel
    return replace(where, subnqn=Address.parse(locations[0]).subnqn)
