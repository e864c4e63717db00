"""A host on a plain socket, as small as it can be: it connects a queue and authenticates it."""

import socket
import uuid

import numpy as np

from spdk_glue.fabrics import pdu, records
from spdk_glue.fabrics.authentication import MESSAGE_BYTES_MAX, HostAuthenticator
from spdk_glue.fabrics.records import FabricsType
from spdk_glue.status import decode

SECONDS = 20


class CommandRefused(Exception):
    """A status that is not success."""


class SocketHost:
    """One connection, the admin queue's. Raises CommandRefused, OSError and FatalPduError."""

    def __init__(self, port: int, host_nqn: str, subsystem_nqn: str):
        self.framing = pdu.Framing(from_host=False)
        self.host_nqn, self.subsystem_nqn = host_nqn, subsystem_nqn
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS)
        self.received = b""
        self.cid = 0
        self.socket.sendall(pdu.ic_request(header_digest=False, data_digest=False).tobytes())
        assert self._take().type is pdu.PduType.IC_RESPONSE
        data = records.connect_data(uuid.uuid4(), host_nqn, subsystem_nqn).tobytes()
        completion, _ = self.command(records.connect(0, 32), send=data)
        self.must_authenticate = bool(
            records.result_of(completion, records.CONNECT_RESULT)["authreq"] & records.AUTHREQ_TRANSACTION
        )

    def _take(self) -> pdu.Pdu:
        while (taken := pdu.take_pdu(self.received, self.framing)) is None:
            piece = self.socket.recv(1 << 16)
            if not piece:
                raise ConnectionResetError("the target closed the connection")
            self.received += piece
        self.received = self.received[taken[1] :]
        return taken[0]

    def command(self, entry: np.ndarray, *, send: bytes = b"", room: int = 0) -> tuple[np.ndarray, bytes]:
        """(completion, data received) of one command."""
        self.cid += 1
        entry["cid"] = self.cid
        kind, length = (records.SGL_TRANSPORT, room) if room else (records.SGL_IN_CAPSULE, len(send))
        entry["dptr"] = records.sgl(kind, length).view("V16")
        header = pdu.capsule_commands(entry, self.framing, len(send))
        self.socket.sendall(pdu.with_digests(header, send))
        data = b""
        while True:
            answer = self._take()
            if answer.type is pdu.PduType.C2H_DATA:
                data += answer.data
                if answer.record["flags"] & pdu.PduFlag.SUCCESS:
                    return np.zeros(1, pdu.COMPLETION_ENTRY), data
                continue
            assert answer.type is pdu.PduType.CAPSULE_RESPONSE, answer.type
            completion = np.array([answer.record["entry"]])
            if status := decode(int(completion["status"][0])):
                raise CommandRefused(f"status {status:#06x}")
            return completion, data

    def send(self, message: bytes) -> None:
        self.command(records.authentication(FabricsType.AUTHENTICATION_SEND, len(message)), send=message)

    def receive(self) -> bytes:
        room = MESSAGE_BYTES_MAX
        entry = records.authentication(FabricsType.AUTHENTICATION_RECEIVE, room)
        return self.command(entry, room=room)[1]

    def authenticate(self, authenticator: HostAuthenticator) -> list[bytes]:
        """Until it has no more to say; the messages of both sides."""
        said = []
        while authenticator.wants_to_send or authenticator.wants_to_receive:
            if authenticator.wants_to_send:
                said.append(authenticator.next_message())
                self.send(said[-1])
            else:
                said.append(self.receive())
                authenticator.receive(said[-1])
        return said

    def version(self) -> int:
        """A property: what no queue may read that is not authenticated."""
        completion, _ = self.command(records.property_get(records.Property.VS))
        return int(records.result_of(completion, records.PROPERTY_RESULT)["value"])

    def close(self) -> None:
        self.socket.close()
