"""Killing the process that serves files, at any time: what was synced is there, and the rest is one state."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import kvfs
from kvfs.files.file_system import FileSystem
from tests.unit.kvfs.files.posix import Posix

# A file's bytes all say its version, so a reader can tell whole from mixed. Names say how far the writer was.
WRITER = textwrap.dedent(
    """
    import random
    import sys
    import kvfs
    from kvfs.files.file_system import FileSystem
    from tests.unit.kvfs.files.posix import Posix

    path, seed = sys.argv[1], int(sys.argv[2])
    chance = random.Random(seed)
    with kvfs.open(path, cache_bytes="8MiB", num_workers=1, worker="reference") as store:
        files = Posix(FileSystem(store))
        if not files.exists(b"d"):
            files.mkdir(b"d")
            store.flush()
        print("ready", flush=True)
        turn = 0
        while True:
            turn = turn % 255 + 1
            size = chance.randrange(1, 200_000)
            files.write(b"d/new", 0, bytes([turn]) * size)
            files.write(b"d/scratch-%d" % turn, chance.randrange(100_000), b"scratch" * 1000)
            with files.open(b"d/new") as handle:
                files.tree.allocate(handle, 1, size, 50_000)  # keeps the size
                files.tree.sync(handle, False)
            print("replacing", turn, size, flush=True)
            files.rename(b"d/new", b"d/file")
            files.sync(b"d/file")
            print("synced", turn, size, flush=True)
            if turn % 3 == 0:
                for name in files.listdir(b"d"):
                    if name.startswith(b"scratch"):
                        files.unlink(b"d/" + name)
    """
)


@pytest.mark.parametrize("seed", range(3))
def test_kill_under_load(tmp_path, seed):
    """A file that was synced and is gone, mixed or short; space, names or links that no longer agree."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, "32MiB")
    synced = under_way = None
    for round_number in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(seed * 100 + round_number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.05, 0.6))
        os.kill(writer.pid, signal.SIGKILL)
        lines = writer.stdout.read().split("\n")[:-1]  # a line cut short says nothing
        writer.wait()
        for line in lines:
            word, *version = line.split()
            if word == "synced":
                synced, under_way = version, None
            else:
                under_way = version
        with kvfs.open(path, cache_bytes="8MiB", num_workers=1, worker="reference") as store:
            files = Posix(FileSystem(store))
            assert store.check() == []
            names = files.listdir(b"d")
            for name in names:
                assert len(files.read(b"d/" + name)) == files.stat(b"d/" + name).size
            if b"file" not in names:
                assert synced is None
                continue
            data = files.read(b"d/file")
            assert len(set(data)) == 1
            found = [str(data[0]), str(len(data))]
            assert found in (synced, under_way)
            synced, under_way = found, None
            if b"new" in names:
                files.unlink(b"d/new")
