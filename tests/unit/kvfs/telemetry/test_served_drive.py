"""Metrics of a drive that is served: what whoever runs the target can see of it."""

import json
import socket
import urllib.request
from contextlib import closing

import pytest

import kvfs
from kvfs.embedded_drive import DriveConfig, close_drive, open_drive
from kvfs.errors import CannotServe
from kvfs.serving import serve
from kvfs.telemetry.http_server import MetricsServer
from kvfs.telemetry.served_drive import VisibleDrive


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "drive.kvfs"
    kvfs.format(found, "48MiB")
    return found


def test_all_that_is_served(path):
    """A scrape that fails, or a page without its numbers, since there is no store."""
    drive = open_drive(path, DriveConfig(8 << 20, 1, "reference"))
    try:
        with closing(VisibleDrive(path, drive)) as visible, MetricsServer(visible, 0) as server:

            def get(what: str) -> bytes:
                return urllib.request.urlopen(server.url + what, timeout=10).read()

            metrics = get("metrics").decode()
            assert f'kvfs_drive_up{{drive="{path}",state="served"}} 1.0' in metrics
            assert "kvfs_capacity_bytes" in metrics and "kvfs_host_written_bytes_total" in metrics
            details = json.loads(get("details.json"))
            assert details["sequences"] == [] and details["map"][0]["drive"] == str(path)
            (row,) = json.loads(get("telemetry.json"))["drives"]
            assert 0 < row["counters"]["space"]["free_bytes"] <= row["counters"]["space"]["capacity_bytes"]
            assert b"<html" in get("")
    finally:
        close_drive(drive, path)


def test_a_port_that_is_taken(path):
    """Said before any host can connect; and the drive is closed again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = str(taken.getsockname()[1])
        with pytest.raises(CannotServe), serve(path, "127.0.0.1:0", metrics=at, cache_bytes="8MiB"):
            pass
    with serve(path, "127.0.0.1:0", cache_bytes="8MiB"):
        pass
