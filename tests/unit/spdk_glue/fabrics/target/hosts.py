"""Hosts of the target's tests: connections without sockets, and a drive in memory with tickets that wait."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from spdk_glue import command, status
from spdk_glue.command import COMPLETION_ENTRY, AdminOpcode, IoOpcode
from spdk_glue.fabrics import pdu, records
from spdk_glue.fabrics.pdu import Framing, PduFlag, PduType
from spdk_glue.fabrics.target.connection import Connection
from spdk_glue.fabrics.target.host_access import HostAccess
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.subsystem import ServedDrive, Subsystems, no_short_way
from spdk_glue.fabrics.tcp_glue import api
from tests.unit.spdk_glue.memory_drive import MemoryDrive

SUBSYSTEM = "nqn.2026-11.io.kvfs:drive"
HOST = "nqn.2026-11.io.kvfs:host"
HOST_ID = uuid.UUID(int=7)
BLOCK = 4096


@dataclass
class Rig:
    """A target over a MemoryDrive. later: long commands that wait for `run_later`; waiting: calls by ticket;
    short_way: (descriptor, answer) of attention that is answered at once"""

    access: HostAccess = field(default_factory=HostAccess.anyone)
    limits: Limits = field(default_factory=Limits)
    tickets_wait: bool = False
    short_way: Callable[[np.ndarray, np.ndarray], bool] = no_short_way

    def __post_init__(self):
        self.drive = MemoryDrive(block_bytes=BLOCK, num_lbas=1024)
        self.waiting, self.later, self.now = {}, [], 100.0
        served = ServedDrive(self.drive.device, self._when_fetchable, lambda *data: self.short_way(*data))
        self.subsystems = Subsystems(served, self.access, self.limits, SUBSYSTEM)

    def _when_fetchable(self, ticket, call):
        if self.tickets_wait:
            self.waiting[ticket] = call
        else:
            call()

    def run_later(self):
        while self.later:
            self.later.pop(0)()

    def connection(self, **digests) -> "Host":
        return Host(self, **digests)

    def admin(self, hostnqn=HOST, host_id=HOST_ID, subnqn=SUBSYSTEM, keep_alive_ms=0, **digests) -> "Host":
        """Connected and enabled."""
        host = self.connection(**digests)
        entry = records.connect(0, 32, keep_alive_ms=keep_alive_ms)
        completion = host.run(entry, records.connect_data(host_id, hostnqn, subnqn).tobytes())
        assert completion["status"] == 0
        host.cntlid = int(completion["cdw0"]) & 0xFFFF
        host.run(records.property_set(records.Property.CC, records.CC_ENABLE | records.CC_ENTRY_SIZES))
        host.hostnqn, host.host_id = hostnqn, host_id
        return host

    def io(self, admin: "Host", qid=1, entries=128, flow_control=True, **digests) -> "Host":
        host = self.connection(**digests)
        entry = records.connect(qid, entries, flow_control=flow_control)
        data = records.connect_data(admin.host_id, admin.hostnqn, SUBSYSTEM, admin.cntlid)
        assert host.run(entry, data.tobytes())["status"] == 0
        return host


class Host:
    """One connection of a host, past ICReq. `answers` has the PDUs that came and were not asked for yet."""

    def __init__(self, rig: Rig, header_digest=False, data_digest=False, initialise=True):
        self.rig = rig
        self.woken = 0
        self.connection = Connection(
            rig.subsystems, ("127.0.0.1", 4420), "host", wake=self._wake, later=rig.later.append, now=rig.now
        )
        self.to_target = Framing(True, header_digest, data_digest)
        self.from_target = Framing(False, header_digest, data_digest, max_data_bytes=1 << 30)
        self.answers = []
        self._cid = 0
        if initialise:
            plain = self.from_target
            self.from_target = Framing(False)
            self.send(pdu.ic_request(header_digest=header_digest, data_digest=data_digest).tobytes())
            assert self.answers.pop(0).type == PduType.IC_RESPONSE
            self.from_target = plain

    def _wake(self):
        self.woken += 1

    def send(self, wire: bytes) -> None:
        """Bytes as TCP would bring them; what comes back is in `answers`."""
        buffer = np.frombuffer(wire, np.uint8)
        frames, taken = api.take_frames(buffer, self.connection.framing)
        assert taken == len(wire) or frames["fes"].any(), "a PDU that is not whole"
        self.collect(self.connection.receive(frames, buffer, self.rig.now))

    def poll(self) -> None:
        self.collect(self.connection.poll(self.rig.now))

    def collect(self, batches) -> None:
        for batch in batches:
            wire = pdu.join(batch)
            while wire:
                found, length = pdu.take_pdu(wire, self.from_target)
                self.answers.append(found)
                wire = wire[length:]

    def capsule(self, entry, data=b"", room=0, cid=None) -> tuple[int, bytes]:
        """(cid, bytes) of a command: data in the capsule, or room for data, by the transport's SGL."""
        entry = entry.copy()
        self._cid += 1
        entry["cid"] = self._cid if cid is None else cid
        entry["flags"] = records.PSDT_SGL
        if data:
            entry["dptr"] = np.void(records.sgl(records.SGL_IN_CAPSULE, len(data)).tobytes())
        elif room:
            entry["dptr"] = np.void(records.sgl(records.SGL_TRANSPORT, room).tobytes())
        header = pdu.capsule_commands(entry, self.to_target, len(data))
        return int(entry["cid"][0]), pdu.with_digests(header, data)

    def submit(self, entry, data=b"", room=0, cid=None) -> int:
        cid, wire = self.capsule(entry, data, room, cid)
        self.send(wire)
        return cid

    def run(self, entry, data=b"", room=0, cid=None):
        """The COMPLETION_ENTRY of one command; its data in `data`."""
        cid = self.submit(entry, data, room, cid)
        self.rig.run_later()
        self.poll()
        return self.completion(cid)

    def completion(self, cid):
        """Of a command that has been answered; C2HData of it are kept in `data`."""
        self.data = b""
        for found in list(self.answers):
            if found.type == PduType.C2H_DATA and found.record["cid"] == cid:
                self.answers.remove(found)
                assert found.record["offset"] == len(self.data)
                assert found.is_data_intact and found.record["length"] == len(found.data)
                self.data += found.data
                if found.record["flags"] & PduFlag.SUCCESS:
                    done = np.zeros(1, COMPLETION_ENTRY)
                    done["cid"] = cid
                    return done[0]
            elif found.type == PduType.CAPSULE_RESPONSE and found.record["entry"]["cid"] == cid:
                self.answers.remove(found)
                return found.record["entry"]
        raise AssertionError(f"command {cid} is not answered: {self.answers}")

    def h2c(self, r2t, part: bytes, at: int, is_last: bool, **fields) -> bytes:
        header = pdu.data(
            PduType.H2C_DATA,
            int(r2t["cid"]),
            len(part),
            self.to_target,
            offsets=at,
            ttags=int(r2t["ttag"]),
            flags=PduFlag.LAST if is_last else 0,
        )
        for name, value in fields.items():
            header[name] = value
        return pdu.with_digests(header, part)

    def take(self, kind: PduType):
        """The first answer of a type."""
        found = next(answer for answer in self.answers if answer.type == kind)
        self.answers.remove(found)
        return found.record

    def status(self, *arguments, **options) -> int:
        """As `run`; sct and sc of the completion."""
        return status.decode(int(self.run(*arguments, **options)["status"]))


def entry(opcode, nsid=1, **dwords):
    return command._entry(opcode, nsid, **dwords)


__all__ = ["BLOCK", "HOST", "HOST_ID", "SUBSYSTEM", "AdminOpcode", "Host", "IoOpcode", "Rig", "entry"]
