"""The checks of qemu_nvme.py, which runs this inside its virtual machine: python nvme_guest.py CHECK...

They overwrite the drives with the serial numbers below. Each prints a line of JSON, and REPORT_END comes last.
"""

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PLAIN, ZONED = "KVFSPLAIN", "KVFSZONED"
REPORT_END = "REPORT END"
CONTROLLERS = Path("/sys/class/nvme")
BUSY_COMMANDS = 4000  # of each transfer during which something happens to the drive


@dataclass
class Check:
    name: str
    passed: bool
    seconds: float
    message: str

    def as_dict(self) -> dict:
        return asdict(self)


def controller(serial: str) -> Path:
    for path in CONTROLLERS.iterdir():
        if (path / "serial").read_text().strip() == serial:
            return path
    raise FileNotFoundError(f"no NVMe controller {serial}")


def character(serial: str, number: int = 1) -> str:
    """/dev/ng0n1; Linux numbers namespaces from 1 on, whatever their identifiers."""
    name = f"ng{controller(serial).name.removeprefix('nvme')}n{number}"
    path = Path("/dev") / name
    give_up = time.monotonic() + 30
    while not path.exists() and time.monotonic() < give_up:
        time.sleep(0.1)
    return str(path)


def block(serial: str, number: int = 1) -> str:
    return character(serial, number).replace("/ng", "/nvme")


def conformance(location: str, kinds: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
    ]
    command += ["--tb=short", "-k", kinds, "tests/conformance/test_transports.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"KVFS_TEST_NVME": location}, timeout=1200
    )
    summary = done.stdout.strip().splitlines()[-1:]
    if done.returncode or "skipped" in summary[0]:
        sys.stderr.write(done.stdout + done.stderr)
        raise AssertionError(f"{location}: {summary}")
    return f"{location}: {summary[0]}"


def check_character() -> str:
    return conformance(character(PLAIN), "linux")


def check_block() -> str:
    return conformance(block(PLAIN), "linux and not ioctl")


def check_small_blocks() -> str:
    """Another namespace than the first, with identifier 3."""
    return conformance(character(PLAIN, 2), "linux")


def check_block_alone() -> str:
    """Where there is no character device, as before Linux 5.13."""
    from spdk_glue.transports.linux import LinuxTransport

    node = Path(character(PLAIN))
    hidden = node.with_name("hidden")
    node.rename(hidden)
    try:
        transport = LinuxTransport.open(block(PLAIN))
        assert not transport.uses_uring
        transport.close()
        return conformance(block(PLAIN), "linux and not ioctl")
    finally:
        hidden.rename(node)


@contextmanager
def namespace_of(location: str, **options):
    from spdk_glue.namespace import BlockNamespace
    from spdk_glue.transports.linux import LinuxTransport

    namespace = BlockNamespace(LinuxTransport.open(location, **options))
    try:
        yield namespace
    finally:
        namespace.close()


def check_drive() -> str:
    """A kvfs drive: format, write, close, open, read."""
    from ftl.geometry import Geometry
    from ftl.media_namespace import NamespaceMedia
    from ftl.translation import FlashTranslationLayer
    from spdk_glue import dma
    from spdk_glue.namespace import BlockNamespace
    from spdk_glue.transports.url import open_transport

    geometry, location = (
        Geometry(num_channels=4, pages_per_erase_block=64, num_superblocks=32),
        character(PLAIN),
    )
    num_pages = 2000
    data = dma.allocate(num_pages * geometry.page_size)
    data[:] = np.random.default_rng(1).integers(0, 256, data.size, np.uint8)
    lbas = np.random.default_rng(2).permutation(4000)[:num_pages]

    @contextmanager
    def opened(how_media, how_ftl, *arguments):
        with ExitStack() as closing:
            media = how_media(BlockNamespace(open_transport(location)), *arguments)
            closing.callback(media.close)
            ftl = how_ftl(media)
            closing.callback(ftl.close)
            yield ftl

    with opened(NamespaceMedia.create, FlashTranslationLayer.format, geometry) as ftl:
        ftl.write(lbas, dma.page_addresses(data, geometry.page_size))
        ftl.deallocate([(lbas[0], 1)])
        ftl.flush()
    found = dma.allocate(data.size)
    with opened(NamespaceMedia.open, FlashTranslationLayer.open) as ftl:
        ftl.read(lbas, dma.page_addresses(found, geometry.page_size))
    gone = geometry.page_size
    assert not found[:gone].any()
    np.testing.assert_array_equal(found[gone:], data[gone:])
    return f"{num_pages} pages of {geometry.page_size} bytes written, found again after opening anew"


def refusal(location: str) -> str:
    from spdk_glue.linux_nvme.node import NamespaceInUse
    from spdk_glue.transports.linux import LinuxTransport

    try:
        LinuxTransport.open(location).close()
    except NamespaceInUse as error:
        return str(error)
    raise AssertionError(f"{location} was taken although it is in use")


def check_refusals() -> str:
    """Mounted, swap, held by another: each refused with a line that says so."""
    location, disk = character(PLAIN), block(PLAIN)
    tool = {"check": True, "stdout": subprocess.DEVNULL}
    mountpoint = Path("/run/mounted")
    mountpoint.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], **tool)
    subprocess.run(["mount", disk, mountpoint], **tool)
    said = [refusal(location)]
    subprocess.run(["umount", mountpoint], **tool)
    subprocess.run(["mkswap", disk], **tool)
    subprocess.run(["swapon", disk], **tool)
    said.append(refusal(location))
    subprocess.run(["swapoff", disk], **tool)
    fd = os.open(disk, os.O_RDONLY | os.O_EXCL)
    said.append(refusal(location))
    os.close(fd)
    with namespace_of(location):
        said.append(refusal(disk))
        assert subprocess.run(["mount", disk, mountpoint], stderr=subprocess.DEVNULL).returncode
        disk_name = Path(disk).name
        Path(disk).rename("/dev/hidden")  # without a block device to claim, the lock still holds
        said.append(refusal(location))
        Path("/dev/hidden").rename(f"/dev/{disk_name}")
    words = (
        "is mounted at /run/mounted",
        "is used as swap",
        "cannot be had alone",
        "cannot be had alone",
        "is open",
    )
    for line, word in zip(said, words, strict=True):
        assert word in line, line
    with namespace_of(location):
        pass
    return "mounted, swap, claimed, open in kvfs"


def check_unprivileged() -> str:
    """Without rights: one line that says which."""
    code = (
        "import os, sys\n"
        "from spdk_glue.transports.linux import LinuxTransport\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: LinuxTransport.open(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, character(PLAIN)], capture_output=True, text=True)
    assert done.stdout.startswith("BadLocation") and "not permitted" in done.stdout, done
    return done.stdout.strip()


def check_memory() -> str:
    """The largest command, from memory that begins anywhere within a page: Linux may not refuse it."""
    from spdk_glue import dma

    with namespace_of(character(PLAIN)) as namespace:
        size = namespace.max_transfer_lbas * namespace.block_bytes
        memory, found = dma.allocate(size + 8192), dma.allocate(size)
        memory[:] = np.random.default_rng(3).integers(0, 256, memory.size, np.uint8)
        for offset in (0, 4, 512, 4092, 3):
            namespace.write(0, memory[offset : offset + size])
            namespace.read_scattered([(0, found)])
            np.testing.assert_array_equal(found, memory[offset : offset + size])
    return f"{size} bytes in one command"


def check_zoned() -> str:
    """The zoned drive answers; writes that are not at a zone's write pointer are errors with their status."""
    from spdk_glue.status import NvmeStatusError

    invalid_write = 0x1BC  # zone invalid write
    reset_all = 4 | 1 << 8
    with namespace_of(character(ZONED)) as namespace:
        from spdk_glue import command

        entry = command.flush()
        entry["opcode"], entry["cdw13"] = 0x79, reset_all  # zone management send
        namespace._run(entry, [None])
        data = np.random.default_rng(4).integers(0, 256, 8 * namespace.block_bytes, np.uint8)
        namespace.write(0, data)
        np.testing.assert_array_equal(namespace.read(0, 8), data)
        try:
            namespace.write(4, data)
        except NvmeStatusError as error:
            assert error.status == invalid_write, hex(error.status)
        else:
            raise AssertionError("the drive took a write before the write pointer")
    return "sequential write, refused rewrite"


def busy_transfers(location: str, until: threading.Event, failures: list, **options) -> None:
    """Writes and reads back until told to end; what goes wrong is in `failures`."""
    from spdk_glue import dma

    with suppress(Exception), namespace_of(location, **options) as namespace:
        size = namespace.block_bytes
        data, found = dma.allocate(BUSY_COMMANDS * size), dma.allocate(BUSY_COMMANDS * size)
        turn = 0
        try:
            while not until.is_set():
                turn += 1
                data[:] = turn & 0xFF
                lbas = range(BUSY_COMMANDS)
                for call, memory in ((namespace.write_scattered, data), (namespace.read_scattered, found)):
                    call([(2 * i, memory[i * size : (i + 1) * size]) for i in lbas])
                np.testing.assert_array_equal(found, data)
        except BaseException as error:
            failures.append(error)


def during_transfers(location: str, event, wait_seconds: float, **options) -> list:
    until, failures = threading.Event(), []
    thread = threading.Thread(target=busy_transfers, args=(location, until, failures), kwargs=options)
    thread.start()
    time.sleep(2)
    assert thread.is_alive(), failures
    event()
    thread.join(wait_seconds)
    until.set()
    thread.join(120)
    assert not thread.is_alive(), "a transfer hangs"
    return failures


def check_reset() -> str:
    """A reset of the controller cancels what is under way: it is sent again, and no data are wrong."""
    reset = controller(PLAIN) / "reset_controller"
    for use_uring in (True, False):
        failures = during_transfers(character(PLAIN), lambda: reset.write_text("1"), 10, use_uring=use_uring)
        assert failures == [], failures
    return "transfers went on, by io_uring and by ioctl"


def check_removal() -> str:
    """A drive that is pulled out is one clear error, and everything can be closed."""
    from spdk_glue.status import ConnectionLost

    failures = during_transfers(
        character(PLAIN), lambda: (controller(PLAIN) / "device/remove").write_text("1"), 60
    )
    assert [type(error) for error in failures] == [ConnectionLost], failures
    return str(failures[0])


CHECKS = {
    "character": check_character,
    "block": check_block,
    "small-blocks": check_small_blocks,
    "block-alone": check_block_alone,
    "drive": check_drive,
    "memory": check_memory,
    "zoned": check_zoned,
    "refusals": check_refusals,
    "unprivileged": check_unprivileged,
    "reset": check_reset,
    "removal": check_removal,  # the last: the drive is gone then
}


def main() -> None:
    for name in sys.argv[1:]:
        started = time.monotonic()
        try:
            message, passed = CHECKS[name](), True
        except BaseException as error:
            traceback.print_exc()
            message, passed = f"{type(error).__name__}: {error}"[:500], False
        check = Check(name, passed, round(time.monotonic() - started, 1), message)
        print(json.dumps(check.as_dict()), flush=True)
    print(REPORT_END, flush=True)


if __name__ == "__main__":
    main()
