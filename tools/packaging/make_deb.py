"""Make a Debian package of kvfs's wheel: python tools/packaging/make_deb.py kvfs-0.1.0-*.whl OUT [--no-deps]

The wheel and what it needs lie in /usr/lib/kvfs, out of the way of Debian's own Python packages, so installing
the package takes nothing from the network. Beside it: the commands, manual pages, completion, the systemd unit
and /etc/kvfs/kvfs.toml. Runs with the Python that the package is for, where kvfs can be imported.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = "usr/lib/kvfs"
COMMANDS = {
    "usr/bin/kvfsctl": "kvfsctl.main:run",
    "usr/sbin/mkfs.kvfs": "kvfsctl.mount_helpers:mkfs",
    "usr/sbin/fsck.kvfs": "kvfsctl.mount_helpers:fsck",
    "usr/sbin/mount.kvfs": "kvfsctl.mount_helpers:mount",
}
LAUNCHER = """#!/usr/bin/python3
import sys

sys.path.insert(0, "/{library}")
from {module} import {function}

sys.exit({function}())
"""
# What Python and numba have written beside the modules: dpkg knows nothing of it, and would leave the folders.
PRERM = f"""#!/bin/sh
set -e
find /{LIBRARY} -type d -name __pycache__ -prune -exec rm -rf {{}} +
"""
CONTROL = """Package: kvfs
Version: {version}
Architecture: {architecture}
Maintainer: kvfs developers <kvfs@localhost>
Depends: python3 (>= {python}), python3 (<< {next_python}), fuse3, libfuse3-3 | libfuse3-4
Section: admin
Priority: optional
Installed-Size: {kibibytes}
Description: KV cache of language models on flash
 A software computational-storage drive, a file system on it that keeps the
 KV cache of large language models, and kvfsctl to administer both. Decode
 attention is computed where the data lies.
"""


def make(wheel: Path, out: Path, with_dependencies: bool = True) -> Path:
    """The package's file. Raises CalledProcessError where pip or dpkg-deb fails."""
    version = re.match(r"kvfs-([^-]+)-", wheel.name)
    if version is None:
        raise SystemExit(f"{wheel}: not a wheel of kvfs")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        fill(root, wheel, with_dependencies)
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN" / "control").write_text(control(root, version[1]))
        put(root / "DEBIAN" / "prerm", PRERM, 0o755)
        (root / "DEBIAN" / "conffiles").write_text("/etc/kvfs/kvfs.toml\n")
        # zstd: with xz, dpkg's default, this takes minutes
        dpkg_deb = ["dpkg-deb", "--root-owner-group", "-Zzstd", "-z12", "--build"]
        subprocess.run([*dpkg_deb, root, out], check=True, stdout=sys.stderr)
    return next(out.glob(f"kvfs_{version[1]}_*.deb"))


def fill(root: Path, wheel: Path, with_dependencies: bool) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    dependencies = [] if with_dependencies else ["--no-deps"]
    subprocess.run([*pip, *dependencies, "--target", root / LIBRARY, wheel], check=True)
    shutil.rmtree(root / LIBRARY / "bin", ignore_errors=True)  # launchers for the Python that ran pip
    for path in (root / LIBRARY).glob("kvfs-*.dist-info/direct_url.json"):  # where the wheel lay
        path.unlink()
    for path, entry in COMMANDS.items():
        module, _, function = entry.partition(":")
        text = LAUNCHER.format(library=LIBRARY, module=module, function=function)
        put(root / path, text, 0o755)
    unit = (FOLDER.parent / "systemd" / "kvfs@.service").read_text()
    put(root / "usr/lib/systemd/system/kvfs@.service", unit.replace("/usr/local/bin/", "/usr/bin/"))
    put(root / "etc/kvfs/kvfs.toml", (FOLDER / "kvfs.toml").read_text())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / LIBRARY), *filter(None, sys.path)])}
    kvfsctl = [sys.executable, "-m", "kvfsctl"]
    pages = root / "usr/share/man/man1"
    subprocess.run([*kvfsctl, "man", pages], check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run(["gzip", "-9n", *pages.glob("*.1")], check=True)
    completion = subprocess.run(
        [*kvfsctl, "completion", "bash"], check=True, env=environment, capture_output=True, text=True
    )
    put(root / "usr/share/bash-completion/completions/kvfsctl", completion.stdout)
    for cache in root.rglob("__pycache__"):
        shutil.rmtree(cache)


def put(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def control(root: Path, version: str) -> str:
    major, minor = sys.version_info[:2]
    architecture = subprocess.run(
        ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
    ).stdout.strip()
    num_bytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return CONTROL.format(
        version=version,
        architecture=architecture,
        python=f"{major}.{minor}",
        next_python=f"{major}.{minor + 1}",
        kibibytes=-(-num_bytes // 1024),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-deps", action="store_true", help="only kvfs itself: a package for a test")
    arguments = parser.parse_args()
    print(make(arguments.wheel, arguments.out, not arguments.no_deps))
