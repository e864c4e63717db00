"""A drive exported by SPDK's own NVMe over fabrics target, in the process that has the drive open."""

import logging
import os
import re
import tempfile
import threading
import time
from typing import Protocol

import numpy as np

from spdk_glue import command, spdk_target
from spdk_glue.controller import Controller
from spdk_glue.identify import (
    ATTENTION_CAPABILITIES,
    FLBAS_FORMAT,
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    ONCS_VERIFY,
    VENDOR_AREA_OFFSET,
    Cns,
)
from spdk_glue.pyspdk import environment
from spdk_glue.spdk_target import rpc
from spdk_glue.spdk_target.commands import DriveCommands
from spdk_glue.spdk_target.configuration import (
    BDEV_NAME,
    BDEV_OPTIONS,
    IOBUF_OPTIONS,
    TargetConfig,
)
from spdk_glue.spdk_target.hosts import SILENT_SECONDS, Hosts
from spdk_glue.status import NvmeError

log = logging.getLogger(__name__)

START_SECONDS = 30
WATCH_SECONDS = 1
DEFAULT_MEMORY_MB = 768  # touched only as it is used
_started = False  # SPDK's environment and its reactors start once in a process


class TargetError(NvmeError):
    """The target cannot start or listen; says why in one line."""


class ServedDrive(Protocol):
    """What of a drive the target needs."""

    controller: Controller

    @property
    def page_map(self) -> int | None:
        """Address of the map by which pages are read without the drive's code, a dio_map of ftl/direct_io."""

    def count_reads(self, num_pages: int) -> None:
        """So many pages were read by that map."""


class SpdkTarget:
    """Runs from its creation to `close`. Raises TargetError, SpdkUnavailable, OSError."""

    def __init__(self, drive: ServedDrive, config: TargetConfig):
        global _started
        usable, why_not = spdk_target.available()
        if not usable:
            raise environment.SpdkUnavailable(why_not)
        from spdk_glue.spdk_target._spdk_target import ffi, lib

        if _started or environment.started_with() is not None:
            raise TargetError("SPDK was started in this process before: its target needs a process of its own")
        _started = True
        self.config = config
        self._drive, self._ffi, self._lib = drive, ffi, lib
        self._num_counted = 0
        self._count_lock = threading.Lock()
        self._result: int | None = None
        self._is_up = False  # SPDK has answered
        self._is_closing = threading.Event()
        self._options = self._make_options(drive)
        if lib.kvfs_target_prepare() < 0:
            raise TargetError("no semaphores are left")
        self._hosts = Hosts(drive.controller, self._max_tickets)
        self._commands = DriveCommands(ffi, lib, self._hosts, self._options.block_bytes, self._count_reads)
        self._folder = tempfile.TemporaryDirectory(prefix="kvfs-spdk-")  # mode 0700
        self._socket = os.path.join(self._folder.name, "rpc.sock")
        self._options.rpc_socket = self._keep(self._socket.encode())
        self._reactor = threading.Thread(target=self._run, name="kvfs-spdk-reactor", daemon=True)
        self._reactor.start()
        self._watcher = threading.Thread(target=self._watch, name="kvfs-spdk-watch", daemon=True)
        try:
            self._set_up()
            self._folder.cleanup()  # nobody calls any more
            self._watcher.start()
        except BaseException:
            self.close()
            raise

    # starting

    def _keep(self, text: bytes):
        """A C string that lives as long as the target."""
        self._kept.append(self._ffi.new("char[]", text))
        return self._kept[-1]

    def _make_options(self, drive: ServedDrive):
        identity = _identify(drive.controller, Cns.CONTROLLER, IDENTIFY_CONTROLLER)
        namespace = _identify(drive.controller, Cns.NAMESPACE, IDENTIFY_NAMESPACE)
        self.nqn = self.config.nqn or identity["subnqn"].decode()
        self._max_tickets = int(identity["attention"]["max_tickets"])
        self.serial_number = identity["sn"].decode()
        self.model_number = identity["mn"].decode()
        self._kept = [*(_raw(record) for record in (identity, _identity_mask()))]
        hugepages, memory_mb = environment.memory_options(
            self.config.hugepages, self.config.memory_mb, DEFAULT_MEMORY_MB
        )
        cpus = self.config.cpus or (min(os.sched_getaffinity(0)),)
        options = self._ffi.new("kvfs_target_options *")
        options.name = self._keep(f"kvfs_{os.getpid()}".encode())
        options.cpus = self._keep(f"[{','.join(map(str, cpus))}]".encode())
        options.bdev_name = self._keep(BDEV_NAME.encode())
        options.memory_mb, options.hugepages, options.polling = memory_mb, hugepages, self.config.polls
        options.num_blocks = int(namespace["nsze"])
        options.block_bytes = 1 << int(namespace["lbaf"][namespace["flbas"] & FLBAS_FORMAT]["lbads"])
        options.uuid = bytes.fromhex(self.serial_number.ljust(32, "0"))
        options.map = self._ffi.cast("void *", drive.page_map or 0)
        options.max_transfer_at = VENDOR_AREA_OFFSET + ATTENTION_CAPABILITIES.fields["max_transfer_bytes"][1]
        options.identity = self._ffi.from_buffer("uint8_t[]", self._kept[0])
        options.identity_mask = self._ffi.from_buffer("uint8_t[]", self._kept[1])
        return options

    def _run(self) -> None:
        self._result = self._lib.kvfs_target_run(self._options)

    def _set_up(self) -> None:
        self._wait_for_rpc()
        self._call("iobuf_set_options", IOBUF_OPTIONS)
        self._call("bdev_set_options", BDEV_OPTIONS)
        self._call("framework_start_init", {})
        for method, params in self.config.calls(self.nqn, self.serial_number, self.model_number):
            self._call(method, params)

    def _wait_for_rpc(self) -> None:
        give_up = time.monotonic() + START_SECONDS
        while self._result is None and time.monotonic() < give_up:
            try:
                rpc.call(self._socket, "spdk_get_version")
                self._is_up = True
                return
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.02)
        raise TargetError(f"SPDK's target does not start: {self._last_words('no reason given')}")

    def _call(self, method: str, params: dict) -> None:
        try:
            rpc.call(self._socket, method, **params)
        except rpc.RpcRefused as refused:
            said = self._last_words(refused.message)
            address = params.get("listen_address")
            if address is not None:
                where = next(str(one) for one in self.config.listeners if one.rpc_address == address)
                found = re.search(r"errno = (\d+)", said)
                why = os.strerror(int(found[1])) if found else said
                raise TargetError(f"cannot listen on {where}: {why}") from refused
            raise TargetError(f"SPDK refuses {method}: {refused.message.rstrip('.')} ({said})") from refused
        except OSError as error:
            raise TargetError(f"SPDK's target has ended: {self._last_words(str(error))}") from error

    def _errors(self) -> list[str]:
        """What SPDK has logged since the last call."""
        text = self._ffi.new("char[]", 8192)
        self._lib.kvfs_target_errors(text, len(text))
        lines = self._ffi.string(text).decode("utf-8", "replace").split("\n")
        return [line.strip() for line in lines if line.strip()]

    def _last_words(self, otherwise: str) -> str:
        """The first of the latest errors: those that follow say what came of it."""
        return next(iter(self._errors()), otherwise)

    # running

    @property
    def addresses(self) -> list[str]:
        """Where it listens."""
        return [str(listener) for listener in self.config.listeners]

    @property
    def has_ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._result is not None and not self._is_closing.is_set()

    def _watch(self) -> None:
        while not self._is_closing.wait(WATCH_SECONDS):
            for line in self._errors():
                log.warning("SPDK: %s", line)
            self.forget_silent_hosts(SILENT_SECONDS)

    def _count_reads(self) -> None:
        found = self._ffi.new("kvfs_target_counters *")
        with self._count_lock:
            self._lib.kvfs_target_count(found)
            self._drive.count_reads(found.short_read_pages - self._num_counted)
            self._num_counted = found.short_read_pages

    def counters(self) -> dict[str, int]:
        """Reads done beside the reactor, the pages of these, commands done by the drive's threads."""
        found = self._ffi.new("kvfs_target_counters *")
        self._lib.kvfs_target_count(found)
        return {name: getattr(found, name) for name in ("short_reads", "short_read_pages", "handed_over")}

    def forget_silent_hosts(self, seconds: float) -> list[int]:
        """Let go of hosts that were not heard for so long; the identifiers of their controllers."""
        silent_ms = self._lib.kvfs_target_silent_ms
        return self._hosts.forget(lambda number: number != 0 and silent_ms(number) >= 1000 * seconds)

    # ending

    def close(self) -> None:
        """Stop listening, end what is under way, and let go of the drive."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        if self._result is None and self._is_up:
            self._lib.kvfs_target_stop()
        self._reactor.join()
        if self._watcher.is_alive():
            self._watcher.join()
        self._commands.join()
        self._count_reads()
        self._folder.cleanup()

    def __enter__(self) -> "SpdkTarget":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _identify(controller: Controller, cns: Cns, record: np.dtype) -> np.void:
    data = np.zeros(record.itemsize, np.uint8)
    entry = command.identify(cns, command.NSID if cns == Cns.NAMESPACE else 0)
    controller.execute(0, entry, [data])
    return data.view(record)[0]


def _raw(record: np.void) -> np.ndarray:
    return np.frombuffer(record.tobytes(), np.uint8)


def _identity_mask() -> np.void:
    """Ones where the drive's Identify Controller counts: what SPDK does not know of it."""
    mask = np.zeros(IDENTIFY_CONTROLLER.itemsize, np.uint8)
    mask[VENDOR_AREA_OFFSET : VENDOR_AREA_OFFSET + ATTENTION_CAPABILITIES.itemsize] = 0xFF
    record = mask.view(IDENTIFY_CONTROLLER)[0]
    record["elpe"] = 0xFF
    record["oncs"] = ONCS_VERIFY
    return record
