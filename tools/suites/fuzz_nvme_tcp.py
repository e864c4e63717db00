"""Fuzz the NVMe/TCP target: python tools/suites/fuzz_nvme_tcp.py [--count N] [--seed 1] [--sockets SECONDS]

Hosts that break every rule: headers that lie, data that were not asked for, giant and odd SGLs, unknown
opcodes, repeated identifiers, PDUs cut short, phases in the wrong order, noise. First `count` PDUs to the state
tables, without sockets; then, for so many seconds, a server on loopback with many connections at once.

What must hold: no exception, no call longer than a second, memory within its limits, every answer belongs to
a command that asked for it and has no more bytes than that asked for, nothing follows the end of a connection,
and no byte that was sent comes from used memory or from another host's answers. Exit code 1 if not; the seed is
printed.
"""

import argparse
import gc
import logging
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections import Counter

import numpy as np
from fuzz_drive import BLOCK, NAMESPACE_TAG, NUM_LBAS, POISON_TAG, SECRET_TAG, FuzzDrive, count_tag, tagged

from spdk_glue import command, dma
from spdk_glue.command import IoOpcode
from spdk_glue.fabrics import pdu, records
from spdk_glue.fabrics.pdu import Framing, PduFlag, PduType
from spdk_glue.fabrics.target.buffers import Buffers
from spdk_glue.fabrics.target.connection import Connection
from spdk_glue.fabrics.target.host_access import HostAccess
from spdk_glue.fabrics.target.limits import Limits
from spdk_glue.fabrics.target.server import Server
from spdk_glue.fabrics.target.states import State
from spdk_glue.fabrics.target.subsystem import Subsystems
from spdk_glue.fabrics.tcp_glue import api

NQN = "nqn.2026-11.io.kvfs:fuzz"
VICTIM, ATTACKER = "nqn.2026-11.io.kvfs:victim", "nqn.2026-11.io.kvfs:attacker"
LIMITS = Limits(
    max_transfer_bytes=32 << 10,
    max_h2c_data_bytes=16 << 10,
    buffer_bytes=64 << 10,
    queue_entries=32,
    max_connections=128,
    handshake_seconds=1.0,
    stall_seconds=2.0,
)
CALL_SECONDS = 1.0
LEAK_MIB = 32
OPCODES = [*range(0x10), 0x7F, 0x81, 0x82, 0x84, 0x85, 0x86, 0xC0, 0x18]
SGL_TYPES = [records.SGL_TRANSPORT, records.SGL_IN_CAPSULE, 0x00, 0x40, 0x20, 0xFF]
LENGTHS = [0, 1, 4, 512, 1024, BLOCK, 2 * BLOCK, 8 * BLOCK, 9 * BLOCK, 1 << 20, 0xFFFFFFFF]
NUMBERS = [0, 1, 2, 3, 0x7F, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF]


class Broken(Exception):
    """An invariant does not hold."""


class PoisonedBuffers(Buffers):
    """Memory that was used before, as far as anybody can tell."""

    def take(self, length):
        memory = super().take(length)
        memory[:] = tagged(POISON_TAG, memory.nbytes)
        return memory


class FuzzedHost:
    """Makes PDUs of one connection, right ones and wrong ones; keeps what it takes to judge the answers."""

    def __init__(self, chance: random.Random, digests: tuple[bool, bool]):
        self.chance = chance
        self.to_target = Framing(True, *digests)
        self.from_target = Framing(False, *digests, max_data_bytes=1 << 30)
        self.digests = digests
        self.asked: dict[int, int] = {}  # cid to the room for its data
        self.r2ts: list[tuple[int, int, int, int]] = []  # cid, tag, offset, length
        self.sent: list[bytes] = []
        self.cid = 0

    def number(self, good: int) -> int:
        return good if self.chance.random() < 0.9 else self.chance.choice(NUMBERS)

    def start(self) -> bytes:
        request = pdu.ic_request(header_digest=self.digests[0], data_digest=self.digests[1])
        if self.chance.random() < 0.02:
            request["hpda"] = self.chance.randrange(256)
        return request.tobytes()

    def capsule(self, entry: np.ndarray, data: bytes = b"", room: int | None = None) -> bytes:
        self.cid = (self.cid + 1) % 64 if self.chance.random() < 0.97 else self.chance.randrange(1 << 16)
        entry["cid"], entry["flags"] = self.cid, records.PSDT_SGL
        kind, length = (records.SGL_IN_CAPSULE, len(data)) if data else (records.SGL_TRANSPORT, room or 0)
        if self.chance.random() < 0.05:
            kind, length = self.chance.choice(SGL_TYPES), self.chance.choice(LENGTHS)
        if length or data:
            sgl = records.sgl(kind, length)
            if self.chance.random() < 0.03:
                sgl["address"] = self.chance.choice(NUMBERS)
            entry["dptr"] = np.void(sgl.tobytes())
        return pdu.with_digests(pdu.capsule_commands(entry, self.to_target, len(data)), data, api.crc32c)

    def connect(self, qid: int, cntlid: int, hostnqn: str = ATTACKER) -> bytes:
        chance = self.chance
        data = records.connect_data(uuid.UUID(int=1), hostnqn, NQN, cntlid)
        entry = records.connect(qid, 32, flow_control=chance.random() < 0.5)
        if chance.random() < 0.03:
            raw = bytearray(data.tobytes())
            raw[chance.randrange(len(raw))] = chance.randrange(256)
            return self.capsule(entry, bytes(raw[: chance.choice([1024, 1024, 512, 4])]))
        return self.capsule(entry, data.tobytes())

    def io_command(self) -> bytes:
        chance = self.chance
        lba, count = chance.randrange(NUM_LBAS), chance.choice([1, 1, 2, 8])
        what = chance.random()
        if what < 0.35:
            return self.capsule(
                command.read(self.number(lba), count), room=self.number(count * BLOCK) % (1 << 32)
            )
        if what < 0.5:
            return self.capsule(command.write(self.number(lba), count), room=count * BLOCK)
        if what < 0.58:
            return self.capsule(command.write(self.number(lba), 1), bytes(BLOCK))
        ticket = self.number(chance.randrange(8))
        if what < 0.66:
            return self.capsule(command.vendor(IoOpcode.ATTENTION_SUBMIT, ticket), tagged(7, 512).tobytes())
        if what < 0.74:
            return self.capsule(
                command.vendor(IoOpcode.ATTENTION_FETCH, ticket), room=chance.choice([512, BLOCK])
            )
        if what < 0.78:
            return self.capsule(command.vendor(IoOpcode.ATTENTION_CANCEL, ticket))
        if what < 0.84:  # in one flight
            submit = self.capsule(command.vendor(IoOpcode.ATTENTION_SUBMIT, ticket), tagged(7, 512).tobytes())
            room = chance.choice([512, 512, BLOCK])
            fetched = self.number(ticket)
            return submit + self.capsule(command.vendor(IoOpcode.ATTENTION_FETCH, fetched), room=room)
        return self.any_command()

    def any_command(self) -> bytes:
        chance = self.chance
        entry = command._entry(chance.choice(OPCODES), self.number(1))
        if chance.random() < 0.2:
            entry["opcode"] = chance.randrange(256)
        for name in ("cdw10", "cdw11", "cdw12", "cdw13"):
            entry[name] = chance.choice([0, 0, chance.choice(NUMBERS), chance.randrange(1 << 32)])
        if entry["opcode"][0] == records.FABRICS_OPCODE:
            entry.view(records.FABRICS_COMMAND)["fctype"] = chance.choice(
                [0, 1, 4, 5, 6, 8, chance.randrange(256)]
            )
        if chance.random() < 0.3:
            return self.capsule(entry, bytes(chance.choice([4, 64, 1024, 8192])))
        return self.capsule(entry, room=chance.choice(LENGTHS[:7]))

    def admin_command(self) -> bytes:
        chance = self.chance
        what = chance.random()
        if what < 0.2:
            return self.capsule(command.identify(chance.choice([0, 1, 2, 3, 5, 6, 8, 0x13])), room=4096)
        if what < 0.4:
            page = command.get_log_page(chance.choice([0, 1, 2, 3, 4, 5, 0x70, 0xC0]), 512)
            page["cdw12"] = self.number(0)
            return self.capsule(page, room=chance.choice([4, 512, 4096]))
        if what < 0.5:
            return self.capsule(command.get_features(chance.randrange(1, 16)))
        if what < 0.55:
            return self.capsule(command._entry(0x0C, 0))  # Asynchronous Event Request
        if what < 0.6:
            return self.capsule(command._entry(0x08, 0, cdw10=chance.randrange(4) | chance.randrange(64) << 16))
        if what < 0.64:
            return self.capsule(records.property_get(records.Property.CSTS))
        if what < 0.66:
            enable = records.CC_ENABLE if chance.random() < 0.8 else chance.choice(NUMBERS)
            return self.capsule(records.property_set(records.Property.CC, enable))
        return self.any_command()

    def data(self) -> bytes:
        """H2CData for an R2T, or for none."""
        chance = self.chance
        if self.r2ts and chance.random() < 0.9:
            cid, tag, offset, length = self.r2ts[-1]
        else:
            cid, tag, offset, length = chance.randrange(64), chance.randrange(4), 0, BLOCK
        size = min(length, LIMITS.max_h2c_data_bytes, chance.choice([length, length, length, 4, 1 << 13]))
        if chance.random() < 0.03:
            size = chance.choice([1, 5, LIMITS.max_h2c_data_bytes, LIMITS.max_h2c_data_bytes + 4])
        is_last = size == length
        if self.r2ts and tag == self.r2ts[-1][1]:
            self.r2ts.pop()
            if not is_last and size < length:
                self.r2ts.append((cid, tag, offset + size, length - size))
        header = pdu.data(
            PduType.H2C_DATA,
            cid,
            max(size, 1),
            self.to_target,
            offsets=offset,
            ttags=tag,
            flags=PduFlag.LAST if is_last else 0,
        )
        if chance.random() < 0.04:
            header[chance.choice(["cid", "ttag", "offset", "length", "flags"])] = chance.choice(NUMBERS) & 0xFF
        return pdu.with_digests(header, bytes(max(size, 1)), api.crc32c)

    def next(self, is_admin: bool) -> bytes:
        """The bytes of about one PDU."""
        chance = self.chance
        what = chance.random()
        if self.r2ts and what < 0.6:
            wire = self.data()
        elif what < 0.02 and self.sent:
            return chance.choice(self.sent)
        elif what < 0.03:
            wire = self.data()
        elif what < 0.033:
            wire = self.start()
        elif what < 0.036:
            error = pdu.FatalPduError(pdu.FatalError.SEQUENCE_ERROR, "")
            wire = pdu.terminate(PduType.H2C_TERMINATE, error, bytes(chance.randrange(140)))
        elif what < 0.04:
            wire = chance.randbytes(chance.randrange(1, 200))
        else:
            wire = self.admin_command() if is_admin else self.io_command()
        if chance.random() < 0.006:
            damaged = bytearray(wire)
            damaged[chance.randrange(min(len(damaged), 80))] = chance.randrange(256)
            wire = bytes(damaged)
        if len(wire) < 2048 and len(self.sent) < 50:
            self.sent.append(wire)
        return wire

    def note(self, frames: np.ndarray) -> None:
        """Which room commands have for data, by what was really sent, damage included."""
        for header in frames["header"]:
            if header[0] == PduType.CAPSULE_COMMAND:
                entry = header[:72].view(pdu.CAPSULE_COMMAND)[0]["entry"]
                length = int(np.frombuffer(bytes(entry["dptr"]), records.SGL_DESCRIPTOR)["length"][0])
                cid = int(entry["cid"])
                self.asked[cid] = max(self.asked.get(cid, 0), length)

    def judge(self, wire: np.ndarray, seen: Counter) -> None:
        """What the target sent. Raises Broken."""
        while len(wire):
            frames, taken = api.take_frames(wire, self.from_target)
            if not len(frames) or frames["fes"].any():
                raise Broken(f"it sent what is no PDU: {wire[:64].tobytes().hex()}")
            for frame in frames:
                header = frame["header"]
                kind = int(header[0])
                seen[PduType(kind).name] += 1
                if kind == PduType.R2T:
                    r2t = header[:24].view(pdu.R2T)[0]
                    self.r2ts.append(
                        (int(r2t["cid"]), int(r2t["ttag"]), int(r2t["offset"]), int(r2t["length"]))
                    )
                elif kind == PduType.C2H_DATA:
                    start, size = int(frame["data_at"]), int(frame["data_length"])
                    self._judge_data(int(header[8:10].view("<u2")[0]), wire[start : start + size])
            wire = wire[taken:]

    def _judge_data(self, cid: int, data: np.ndarray) -> None:
        if len(data) > self.asked.get(cid, 0):
            raise Broken(f"{len(data)} bytes for command {cid}, which asked for {self.asked.get(cid)}")
        data = data.copy()  # aligned
        for tag, what in ((POISON_TAG, "used memory"), (SECRET_TAG, "another host's answer")):
            if count_tag(data, tag):
                raise Broken(f"command {cid} got bytes of {what}")


class Tables:
    """The target without sockets, with a victim's tickets in it."""

    def __init__(self):
        self.drive = FuzzDrive()
        self.later: list = []
        self.subsystems = Subsystems(self.drive.served(), HostAccess.anyone(), LIMITS, NQN)
        self.now = 0.0
        chance = random.Random(0)
        self.victim_admin = self._connect(0, 0xFFFF, VICTIM, chance)
        self.victim = self._connect(1, self.victim_admin[0].association.cntlid, VICTIM, chance)
        secret = tagged(SECRET_TAG, 512).tobytes()
        for ticket in range(8):
            entry = command.vendor(IoOpcode.ATTENTION_SUBMIT, ticket)
            entry["flags"], entry["cid"] = records.PSDT_SGL, ticket
            entry["dptr"] = np.void(records.sgl(records.SGL_IN_CAPSULE, len(secret)).tobytes())
            self.feed(
                self.victim[0], pdu.capsule_commands(entry, Framing(True), len(secret)).tobytes() + secret
            )
        assert len(self.drive.tickets) == 8

    def _connect(self, qid, cntlid, hostnqn, chance):
        connection = self.connection()
        self.feed(connection, pdu.ic_request(header_digest=False, data_digest=False).tobytes())
        data = records.connect_data(uuid.UUID(int=5), hostnqn, NQN, cntlid).tobytes()
        for entry, body in (
            (records.connect(qid, 32), data),
            (records.property_set(records.Property.CC, records.CC_ENABLE), b""),
        ):
            if body:
                entry["dptr"] = np.void(records.sgl(records.SGL_IN_CAPSULE, len(body)).tobytes())
            elif qid:
                break
            self.feed(connection, pdu.capsule_commands(entry, Framing(True), len(body)).tobytes() + body)
        assert connection.association is not None
        return connection, chance

    def connection(self) -> Connection:
        connection = Connection(
            self.subsystems, ("127.0.0.1", 1), "fuzz", wake=lambda: None, later=self.later.append, now=self.now
        )
        connection._buffers = PoisonedBuffers(LIMITS.buffer_bytes)
        connection._arena = dma.allocate(LIMITS.buffer_bytes)
        return connection

    def feed(
        self, connection: Connection, wire: bytes, host: FuzzedHost | None = None
    ) -> tuple[np.ndarray, int]:
        """(what it sends, bytes taken)"""
        buffer = np.frombuffer(wire, np.uint8)
        connection._arena[:] = tagged(POISON_TAG, len(connection._arena))
        out, at = [], 0
        while at < len(buffer) and connection.is_open:
            max_frames = 1 if connection.state is State.AWAIT_IC else api.MAX_FRAMES
            frames, taken = api.take_frames(buffer[at:], connection.framing, max_frames)
            if not len(frames):
                break
            if host is not None:
                host.note(frames)
            out += self._gather(connection.receive(frames, buffer[at:], self.now))
            at += taken
        while self.later:
            self.later.pop(0)()
        out += self._gather(connection.poll(self.now))
        return (np.concatenate(out) if out else np.empty(0, np.uint8)), at

    @staticmethod
    def _gather(batches) -> list[np.ndarray]:
        return [np.frombuffer(pdu.join(batch, api.crc32c), np.uint8) for batch in batches]

    def session(self, chance: random.Random, length: int, seen: Counter) -> int:
        """One attacker: an admin connection, and some on I/O queues. PDUs sent."""
        digests = chance.choice([(False, False)] * 5 + [(True, False), (False, True), (True, True)])
        cntlid, count = 0xFFFF, 0
        opened = []
        for qid in range(chance.choice([1, 2, 2, 3])):
            host, connection = FuzzedHost(chance, digests), self.connection()
            opened.append((host, connection, bytearray()))
            if chance.random() < 0.97:
                self._exchange(host, connection, opened[-1][2], host.start(), seen)
            if chance.random() < 0.97:
                self._exchange(host, connection, opened[-1][2], host.connect(qid, cntlid), seen)
            if qid == 0 and connection.association is not None:
                cntlid = connection.association.cntlid
                enable = records.property_set(records.Property.CC, records.CC_ENABLE)
                self._exchange(host, connection, opened[-1][2], host.capsule(enable), seen)
            count += 3
        victims = [self.victim_admin[0].association.cntlid, 1, 0, 0xFFFF]
        for _ in range(length):
            number = chance.randrange(len(opened))
            host, connection, rest = opened[number]
            if not connection.is_open:
                break
            wire = host.next(is_admin=number == 0)
            if chance.random() < 0.003:
                wire = host.connect(chance.choice([1, 2, 40]), chance.choice(victims), VICTIM)
            if chance.random() < 0.3:  # several in one segment
                wire += host.next(is_admin=number == 0)
                count += 1
            self._exchange(host, connection, rest, wire, seen)
            count += 1
            self.now += chance.choice([0, 0, 0, 0.001, 0.5 if chance.random() < 0.01 else 0])
        for _, connection, _ in opened[::-1]:
            seen[f"closed: {connection.closed_because[:24] or 'by the host'}"] += 1
            connection.end()
            if connection.association is not None:
                connection.association.end("fuzz")
                self.subsystems.forget(connection.association)
        if len(self.drive.tickets) != 8 or len(self.subsystems._associations) != 1:
            raise Broken("tickets or controllers are left behind")
        return count

    def _exchange(self, host, connection, rest: bytearray, wire: bytes, seen: Counter) -> None:
        rest += wire
        was_open = connection.is_open
        started = time.perf_counter()
        out, taken = self.feed(connection, bytes(rest), host)
        seconds = time.perf_counter() - started
        if seconds > CALL_SECONDS:
            raise Broken(f"a call took {seconds:.1f} s")
        if len(out) and not was_open:
            raise Broken("something was sent after the end")
        del rest[:taken]
        if len(rest) > 2 * (LIMITS.max_h2c_data_bytes + pdu.PDU_OVERHEAD_BYTES):
            raise Broken("a PDU is waited for that no limit allows")
        if connection._buffered_bytes > LIMITS.buffer_bytes + 32 * LIMITS.in_capsule_bytes:
            raise Broken(f"{connection._buffered_bytes} bytes are held")
        if len(connection._outstanding) > LIMITS.queue_entries:
            raise Broken("more commands than entries")
        host.judge(out, seen)


def resident_mib() -> float:
    """Memory of this process."""
    with open("/proc/self/statm") as facts:
        return int(facts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def fuzz_tables(count: int, seed: int, seen: Counter) -> int:
    """PDUs sent. Raises Broken, with the session's seed."""
    tables, done, number, settled_mib = Tables(), 0, 0, None
    started = last = time.monotonic()
    while done < count:
        number += 1
        chance = random.Random(f"{seed}.{number}")
        try:
            done += tables.session(chance, chance.choice([5, 50, 200]), seen)
        except Exception as error:
            raise Broken(f"seed {seed}, session {number}: {error!r}") from error
        if settled_mib is None and done > count // 5:
            settled_mib = resident_mib()
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"  {done} PDUs, {number} sessions, {done / (last - started):.0f}/s", flush=True)
    gc.collect()
    grown_mib = resident_mib() - (settled_mib or 0)
    if settled_mib is not None and grown_mib > LEAK_MIB:
        raise Broken(f"seed {seed}: {grown_mib:.0f} MiB more memory than after a fifth of it")
    if not (tables.drive.blocks == tagged(NAMESPACE_TAG, BLOCK)).all():
        raise Broken(f"seed {seed}: the drive's blocks changed")
    return done


# Over sockets.


def attack(address, seed: int, give_up: float, counts: Counter) -> None:
    chance = random.Random(seed)
    while time.monotonic() < give_up:
        host = FuzzedHost(chance, (False, False))
        try:
            with socket.create_connection(address, 2) as connection:
                connection.settimeout(0.02)
                style = chance.random()
                if style < 0.1:  # silent, until the target has enough of it
                    connection.settimeout(5)
                    if connection.recv(1):
                        raise Broken("the target speaks first")
                    counts["silent"] += 1
                    continue
                if style < 0.2:
                    connection.sendall(chance.randbytes(chance.randrange(1, 4000)))
                    continue
                connection.sendall(host.start())
                is_admin = chance.random() < 0.5
                first = host.connect(0, 0xFFFF) if is_admin else host.connect(1, chance.randrange(200))
                connection.sendall(first)
                sent = first
                received = b""
                for _ in range(chance.choice([3, 30, 100])):
                    wire = host.next(is_admin)
                    counts["pdus"] += 1
                    if chance.random() < 0.02:
                        connection.sendall(wire[: chance.randrange(len(wire))])
                        time.sleep(chance.random() * 0.1)
                        break  # half a PDU, then gone
                    connection.sendall(wire)
                    frames, taken = api.take_frames(np.frombuffer(sent + wire, np.uint8), host.to_target)
                    host.note(frames)
                    sent = (sent + wire)[taken:]
                    if chance.random() < 0.2:
                        received = _receive(connection, host, received, counts)
        except (ConnectionError, TimeoutError):
            counts["refused"] += 1


def _receive(connection, host, received: bytes, counts: Counter) -> bytes:
    try:
        received += connection.recv(1 << 16)
    except TimeoutError:
        return received
    usable = np.frombuffer(received, np.uint8)
    frames, taken = api.take_frames(usable, host.from_target)
    if len(frames) and frames["fes"].any():
        raise Broken("the target sent what is no PDU")
    host.judge(usable[:taken], counts)
    return received[taken:]


def probe(address, give_up: float, slowest: list[float], failures: list[str]) -> None:
    """A good host among them: it must get in, and be answered within a second."""
    while time.monotonic() < give_up:
        chance = random.Random(0)
        chance.random = lambda: 0.5  # nothing wrong
        host = FuzzedHost(chance, (False, False))
        started = time.monotonic()
        try:
            with socket.create_connection(address, 5) as connection:
                connection.settimeout(5)
                connection.sendall(host.start() + host.connect(0, 0xFFFF, VICTIM))
                wanted, received = 128 + 24, b""
                while len(received) < wanted:
                    piece = connection.recv(wanted - len(received))
                    if not piece:
                        raise ConnectionError("closed")
                    received += piece
        except OSError as error:
            failures.append(f"a good host was not served: {error!r}")
        slowest.append(time.monotonic() - started)
        time.sleep(0.05)


def fuzz_sockets(seconds: float, seed: int, num_attackers: int, counts: Counter) -> list[float]:
    """How long each visit of the good host took. Raises Broken."""
    drive = FuzzDrive()
    subsystems = Subsystems(drive.served(), HostAccess.anyone(), LIMITS, NQN)
    server = Server(subsystems, "127.0.0.1", 0)
    failures: list[str] = []
    slowest: list[float] = []
    time.sleep(0.2)  # its own descriptors are there then
    before = len(os.listdir("/proc/self/fd"))
    give_up = time.monotonic() + seconds

    def guarded(function, *arguments):
        try:
            function(*arguments)
        except Exception as error:
            failures.append(repr(error))

    threads = [
        threading.Thread(target=guarded, args=(attack, server.address, seed * 1000 + n, give_up, counts))
        for n in range(num_attackers)
    ]
    threads.append(threading.Thread(target=guarded, args=(probe, server.address, give_up, slowest, failures)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    patience = time.monotonic() + 10
    while server.num_connections and time.monotonic() < patience:
        time.sleep(0.05)
    left, tickets = server.num_connections, len(drive.tickets)
    gc.collect()
    after = len(os.listdir("/proc/self/fd"))
    server.close()
    if left or tickets or subsystems._associations:
        failures.append(f"left behind: {left} connections, {tickets} tickets, {subsystems._associations}")
    if after > before:
        failures.append(f"{after - before} descriptors leaked")
    if slowest and max(slowest) > CALL_SECONDS:
        failures.append(f"a good host waited {max(slowest):.2f} s")
    if failures:
        raise Broken(f"seed {seed}: {len(failures)} failures, the first: {failures[0]}")
    return slowest


class _Errors(logging.Handler):
    """A bug of ours that the target survives is one all the same."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(self.format(record))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="PDUs to the state tables")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sockets", type=float, default=30.0, help="seconds against a server")
    parser.add_argument("--attackers", type=int, default=16)
    options = parser.parse_args()
    print(f"seed {options.seed}")
    logging.disable(logging.WARNING)
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    seen: Counter = Counter()
    try:
        started = time.monotonic()
        done = fuzz_tables(options.count, options.seed, seen) if options.count else 0
        print(f"state tables: {done} PDUs in {time.monotonic() - started:.0f} s")
        for what, number in seen.most_common(20):
            print(f"  {number:8} {what}")
        if options.sockets:
            counts: Counter = Counter()
            visits = fuzz_sockets(options.sockets, options.seed, options.attackers, counts)
            print(f"sockets: {counts['pdus']} PDUs, {len(visits)} good visits, the slowest {max(visits):.3f} s")
    except Broken as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        if failure.__cause__ is not None:
            raise
        return 1
    for text in errors.texts[:5]:
        print(f"FAILED: logged as an error: {text}", file=sys.stderr)
    return 1 if errors.texts else 0


if __name__ == "__main__":
    sys.exit(main())
