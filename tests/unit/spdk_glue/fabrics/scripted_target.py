"""A small NVMe/TCP target on a thread, for the host's side: right by default, wrong where a test wants it."""

import contextlib
import socket
import threading
import time

import numpy as np

from spdk_glue.command import COMPLETION_ENTRY, AdminOpcode, IoOpcode
from spdk_glue.fabrics import pdu, records
from spdk_glue.fabrics.pdu import Framing, PduFlag, PduType
from spdk_glue.fabrics.records import FABRICS_OPCODE, FabricsType, Property
from spdk_glue.identify import IDENTIFY_CONTROLLER, IDENTIFY_NAMESPACE, VWC_PRESENT, Cns
from spdk_glue.status import Status, encode

SUBNQN = "nqn.2026-11.io.kvfs:scripted"
NUM_BLOCKS, BLOCK = 1024, 4096
FROM_HOST, TO_HOST = Framing(True), Framing(False)


class ScriptedTarget:
    """One subsystem with one namespace in memory.

    on_command: called with (queue id, entry, connection); what it returns other than None is sent instead of an
    answer (b"" for silence). `commands`: (queue id, opcode) of each that came.
    """

    def __init__(self, num_queues: int = 4, has_volatile_cache: bool = False):
        self.memory = np.zeros(NUM_BLOCKS * BLOCK, np.uint8)
        self.on_command = lambda queue_id, entry, connection: None
        self.greeting: bytes | None = None  # instead of ICResp
        self.commands: list[tuple[int, int]] = []
        self.serial_number = b"SCRIPT"
        self.num_queues, self.has_volatile_cache = num_queues, has_volatile_cache
        self._connections: set[socket.socket] = set()
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"nvme+tcp://127.0.0.1:{self.port}/{SUBNQN}"

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """As if it were killed."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()

    def drop_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._speak(connection)
            except OSError:
                pass
            finally:
                self._connections.discard(connection)

    def _speak(self, connection: socket.socket) -> None:
        queue_id, enabled, writes, received = 0, 0, {}, b""
        while piece := connection.recv(1 << 20):
            received += piece
            while (found := pdu.take_pdu(received, FROM_HOST)) is not None:
                one, taken = found
                received = received[taken:]
                if one.type == PduType.IC_REQUEST:
                    granted = pdu.ic_response(
                        header_digest=False, data_digest=False, max_h2c_data_bytes=1 << 17
                    )
                    connection.sendall(granted.tobytes() if self.greeting is None else self.greeting)
                    continue
                if one.type == PduType.H2C_TERMINATE:
                    return
                if one.type == PduType.H2C_DATA:
                    entry = writes[int(one.record["cid"])]
                    self._write(entry, one.data, int(one.record["offset"]))
                    if one.record["flags"] & PduFlag.LAST:
                        connection.sendall(answer(entry))
                    continue
                entry = one.record["entry"]
                opcode = int(entry["opcode"])
                self.commands.append((queue_id, opcode))
                scripted = self.on_command(queue_id, entry, connection)
                if scripted is not None:
                    connection.sendall(scripted)
                elif opcode == FABRICS_OPCODE:
                    kind = int(entry["nsid"]) & 0xFF
                    command = np.frombuffer(entry.tobytes(), records.PROPERTY_COMMAND)[0]
                    value = 0
                    if kind == FabricsType.CONNECT:
                        queue_id = int(np.frombuffer(entry.tobytes(), records.CONNECT_COMMAND)["qid"][0])
                        value = 1
                    elif kind == FabricsType.PROPERTY_SET and command["ofst"] == Property.CC:
                        enabled = int(command["value"])
                    elif kind == FabricsType.PROPERTY_GET:
                        value = self._property(int(command["ofst"]), enabled)
                    connection.sendall(answer(entry, value=value))
                elif queue_id == 0:
                    connection.sendall(self._admin(entry))
                elif opcode == IoOpcode.READ:
                    first, size = int(entry["cdw10"]) * BLOCK, (int(entry["cdw12"]) + 1) * BLOCK
                    flags = PduFlag.LAST | PduFlag.SUCCESS
                    header = pdu.data(PduType.C2H_DATA, int(entry["cid"]), size, TO_HOST, flags=flags)
                    connection.sendall(pdu.with_digests(header, self.memory[first : first + size].tobytes()))
                elif opcode == IoOpcode.WRITE:
                    if one.data:
                        self._write(entry, one.data, 0)
                        connection.sendall(answer(entry))
                    else:
                        writes[int(entry["cid"])] = entry
                        size = (int(entry["cdw12"]) + 1) * BLOCK
                        connection.sendall(pdu.r2t(int(entry["cid"]), 1, 0, size, TO_HOST).tobytes())
                else:
                    connection.sendall(answer(entry))

    def _write(self, entry: np.void, data: bytes, offset: int) -> None:
        start = int(entry["cdw10"]) * BLOCK + offset
        self.memory[start : start + len(data)] = np.frombuffer(data, np.uint8)

    @staticmethod
    def _property(offset: int, enabled: int) -> int:
        if offset == Property.CAP:
            return records.capabilities(128, 1000)
        shut_down = records.CSTS_SHUTDOWN_COMPLETE if enabled & records.CC_SHUTDOWN else 0
        return {Property.CSTS: (enabled & 1) | shut_down, Property.CC: enabled}.get(offset, 0)

    def _admin(self, entry: np.void) -> bytes:
        opcode = int(entry["opcode"])
        if opcode == AdminOpcode.SET_FEATURES:
            granted = self.num_queues - 1
            return answer(entry, value=granted | granted << 16)
        if opcode != AdminOpcode.IDENTIFY:
            return answer(entry)
        page = np.zeros(4096, np.uint8)
        if entry["cdw10"] == Cns.CONTROLLER:
            identity = page.view(IDENTIFY_CONTROLLER)
            identity["mdts"], identity["ioccsz"], identity["sn"] = 5, (64 + BLOCK) // 16, self.serial_number
            identity["vwc"] = VWC_PRESENT if self.has_volatile_cache else 0
        elif entry["cdw10"] == Cns.ACTIVE_NAMESPACES:
            page.view("<u4")[0] = 1
        else:
            namespace = page.view(IDENTIFY_NAMESPACE)
            namespace["nsze"] = NUM_BLOCKS
            namespace["lbaf"]["lbads"][0, 0] = 12
        header = pdu.data(PduType.C2H_DATA, int(entry["cid"]), 4096, TO_HOST, flags=PduFlag.LAST)
        return pdu.with_digests(header, page.tobytes()) + answer(entry)


def answer(entry: np.void, status: int = Status.SUCCESS, value: int = 0) -> bytes:
    """CapsuleResp."""
    completion = np.zeros(1, COMPLETION_ENTRY)
    completion["cid"], completion["status"] = entry["cid"], encode(status)
    completion["cdw0"], completion["cdw1"] = value & 0xFFFFFFFF, value >> 32
    return pdu.capsule_responses(completion, TO_HOST).tobytes()


def wait_until(condition, seconds: float = 60.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it does not happen"
        time.sleep(0.01)
