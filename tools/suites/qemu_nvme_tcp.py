"""Linux's NVMe/TCP initiator against `kvfsctl serve`: python tools/suites/qemu_nvme_tcp.py

Boots Debian's kernel under QEMU, whose user-mode network reaches this machine's loopback, and runs the checks
of nvme_tcp_guest.py there: discover, connect with and without digests, ext4, log pages, resets, and attention
by `nvme io-passthru`, to be answered as the embedded drive did. Needs what qemu_nvme.py needs, and nvme-cli and
e2fsprogs. Exit code 1 if a check failed.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from nvme_tcp_guest import CHECKS, REPORT_END
from qemu_nvme import TOOLS, Check, boot, fetch_kernel, find_kernel, parse_report

import kvfs

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).with_name("nvme_tcp_guest.py")
MODULES = ["virtio_pci", "9pnet_virtio", "9p", "virtio_net", "crc32c_generic", "nvme_tcp", "ext4"]
DEVICES = ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"]
MORE_TOOLS = {"nvme": "nvme-cli", "mkfs.ext4": "e2fsprogs", "ip": "iproute2"}
NQN = "nqn.2026-11.io.kvfs:linux"
HOST_ADDRESS = "10.0.2.2"  # of this machine, seen from there
NETWORK = "ip link set lo up; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up"


class Served:
    """A `kvfsctl serve` process, its log beside the drive."""

    def __init__(self, drive: Path):
        with open(f"{drive}.log", "wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "kvfsctl", "serve", str(drive), "--listen", "127.0.0.1:0"),
                    *("--nqn", NQN, "--cache-bytes", "32MiB", "--json"),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        text = ""
        for line in self.process.stdout:
            text += line
            if line.startswith("}"):
                break
        if not text:
            sys.exit(Path(f"{drive}.log").read_text())
        self.port = json.loads(text)["port"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()


def make_drive(folder: Path) -> Path:
    """A drive with a sequence, and files `descriptor` and `answer`: a command over it and its right answer."""
    drive = folder / "drive.kvfs"
    kvfs.format(drive, "256MiB")
    rng = np.random.default_rng(5)
    with kvfs.open(drive, cache_bytes="16MiB") as store:
        model = store.add_model("m", num_layers=1, num_query_heads=8, num_kv_heads=2, head_dim=64)
        sequence = store.create_sequence(model, "s")
        rows = rng.standard_normal((1000, 2, 64), np.float32).astype(np.float16)
        sequence.append(0, rows, rows[::-1].copy())
        sequence.flush()
        namespace = store._namespace
        submit, fetch = namespace.attention_submit, namespace.attention_fetch

        def recording_submit(descriptor):
            (folder / "descriptor").write_bytes(descriptor.tobytes())
            return submit(descriptor)

        def recording_fetch(ticket, answer_bytes):
            answer = fetch(ticket, answer_bytes)
            (folder / "answer").write_bytes(answer.tobytes())
            return answer

        namespace.attention_submit, namespace.attention_fetch = recording_submit, recording_fetch
        queries = rng.standard_normal((1, 1, 8, 64), np.float32).astype(np.float16)
        store.attend(0, queries, [sequence])
    return drive


def run_checks(arguments, wanted: list[str]) -> list[Check]:
    kernel = find_kernel(arguments.kernel.resolve()) if arguments.kernel else fetch_kernel(arguments.cache)
    with tempfile.TemporaryDirectory(prefix="kvfs-qemu-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        drive = make_drive(folder)
        with closing(Served(drive)) as served:
            settings = {"HOME": "/run", "TMPDIR": "/run", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
            settings["PYTHONDONTWRITEBYTECODE"] = "1"
            facts = [HOST_ADDRESS, str(served.port), NQN, str(folder)]
            # the guest's script needs no packages: this machine's own Python starts sooner
            guest = [
                "env",
                *(f"{k}={v}" for k, v in settings.items()),
                sys.executable,
                "-S",
                GUEST,
                *facts,
                *wanted,
            ]
            command = f"{NETWORK}; cd /run && {shlex.join(map(str, guest))} >/dev/ttyS1 2>/dev/ttyS0"
            report, console = boot(
                kernel, command, folder, arguments.timeout, sys.stderr.isatty(), MODULES, DEVICES
            )
        if arguments.console or REPORT_END not in report:
            print(console[-20000:], Path(f"{drive}.log").read_text()[-5000:], file=sys.stderr)
    return parse_report(report, wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvfs"
    parser.add_argument("--cache", type=Path, default=cache, help="for kernel packages (default: %(default)s)")
    parser.add_argument("--kernel", type=Path, help="an unpacked kernel package, instead of Debian's newest")
    parser.add_argument("--only", default="", help="only checks whose name holds this, or one of a,b,c")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for all of it")
    parser.add_argument("--console", action="store_true", help="print the guest's console at the end")
    arguments = parser.parse_args()
    missing = sorted({p for tool, p in {**TOOLS, **MORE_TOOLS}.items() if shutil.which(tool) is None})
    if missing:
        sys.exit(f"needs {', '.join(missing)}: apt-get install {' '.join(missing)}")
    wanted = [name for name in CHECKS if any(part in name for part in arguments.only.split(","))]
    if not wanted:
        sys.exit(f"no such check; there are {', '.join(CHECKS)}")
    started = time.monotonic()
    checks = run_checks(arguments, wanted)
    for check in checks:
        print(
            f"{check.name:18} {'passed' if check.passed else 'FAILED'} {check.seconds:6.1f} s  {check.message}"
        )
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks)} checks, {failed} failed, {time.monotonic() - started:.1f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
