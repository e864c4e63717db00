"""Kill a mount's process under load, again and again: python tools/suites/kill.py [--rounds 200]

Two processes use the mount, one its files (write, fsync, rename, fsync), one the KV cache (append, flush). At a
random moment the server gets SIGKILL. Then the drive is mounted again: what was synced has to be there, and
nothing may be half done; and `kvfsctl check` must find nothing. Exit code 1 if a round failed.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from mounted import KVFSCTL, wait_for

import kvfs
from kvfs.mount.mountpoints import mount_at

WANTED_SECONDS = 2.0  # from the command to the mount
GEOMETRY = {"num_layers": 2, "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 64}
LOAD_SECONDS = (0.1, 2.0)  # before the kill
MAX_FILE_BYTES = 300_000
NUM_FILES = 4
TOKEN_CYCLE = 1000  # a token's rows are its position in it: whole numbers that fp16 has


@dataclass
class Round:
    number: int
    remount_seconds: float = 0.0
    synced_files: int = 0
    flushed_tokens: int = 0
    failures: list[str] = field(default_factory=list)


# the load: processes that say what they are about to do, and what is durable


def say(*words) -> None:
    print(*words, flush=True)


def load_files(folder: Path, seed: int) -> None:
    """Each file's bytes all say its version: a reader can tell whole from mixed."""
    chance = random.Random(seed)
    version = 0
    while True:
        version = version % 255 + 1
        size, name = chance.randrange(1, MAX_FILE_BYTES), f"file-{chance.randrange(NUM_FILES)}"
        with open(folder / "new", "wb") as file:
            file.write(bytes([version]) * size)
            os.fsync(file.fileno())
        say("replacing", name, version, size)
        os.rename(folder / "new", folder / name)
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        say("synced", name, version, size)


def rows(start: int, stop: int) -> np.ndarray:
    """fp16 [stop - start, num_kv_heads, head_dim]"""
    positions = (np.arange(start, stop) % TOKEN_CYCLE).astype(np.float16)
    shape = (stop - start, GEOMETRY["num_kv_heads"], GEOMETRY["head_dim"])
    return np.broadcast_to(positions[:, None, None], shape)


def load_tokens(mountpoint: Path, name: str, seed: int) -> None:
    chance = random.Random(seed)
    with kvfs.open(mountpoint) as store:
        sequence = store.create_sequence(store.add_model("m", **GEOMETRY), name)
        sequence.flush()
        say("flushed", 0)
        total = 0
        while True:
            count = chance.choice([1, 3, 64, 500])
            keys = rows(total, total + count)
            for layer in range(GEOMETRY["num_layers"]):
                sequence.append(layer, keys, -keys)
            total += count
            if chance.random() < 0.3:
                sequence.flush()
                say("flushed", total)


# the rounds


def serve(drive: Path, mountpoint: Path) -> tuple[subprocess.Popen, float]:
    """The server and the seconds until it served."""
    started = time.monotonic()
    server = subprocess.Popen([*KVFSCTL, "mount", "--foreground", drive, mountpoint], stderr=subprocess.DEVNULL)
    wait_for(server, mountpoint)
    return server, time.monotonic() - started


def run_round(found: Round, drive: Path, mountpoint: Path, chance: random.Random) -> None:
    server, _ = serve(drive, mountpoint)
    (mountpoint / "d").mkdir(exist_ok=True)
    name, seed = f"s{found.number}", str(chance.randrange(1 << 30))
    command = [sys.executable, __file__, "--load"]
    loads = [
        subprocess.Popen([*command, *load], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        for load in (("files", mountpoint / "d", seed), ("tokens", mountpoint, name, seed))
    ]
    begun = [load.stdout.readline().decode().split() for load in loads]
    time.sleep(chance.uniform(*LOAD_SECONDS))
    server.kill()
    server.wait()
    said = []
    for load, first in zip(loads, begun, strict=True):
        load.terminate()
        said.append([first, *(line.split() for line in load.communicate()[0].decode().splitlines())])
    subprocess.run(["umount", "--lazy", mountpoint], check=True)
    server, found.remount_seconds = serve(drive, mountpoint)
    if found.remount_seconds > WANTED_SECONDS:
        found.failures.append(f"mounted again in {found.remount_seconds:.1f} s")
    check_files(found, mountpoint / "d", said[0])
    check_tokens(found, mountpoint, name, said[1])
    server.terminate()
    server.wait()
    checked = subprocess.run([*KVFSCTL, "check", drive], capture_output=True, text=True)
    if checked.returncode:
        found.failures.append(f"check: {checked.stdout.strip()} {checked.stderr.strip()}")


def check_files(found: Round, folder: Path, said: list[list[str]]) -> None:
    """Of each name what was synced last, or what came after."""
    may_hold: dict[str, list[tuple[int, int]]] = {}
    for what, name, version, size in said:
        if what == "synced":
            found.synced_files += 1
            may_hold[name] = []
        may_hold.setdefault(name, []).append((int(version), int(size)))
    was_synced = {name for what, name, _, _ in said if what == "synced"}
    for name, states in may_hold.items():
        content = (folder / name).read_bytes() if (folder / name).exists() else None
        if content is None:
            if name in was_synced:
                found.failures.append(f"{name} was synced and is gone")
            continue
        is_state = len(set(content)) == 1 and (content[0], len(content)) in states
        if not is_state and name in was_synced:
            found.failures.append(f"{name} has {len(content)} bytes of versions {sorted(set(content))}")


def check_tokens(found: Round, mountpoint: Path, name: str, said: list[list[str]]) -> None:
    found.flushed_tokens = int(said[-1][1])
    with kvfs.open(mountpoint) as store:
        sequence = store.sequence(name)
        num_tokens = sequence.num_tokens
        if num_tokens < found.flushed_tokens:
            found.failures.append(f"{name} has {num_tokens} tokens of {found.flushed_tokens} flushed")
        for layer in range(GEOMETRY["num_layers"]):
            keys, values = sequence.read(layer, 0, num_tokens)
            expected = rows(0, num_tokens)
            if not (np.array_equal(keys, expected) and np.array_equal(values, -expected)):
                found.failures.append(f"{name} layer {layer} holds other rows than were appended")
        store.delete_sequence(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", default="1GiB", help="of the drive")
    parser.add_argument("--json", action="store_true", dest="json_output")
    arguments = parser.parse_args()
    chance, rounds = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory(prefix="kvfs-kill-") as scratch:
        drive, mountpoint = Path(scratch) / "drive.kvfs", Path(scratch) / "mount"
        mountpoint.mkdir()
        formatting = [*KVFSCTL, "format", drive, "--size", arguments.size]
        subprocess.run(formatting, check=True, stdout=subprocess.DEVNULL)
        try:
            for number in range(arguments.rounds):
                rounds.append(Round(number))
                run_round(rounds[-1], drive, mountpoint, chance)
                if not arguments.json_output:
                    print(summary(rounds[-1]), flush=True)
        finally:
            if mount_at(mountpoint):
                subprocess.run(["umount", "--lazy", mountpoint])
    failed = sum(bool(found.failures) for found in rounds)
    seconds = [found.remount_seconds for found in rounds]
    if arguments.json_output:
        print(
            json.dumps(
                {"suite": "kill", "failed": failed, "rounds": [asdict(found) for found in rounds]}, indent=2
            )
        )
    else:
        print(
            f"{len(rounds)} kills, {failed} failed; mounted again in {statistics.median(seconds):.2f} s,"
            f" {max(seconds):.2f} s at most"
        )
    sys.exit(1 if failed else 0)


def summary(found: Round) -> str:
    verdict = "; ".join(found.failures) or "all there"
    return (
        f"round {found.number}: mounted again in {found.remount_seconds:.2f} s, {found.synced_files} syncs and"
        f" {found.flushed_tokens} tokens: {verdict}"
    )


if __name__ == "__main__":
    if sys.argv[1:3] == ["--load", "files"]:
        load_files(Path(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:3] == ["--load", "tokens"]:
        load_tokens(Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        main()
