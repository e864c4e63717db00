"""Which process a temporary sequence goes with, and whether that one still runs.

A process is told by its host, the boot, its namespace of process numbers, its number, and when it started: no
other process ever has all five.
"""

import os
from enum import Enum
from functools import cache
from pathlib import Path


class OwnerState(Enum):
    ALIVE = "alive"
    GONE = "gone"  # for certain
    UNKNOWN = "unknown"  # it is, or was, on another host or in another container


def this_process() -> bytes:
    """The value of user.kvfs.owner for what is to go with this process."""
    return f"{_host()} {_boot()} {_pid_namespace()} {os.getpid()} {_start_time(os.getpid())}".encode()


def is_owner(value: bytes) -> bool:
    fields = value.decode("ascii", "replace").split(" ")
    return len(value) <= 255 and len(fields) == 5 and all(fields) and all(map(str.isdigit, fields[2:]))


def owner_state(value: bytes) -> OwnerState:
    host, boot, namespace, pid, started = value.decode("ascii", "replace").split(" ")
    if host != _host():
        return OwnerState.UNKNOWN
    if boot != _boot():
        return OwnerState.GONE
    if namespace != _pid_namespace():
        return OwnerState.UNKNOWN
    return OwnerState.ALIVE if _start_time(int(pid)) == started else OwnerState.GONE


def described(value: bytes) -> str:
    host, _, _, pid, _ = value.decode("ascii", "replace").split(" ")
    return f"process {pid} of host {host}"


@cache
def _host() -> str:
    return os.uname().nodename.replace(" ", "_") or "unnamed"


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)


def _start_time(pid: int) -> str:
    """Of a process that runs, in clock ticks since the boot; empty where there is none, or one that has ended
    and that nobody has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
