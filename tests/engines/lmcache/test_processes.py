"""Several engines on one mounted drive, and one that is killed while it stores."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("lmcache.v1", reason="these tests need LMCache: pip install 'kvfs[lmcache]'")

import kvfs
from kvfs.remote.server import RemoteServer
from kvfs.tree import Caller as MountUser

from .conftest import Caller, chunk, key, same

NUM_CHUNKS = 400
STORING = """
import sys
from tests.engines.lmcache.conftest import Caller, chunk, key, make_adapter
caller = Caller(make_adapter(sys.argv[1], flush_seconds=0.05))
for number in range({count}):
    caller.store([key(number)], [chunk(number)])
    print(number, flush=True)
"""


def test_two_engines_on_one_mount(open_adapter, tmp_path):
    """Chunks of one engine that the other does not find, or finds with other bytes."""
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, size="96MiB")
    with kvfs.open(path, cache_bytes="8MiB") as store, RemoteServer(store, tmp_path / "socket") as server:
        adapters = []
        for name in ("one", "two"):  # each folder is a mount, and a connection of its own
            folder = tmp_path / name
            (folder / ".kvfs").mkdir(parents=True)
            user = MountUser(os.geteuid(), os.getegid(), os.getpid())
            (folder / ".kvfs" / "connect").write_bytes(server.invite(user))
            adapters.append(open_adapter(path=folder, size=None))
        one, two = map(Caller, adapters)
        keys = [key(number) for number in range(30)]
        one.store(keys[:20], [chunk(number) for number in range(20)])
        two.store(keys[10:], [chunk(number) for number in range(10, 30)])
        for caller in (one, two):
            assert caller.look_up(keys) == [True] * 30
            assert all(same(found, chunk(number)) for number, found in enumerate(caller.load(keys)))
        for adapter in adapters:
            adapter.close()


@pytest.mark.slow
def test_killed_while_storing(open_adapter, tmp_path):
    """Chunks of which half was stored; and all of them gone, though seconds old."""
    path = tmp_path / "drive.kvfs"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", STORING.format(count=NUM_CHUNKS), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while process.stdout.readline().strip() != "150":
            assert process.poll() is None
        time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    caller = Caller(open_adapter(path=path))
    found = caller.load([key(number) for number in range(NUM_CHUNKS)])
    present = [number for number, one in enumerate(found) if one is not None]
    assert all(same(found[number], chunk(number)) for number in present)
    assert len(present) > 10
