"""Run the Linux NVMe transport against emulated drives in a virtual machine: python tools/suites/qemu_nvme.py

Boots Debian's kernel under QEMU with two NVMe controllers (one with a plain namespace of 4096-byte blocks and
one of 512, with identifier 3; one zoned), shares this machine's root with it read-only, and runs the checks of
nvme_guest.py there with this Python. The kernel package is downloaded with apt-get and unpacked into a cache,
not installed. Needs qemu-system-x86, busybox-static, cpio and kmod, and no KVM: it takes minutes.
Exit code 1 if a check failed.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nvme_guest import CHECKS, REPORT_END, Check

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).with_name("nvme_guest.py")
KERNEL_PACKAGE = "linux-image-amd64"  # names the newest as its dependency
MODULES = ["virtio_pci", "9pnet_virtio", "9p", "nvme", "ext4"]
TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "cpio": "cpio", "depmod": "kmod"}
# The emulated drive may lose a command at a reset: it is not to take the kernel's 30 s to find that.
MODULE_OPTIONS = {"nvme-core": "io_timeout=5 admin_timeout=5"}
NUMBA_SETTINGS = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}  # the same on both machines
SHARE = "root"  # mount tag of this machine's root

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /newroot
/bin/busybox mount -t devtmpfs dev /dev
while read module; do /bin/busybox insmod /lib/$module; done </modules
/bin/busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose {share} /newroot
/bin/busybox mount -t proc proc /newroot/proc
/bin/busybox mount -t sysfs sys /newroot/sys
/bin/busybox mount -t devtmpfs dev /newroot/dev
/bin/busybox mount -t tmpfs run /newroot/run
/bin/busybox chroot /newroot /bin/sh -c {command}
/bin/busybox sync
/bin/busybox poweroff -f
"""


@dataclass(frozen=True)
class Kernel:
    image: Path
    modules: Path  # what depmod and modprobe take as their root
    release: str


def run(*command, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        sys.exit(f"{shlex.join(map(str, command))} failed: {' '.join(said)}")
    return done.stdout


def fetch_kernel(cache: Path) -> Kernel:
    """Debian's newest kernel, unpacked once."""
    depends = run("apt-cache", "depends", KERNEL_PACKAGE)
    package = re.search(r"Depends: (linux-image-\S+)", depends)[1]
    unpacked = cache / package
    if not unpacked.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            run("apt-get", "download", package, cwd=scratch)
            archive = next(Path(scratch).glob("*.deb"))
            run("dpkg-deb", "--extract", archive, f"{scratch}/unpacked")
            Path(scratch, "unpacked").rename(unpacked)
    return find_kernel(unpacked)


def find_kernel(unpacked: Path) -> Kernel:
    images = list(unpacked.glob("boot/vmlinuz-*"))
    if not images:
        sys.exit(f"{unpacked}: no boot/vmlinuz-* in it; is it an unpacked kernel package?")
    release = images[0].name.removeprefix("vmlinuz-")
    run("depmod", "--basedir", unpacked, release)
    return Kernel(images[0], unpacked, release)


def compile_kernels(cache: Path) -> Path:
    """Numba's cache with what the guest needs: compiling there takes minutes."""
    folder = cache.resolve() / "numba"
    settings = NUMBA_SETTINGS | {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    run(sys.executable, GUEST, "--compile", env=os.environ | settings)
    return folder


def module_files(kernel: Kernel, modules: list[str]) -> list[Path]:
    """In the order in which they load."""
    shown = [
        line
        for module in modules
        for line in run(
            "modprobe", "--show-depends", "-d", kernel.modules, "-S", kernel.release, module
        ).splitlines()
    ]
    files = [Path(line.split()[1]) for line in shown if line.startswith("insmod ")]
    return list(dict.fromkeys(files))


def build_initramfs(kernel: Kernel, command: str, folder: Path, modules: list[str]) -> Path:
    tree = folder / "initramfs"
    (tree / "bin").mkdir(parents=True)
    (tree / "lib").mkdir()
    shutil.copy2(shutil.which("busybox"), tree / "bin" / "busybox")
    files = module_files(kernel, modules)
    for module in files:
        shutil.copy2(module, tree / "lib")
    lines = [f"{module.name} {MODULE_OPTIONS.get(module.stem, '')}\n" for module in files]
    (tree / "modules").write_text("".join(lines))
    (tree / "init").write_text(INIT.format(share=SHARE, command=shlex.quote(command)))
    (tree / "init").chmod(0o755)
    image = folder / "initramfs.cpio"
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with image.open("wb") as out:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(), stdout=out, check=True
        )
    return image


def drive_options(folder: Path) -> list[str]:
    """Controllers by serial number; nvme_guest.py knows them by it."""
    options = []
    for name, size in (("plain", "512M"), ("small", "512M"), ("zoned", "512M")):
        run("truncate", "--size", size, folder / name)
        options += ["-drive", f"id={name},file={folder / name},if=none,format=raw,discard=unmap"]
    blocks = "logical_block_size=4096,physical_block_size=4096"
    for device in (
        "nvme,id=c0,serial=KVFSPLAIN",
        f"nvme-ns,bus=c0,nsid=1,drive=plain,{blocks}",
        "nvme-ns,bus=c0,nsid=3,drive=small,logical_block_size=512,physical_block_size=512",
        "nvme,id=c1,serial=KVFSZONED",
        f"nvme-ns,bus=c1,nsid=1,drive=zoned,{blocks},zoned=true,zoned.zone_size=8M,zoned.zone_capacity=6M",
    ):
        options += ["-device", device]
    return options


def boot(
    kernel: Kernel,
    command: str,
    folder: Path,
    seconds: float,
    is_verbose: bool,
    modules: list[str],
    devices: list[str],
) -> tuple[str, str]:
    """(what the checks reported, the console). devices: options of QEMU"""
    report, console = folder / "report", folder / "console"
    report.touch()
    line = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3G",
        "-nodefaults", "-no-reboot", "-display", "none",
        "-kernel", kernel.image, "-initrd", build_initramfs(kernel, command, folder, modules),
        "-append", "console=ttyS0 loglevel=7 panic=-1 mitigations=off",
        "-serial", f"file:{console}", "-serial", f"file:{report}",
        "-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", f"virtio-9p-pci,fsdev=root,mount_tag={SHARE}",
        *devices,
    ]  # fmt: skip
    machine = subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE, text=True)
    give_up, shown = time.monotonic() + seconds, 0
    try:
        while machine.poll() is None and time.monotonic() < give_up:
            time.sleep(0.5)
            text = report.read_text(errors="replace")
            if is_verbose:
                print(text[shown:], end="", file=sys.stderr, flush=True)
            shown = len(text)
    finally:
        machine.kill()
        said = machine.communicate()[1]
    return report.read_text(errors="replace"), console.read_text(errors="replace") + said


def parse_report(text: str, wanted: list[str]) -> list[Check]:
    """A check that did not report has failed."""
    lines = [line.strip() for line in text.splitlines()]
    checks = [Check(**json.loads(line)) for line in lines if line.startswith("{")]
    found = {check.name for check in checks}
    checks += [Check(name, False, 0.0, "did not run to its end") for name in wanted if name not in found]
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvfs"
    parser.add_argument("--cache", type=Path, default=cache, help="for kernel packages (default: %(default)s)")
    parser.add_argument("--kernel", type=Path, help="an unpacked kernel package, instead of Debian's newest")
    parser.add_argument("--only", default="", help="only checks whose name holds this, or one of a,b,c")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for all of it")
    parser.add_argument("--console", action="store_true", help="print the guest's console at the end")
    parser.add_argument("--json", action="store_true", dest="json_output")
    arguments = parser.parse_args()
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        sys.exit(f"needs {', '.join(missing)}: apt-get install {' '.join(missing)}")
    wanted = [name for name in CHECKS if any(part in name for part in arguments.only.split(","))]
    if not wanted:
        sys.exit(f"no such check; there are {', '.join(CHECKS)}")
    kernel = find_kernel(arguments.kernel.resolve()) if arguments.kernel else fetch_kernel(arguments.cache)
    kernels = compile_kernels(arguments.cache)
    settings = NUMBA_SETTINGS | {
        "NUMBA_CACHE_DIR": "/run/numba",
        "HOME": "/run",
        "TMPDIR": "/run",
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
    }
    guest = ["env", *(f"{name}={value}" for name, value in settings.items()), sys.executable, GUEST, *wanted]
    command = (
        f"cp -r {shlex.quote(str(kernels))} /run/numba; cd {shlex.quote(str(ROOT))}"
        f" && {shlex.join(map(str, guest))} >/dev/ttyS1 2>/dev/ttyS0"
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvfs-qemu-") as folder:
        report, console = boot(
            kernel,
            command,
            Path(folder),
            arguments.timeout,
            sys.stderr.isatty() and not arguments.json_output,
            MODULES,
            drive_options(Path(folder)),
        )
    checks = parse_report(report, wanted)
    failed = [check for check in checks if not check.passed]
    seconds = round(time.monotonic() - started, 1)
    if arguments.console or REPORT_END not in report:
        print(console, file=sys.stderr)
    if arguments.json_output:
        rows = [check.as_dict() for check in checks]
        print(json.dumps({"suite": "qemu_nvme", "kernel": kernel.release, "checks": rows}, indent=2))
    else:
        for check in checks:
            verdict = "passed" if check.passed else "FAILED"
            print(f"{check.name:14} {verdict} {check.seconds:6.1f} s  {check.message}")
        print(f"Linux {kernel.release}: {len(checks)} checks, {len(failed)} failed, {seconds} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
