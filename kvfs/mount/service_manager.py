"""What a service manager wants to hear, and log lines that its journal understands."""

import logging
import os
import socket
import sys

from kvfs.telemetry.json_log import JsonFormatter
from spdk_glue.request_id import current, request_name

_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


def notify(state: str) -> None:
    """Tell systemd "READY=1" or "STOPPING=1" (sd_notify(3)); without systemd, nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifications:
        notifications.sendto(state.encode(), address)


class _Formatter(logging.Formatter):
    """With a time, or for a journal, which knows it, with the priority (sd-daemon(3)); and with the request."""

    def format(self, record: logging.LogRecord) -> str:
        request = request_name(current.request)
        text = super().format(record) + (f" [{request}]" if request else "")
        if "JOURNAL_STREAM" in os.environ:
            return f"<{_PRIORITIES.get(record.levelno, 5)}>{record.name}: {text}"
        return f"{self.formatTime(record)} {record.levelname.lower()} {record.name}: {text}"


def log_to_stderr(level: int = logging.INFO, as_json: bool = False) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else _Formatter())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level)
