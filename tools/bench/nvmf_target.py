"""SPDK's own NVMe over fabrics target, started for a benchmark or a test, set up over its JSON-RPC socket."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import closing

from spdk_glue import pyspdk

START_SECONDS = 30
SUBSYSTEM = "nqn.2026-11.io.kvfs:test"


def why_no_spdk() -> str:
    """Why nothing with SPDK can run here; empty if it can."""
    usable, why_not = pyspdk.available()
    if not usable:
        return why_not
    return "" if shutil.which("nvmf_tgt") else "SPDK's nvmf_tgt is not in PATH"


class RpcError(Exception):
    """The target refused a request."""


class Target:
    """One nvmf_tgt process with a TCP listener on loopback.

    is_polling: it takes a CPU for itself, rather than sleep while nothing comes
    bdevs: name to ("malloc", bytes) or ("aio", path), each a namespace in this order, with 4096-byte blocks
    """

    def __init__(self, folder, bdevs, *, max_io_size: int = 128 << 10, cpu_mask: str = "0x1", is_polling=False):
        self.folder = folder
        self.bdevs = bdevs
        self.max_io_size = max_io_size
        self.cpu_mask = cpu_mask
        self.is_polling = is_polling
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def transport_id(self) -> str:
        return f"trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{self.port} subnqn:{SUBSYSTEM}"

    @property
    def address(self) -> str:
        """For our own initiator."""
        return f"nvme+tcp://127.0.0.1:{self.port}/{SUBSYSTEM}"

    @property
    def location(self) -> str:
        return f"spdk:{self.transport_id}"

    def start(self) -> None:
        """Start it, or start it again: malloc namespaces are empty then, aio ones are what their files hold.

        It ends with the thread that started it.
        """
        self._socket = str(self.folder / f"rpc_{time.monotonic_ns()}.sock")
        memory = 1024 + sum(int(size) >> 20 for kind, size in self.bdevs.values() if kind == "malloc")
        self._log = open(self.folder / "nvmf_tgt.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),  # it does not outlive a test run that crashes
                "nvmf_tgt",
                *("-r", self._socket, "-m", self.cpu_mask, "--no-huge", "-s", str(memory), "--no-pci"),
                *("--silence-noticelog", "--disable-cpumask-locks"),
                *([] if self.is_polling else ["--interrupt-mode"]),
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._wait_for_socket()
        self.rpc("nvmf_create_transport", trtype="TCP", max_io_size=self.max_io_size, in_capsule_data_size=4096)
        self.rpc(
            "nvmf_create_subsystem", nqn=SUBSYSTEM, allow_any_host=True, serial_number=f"KVFSTEST{self.port}"
        )
        for name, (kind, what) in self.bdevs.items():
            if kind == "malloc":
                self.rpc("bdev_malloc_create", name=name, num_blocks=int(what) // 4096, block_size=4096)
            else:
                self.rpc(
                    "bdev_aio_create", name=name, filename=os.fspath(what), block_size=4096, fallocate=True
                )
            self.rpc("nvmf_subsystem_add_ns", nqn=SUBSYSTEM, namespace={"bdev_name": name})
        address = {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": str(self.port)}
        self.rpc("nvmf_subsystem_add_listener", nqn=SUBSYSTEM, listen_address=address)

    def listen_on_vfio_user(self) -> str:
        """Offer the subsystem as a PCIe device in a folder, too; its transport id."""
        folder = self.folder / "vfio_user"
        folder.mkdir()
        self.rpc("nvmf_create_transport", trtype="VFIOUSER")
        address = {"trtype": "VFIOUSER", "traddr": str(folder), "trsvcid": "0"}
        self.rpc("nvmf_subsystem_add_listener", nqn=SUBSYSTEM, listen_address=address)
        return f"trtype:VFIOUSER traddr:{folder} subnqn:{SUBSYSTEM}"

    def _wait_for_socket(self) -> None:
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                break
            if os.path.exists(self._socket):
                try:
                    self.rpc("spdk_get_version")
                    return
                except OSError:
                    pass  # the socket is there before it listens
            time.sleep(0.05)
        log = (self.folder / "nvmf_tgt.log").read_text(errors="replace")
        raise RuntimeError(f"nvmf_tgt does not start: {log[-2000:]}")

    def rpc(self, method: str, **params):
        """Call a method of the target's; its result. Raises RpcError."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params:
            request["params"] = params
        with closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(60)
            connection.connect(self._socket)
            connection.sendall(json.dumps(request).encode())
            text = b""
            while True:
                piece = connection.recv(1 << 16)
                text += piece
                try:
                    answer = json.loads(text)
                    break
                except json.JSONDecodeError:
                    if not piece:
                        raise
        if "error" in answer:
            raise RpcError(f"{method}: {answer['error']}")
        return answer["result"]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self._log.close()
