"""JSON-RPC 2.0 with SPDK, over its Unix socket."""

import json
import os
import socket
from contextlib import closing

TIMEOUT_SECONDS = 60


class RpcRefused(Exception):
    """SPDK's answer is an error: `method`, `message`."""

    def __init__(self, method: str, message: str):
        self.method = method
        self.message = message
        super().__init__(method, message)

    def __str__(self) -> str:
        return f"{self.method}: {self.message}"


def call(path: str | os.PathLike, method: str, /, **params):
    """The result of a method. Raises RpcRefused, OSError."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method}
    if params:
        request["params"] = params
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(TIMEOUT_SECONDS)
        connection.connect(os.fspath(path))
        connection.sendall(json.dumps(request).encode())
        answer = _read_answer(connection)
    if "error" in answer:
        raise RpcRefused(method, answer["error"].get("message", "no reason given"))
    return answer["result"]


def _read_answer(connection: socket.socket) -> dict:
    """One JSON value: nothing but its end tells that it has ended."""
    text = b""
    while piece := connection.recv(1 << 16):
        text += piece
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            continue
    raise ConnectionError("SPDK ended the connection in the middle of an answer")
