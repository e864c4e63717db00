"""The checks of qemu_nvme_tcp.py, which runs this inside its virtual machine, with the standard library alone:
python nvme_tcp_guest.py ADDRESS PORT NQN FOLDER CHECK...

FOLDER has an attention descriptor and its answer. Each check prints a line of JSON, and REPORT_END comes last.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

REPORT_END = "REPORT END"
DEVICE = "/dev/nvme0n1"
ANSWER_HEADER_BYTES = 48
BLOCK = 4096
BEHIND_THE_STORE = 32_768  # an LBA that the sequence has not
FILE_BYTES = 6 << 20
KEEP_ALIVE_SECONDS = 2


class Failed(Exception):
    pass


def run(*command, data: bytes | None = None) -> bytes:
    done = subprocess.run(list(map(str, command)), input=data, capture_output=True)
    if done.returncode:
        raise Failed(
            f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).decode(errors='replace')[-300:]}"
        )
    return done.stdout


def connect(*options) -> None:
    run("nvme", "connect", "-t", "tcp", "-a", ADDRESS, "-s", PORT, "-n", NQN, "-i", 2, "-q", HOSTNQN, *options)
    give_up = time.monotonic() + 20
    while not os.path.exists(DEVICE):
        if time.monotonic() > give_up:
            raise Failed(f"no {DEVICE}")
        time.sleep(0.1)


def disconnect() -> None:
    run("nvme", "disconnect", "-n", NQN)


class connected:
    def __init__(self, *options):
        self.options = options

    def __enter__(self):
        connect(*self.options)

    def __exit__(self, *failure):
        disconnect()


def write_and_compare(seed: int) -> None:
    content = b"".join(hashlib.sha256(f"{seed}.{n}".encode()).digest() for n in range((4 << 20) // 32))
    at = f"seek={BEHIND_THE_STORE}"
    run("dd", f"of={DEVICE}", "bs=4096", at, "oflag=direct", "conv=fsync", "iflag=fullblock", data=content)
    for size in (4096, 131072):
        at = f"skip={BEHIND_THE_STORE * BLOCK // size}"
        got = run("dd", f"if={DEVICE}", f"bs={size}", at, f"count={len(content) // size}", "iflag=direct")
        if got != content:
            raise Failed(f"what came back is not what was written ({size} bytes at a time)")


def check_discover() -> None:
    found = run("nvme", "discover", "-t", "tcp", "-a", ADDRESS, "-s", PORT, "-q", HOSTNQN).decode()
    if NQN not in found:
        raise Failed(found)


def check_plain() -> None:
    with connected():
        write_and_compare(1)


def check_digests() -> None:
    with connected("--hdr-digest", "--data-digest"):
        write_and_compare(2)


def check_admin() -> None:
    with connected():
        if "kvfs computational drive" not in run("nvme", "id-ctrl", DEVICE).decode():
            raise Failed("id-ctrl")
        for what in ("id-ns", "smart-log", "error-log", "fw-log", "effects-log", "list-ns", "ns-descs"):
            run("nvme", what, DEVICE)
        run("nvme", "get-feature", "/dev/nvme0", "-f", 7)
        run("nvme", "flush", DEVICE, "-n", 1)
        run("nvme", "dsm", DEVICE, "-n", 1, "-d", "-s", BEHIND_THE_STORE, "-b", 16)
        if any(run("dd", f"if={DEVICE}", "bs=4096", f"skip={BEHIND_THE_STORE}", "count=16", "iflag=direct")):
            raise Failed("deallocated blocks are not zeros")


def check_attention() -> None:
    """The vendor commands by nvme io-passthru, answered as by the embedded drive."""
    descriptor, answer = (FOLDER / "descriptor").read_bytes(), (FOLDER / "answer").read_bytes()
    with connected():
        for ticket in range(3):
            passthru = ("nvme", "io-passthru", DEVICE, "--namespace-id=1", f"--cdw10={ticket}")
            size = len(descriptor)
            pages = f"--cdw12={-(-size // BLOCK) - 1}"
            file = f"--input-file={FOLDER / 'descriptor'}"
            run(*passthru, "--opcode=0x81", f"--data-len={size}", "--write", file, pages)
            size = len(answer)
            pages = f"--cdw12={-(-size // BLOCK) - 1}"
            got = run(*passthru, "--opcode=0x82", f"--data-len={size}", "--read", "--raw-binary", pages)
            if got[ANSWER_HEADER_BYTES : len(answer)] != answer[ANSWER_HEADER_BYTES:]:
                raise Failed(f"another answer: {len(got)} bytes")


def check_reset() -> None:
    with connected():
        for number in range(3):
            run("nvme", "reset", "/dev/nvme0")
            write_and_compare(10 + number)


def check_keep_alive() -> None:
    """Idle for several timeouts: Linux's Keep Alive commands must be answered, or it loses the drive."""
    with connected("--keep-alive-tmo", KEEP_ALIVE_SECONDS):
        time.sleep(3 * KEEP_ALIVE_SECONDS)
        if Path("/sys/class/nvme/nvme0/state").read_text().strip() != "live":
            raise Failed("the controller is not live")
        write_and_compare(3)


def check_ext4() -> None:
    """Last: it takes the whole namespace."""
    folder = Path("/run/mnt")
    folder.mkdir(exist_ok=True)
    content = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(FILE_BYTES // 32))
    for options in ((), ("--hdr-digest", "--data-digest")):
        with connected(*options):
            run("mkfs.ext4", "-q", "-F", DEVICE)
            for number in range(2):
                run("mount", "-t", "ext4", DEVICE, folder)
                try:
                    if number:
                        if (folder / "file").read_bytes() != content:
                            raise Failed("the file is another")
                    else:
                        (folder / "file").write_bytes(content)
                        os.sync()
                finally:
                    run("umount", folder)
            run("fsck.ext4", "-f", "-n", DEVICE)


CHECKS = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def report(name: str, check) -> None:
    start, message = time.monotonic(), ""
    try:
        check()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"name": name, "passed": not message, "seconds": seconds, "message": message}), flush=True)


if __name__ == "__main__":
    ADDRESS, PORT, NQN, _folder, *_wanted = sys.argv[1:]
    FOLDER = Path(_folder)
    HOSTNQN = "nqn.2026-11.io.kvfs:guest"
    for _name in _wanted:
        report(_name, CHECKS[_name])
    print(REPORT_END, flush=True)
