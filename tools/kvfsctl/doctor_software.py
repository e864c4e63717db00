"""Checks of `kvfsctl doctor`: Python, packages, native code, SPDK, FUSE, io_uring."""

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Callable

from kvfsctl.doctor_check import MISSING, OK, OPTIONAL, Finding, Machine, verdict

PYTHON_MIN = (3, 11)
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)([^;]*)(?:;.*extra == ['\"](\w+)['\"])?")
EXTRAS = {"transformers": "Transformers plug-in, demo", "plot": "plots"}  # not `test`
IO_URING_SWITCH = "proc/sys/kernel/io_uring_disabled"


def python(machine: Machine) -> list[Finding]:
    found = ".".join(map(str, machine.python))
    todo = f"install Python {'.'.join(map(str, PYTHON_MIN))} or newer, then: make setup"
    return [verdict("Python", machine.python >= PYTHON_MIN, found, todo, MISSING)]


def kernel(machine: Machine) -> list[Finding]:
    release = machine.text("proc/sys/kernel/osrelease").strip()
    found = f"Linux {release}, {platform.machine()}"
    return [verdict("kernel", bool(release), found if release else "not Linux", "use Linux", MISSING)]


def requirements() -> list[str]:
    """As setup.py has them: `numpy>=1.26`, `torch==2.13.0; extra == "transformers"`."""
    return importlib.metadata.requires("kvfs") or []


def packages(machine: Machine, wanted: list[str] | None = None) -> list[Finding]:
    """A line for those that kvfs needs, for each group of optional ones, and for each that is not right."""
    groups: dict[str, list[str]] = {}
    findings = []
    for requirement in requirements() if wanted is None else wanted:
        name, limits, extra = REQUIREMENT.match(requirement).groups()
        if extra and extra not in EXTRAS:
            continue
        version = machine.version(name)
        if version is not None and is_within(version, limits):
            groups.setdefault(extra or "", []).append(f"{name} {version}")
            continue
        found = "not installed" if version is None else f"{version}, wanted {limits.strip()}"
        purpose = f"for {EXTRAS[extra]}" if extra else "kvfs needs it"
        todo = f"{purpose}: pip install '{name}{limits.strip()}'"
        findings.append(Finding(f"package {name}", OPTIONAL if extra else MISSING, found, todo))
    titles = {"": "packages", **{extra: f"packages: {what}" for extra, what in EXTRAS.items()}}
    return [Finding(titles[extra], OK, ", ".join(found)) for extra, found in groups.items()] + findings


def is_within(version: str, limits: str) -> bool:
    """Whether a version meets limits such as `>=1.26,<2`, by its numbers alone."""
    for limit in filter(None, limits.replace(" ", "").split(",")):
        operator, wanted = re.match(r"([<>=!~]+)(.*)", limit).groups()
        have, want = _numbers(version), _numbers(wanted)
        width = max(len(have), len(want))
        have, want = (numbers + (0,) * (width - len(numbers)) for numbers in (have, want))
        holds = {">=": have >= want, "<": have < want, "==": have == want, ">": have > want, "<=": have <= want}
        if not holds.get(operator, True):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def native_code(machine: Machine) -> list[Finding]:
    """Whether kvfs with its compiled parts can be imported."""
    try:
        import kvfs

        _ = kvfs.Store  # loads all that a drive takes
    except ImportError as error:
        return [Finding("kvfs", MISSING, f"does not load: {error}", "install it again: make setup")]
    return [Finding("kvfs", OK, f"{kvfs.__version__}, compiled parts load")]


def io_uring(machine: Machine, works: Callable[[], bool] | None = None) -> list[Finding]:
    if works is None:
        from kvfs.machine import io_uring_works as works
    if works():
        return [Finding("io_uring", OK, "works")]
    if machine.text(IO_URING_SWITCH).strip() not in ("", "0"):
        return [
            Finding("io_uring", OPTIONAL, "switched off", "faster files: sysctl kernel.io_uring_disabled=0")
        ]
    todo = "faster files: Linux 5.6 or newer, and a container policy that lets io_uring through"
    return [Finding("io_uring", OPTIONAL, "refused by the kernel or the container", todo)]


def fuse(machine: Machine) -> list[Finding]:
    has_device = (machine.root / "dev/fuse").exists()
    helper = machine.which("fusermount3")
    return [
        verdict("FUSE", has_device, "/dev/fuse" if has_device else "no /dev/fuse", "to mount: modprobe fuse"),
        verdict(
            "fusermount3",
            helper is not None,
            helper or "not found",
            "to mount: apt-get install fuse3 (as root)",
        ),
    ]


def leftovers(machine: Machine, found: Callable[[], list] | None = None) -> list[Finding]:
    """What killed servers have left here."""
    if found is None:
        from kvfs.administration.leftovers import machine_leftovers as found
    left = found()
    text = ", ".join(f"{each.kind} {each.path}" for each in left) or "nothing"
    return [verdict("leftovers", not left, text, "remove them: kvfsctl leftovers --clean")]


def fio(machine: Machine) -> list[Finding]:
    path = machine.which("fio")
    return [verdict("fio", path is not None, path or "not found", "limits in benchmarks: apt-get install fio")]


def spdk(machine: Machine, usable: Callable[[], tuple[bool, str]] | None = None) -> list[Finding]:
    if usable is None:
        from kvfs.machine import spdk_usable as usable
    version = _spdk_version(machine)
    works, why = usable()
    installed = f"SPDK {version}" if version else "SPDK as pkg-config knows it: none"
    todo = f"for spdk: locations: {why}"
    return [verdict("SPDK", works, installed if works else f"{installed}, pyspdk not usable", todo)]


def _spdk_version(machine: Machine) -> str | None:
    if machine.which("pkg-config") is None:
        return None
    command = ["pkg-config", "--modversion", "spdk_nvme"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


CHECKS = [kernel, python, packages, native_code, io_uring, fuse, spdk, fio, leftovers]
