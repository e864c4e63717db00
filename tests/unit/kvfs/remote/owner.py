"""A store served as by a mount, without one: `.kvfs/connect` is a file that is written before each opening."""

import os
import subprocess
import sys
from pathlib import Path

import kvfs
from kvfs.remote.server import RemoteServer
from kvfs.tree import Caller


class Served:
    """A store and its server in this process, and the folder that kvfs.open takes. Use as a context manager."""

    def __init__(self, store, folder: Path, **options):
        self.store, self.folder = store, folder
        (folder / ".kvfs").mkdir(parents=True, exist_ok=True)
        self.server = RemoteServer(store, folder / "socket", **options)

    def invite(self, uid: int | None = None) -> Path:
        """Have the next opening succeed, of a process of this user."""
        caller = Caller(os.geteuid() if uid is None else uid, os.getegid(), os.getpid())
        (self.folder / ".kvfs" / "connect").write_bytes(self.server.invite(caller))
        return self.folder

    def open(self):
        return kvfs.open(self.invite())

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *exception) -> None:
        self.server.close()


class Owner:
    """The same in a process of its own: one that can be killed."""

    def __init__(self, drive: Path, folder: Path):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(drive), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self) -> None:
        assert self.process.stdout.readline() == "ready\n"

    def open(self):
        self.process.stdin.write("invite\n")
        self.process.stdin.flush()
        self._answer()
        return kvfs.open(self.folder)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        """Have it close the store, and wait."""
        self.process.communicate("")
        assert self.process.returncode == 0


if __name__ == "__main__":
    with kvfs.open(sys.argv[1], cache_bytes="8MiB") as store, Served(store, Path(sys.argv[2])) as served:
        print("ready", flush=True)
        for _ in sys.stdin:
            served.invite()
            print("ready", flush=True)
