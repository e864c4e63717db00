"""The checks of qemu_nvme.py, which runs this inside its virtual machine: python nvme_guest.py CHECK...

They overwrite the drives with the serial numbers below. Each prints a line of JSON, and REPORT_END comes last.
Outside, `--compile` makes Numba's kernels for them.
"""

import faulthandler
import fcntl
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np

from ftl.geometry import Geometry
from spdk_glue import command, dma
from spdk_glue.namespace import BlockNamespace
from spdk_glue.status import ConnectionLost, NamespaceInUse, NvmeStatusError
from spdk_glue.transports.linux import LinuxTransport
from spdk_glue.transports.url import open_transport

PLAIN, ZONED = "KVFSPLAIN", "KVFSZONED"
GEOMETRY = Geometry(num_channels=4, pages_per_erase_block=64, num_superblocks=32)  # of the kvfs drive
REPORT_END = "REPORT END"
CONTROLLERS = Path("/sys/class/nvme")
PATIENCE_SECONDS, HANG_SECONDS = 60.0, 120.0
BLKRRPART = 0x125F  # read the partition table again
NUM_RESETS = 5
BUSY_COMMANDS = 4000  # of each transfer during which something happens to the drive


@dataclass
class Check:
    name: str
    passed: bool
    seconds: float
    message: str

    def as_dict(self) -> dict:
        return asdict(self)


def wait_for(find, what: str):
    """What `find` returns, once it does."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not (found := find()):
        if time.monotonic() > give_up:
            raise FileNotFoundError(what)
        time.sleep(0.1)
    return found


def controller(serial: str) -> Path:
    def find():
        with suppress(OSError):  # they come and go
            return next(
                (p for p in CONTROLLERS.iterdir() if (p / "serial").read_text().strip() == serial), None
            )

    return wait_for(find, f"no NVMe controller {serial}")


def character(serial: str, number: int = 1) -> str:
    """/dev/ng0n1; Linux numbers namespaces from 1 on, whatever their identifiers."""
    name = f"ng{controller(serial).name.removeprefix('nvme')}n{number}"
    path = Path("/dev") / name
    wait_for(lambda: path.exists() and path.with_name(f"nvme{name[2:]}").exists(), f"no {path}")
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
    node, disk = Path(character(PLAIN)), block(PLAIN)
    hidden = node.with_name("hidden")
    node.rename(hidden)
    try:
        transport = LinuxTransport.open(disk)
        assert not transport.uses_uring
        transport.close()
        return conformance(disk, "linux and not ioctl")
    finally:
        hidden.rename(node)


@contextmanager
def namespace_of(location: str, **options):
    from spdk_glue.namespace import BlockNamespace

    namespace = BlockNamespace(LinuxTransport.open(location, **options))
    try:
        yield namespace
    finally:
        namespace.close()


def write_and_find(opened) -> str:
    """opened(how_media, how_ftl, *arguments): the flash translation layer over a medium, made so."""
    from ftl.translation import FlashTranslationLayer  # only now: it takes long on an emulated machine

    num_pages = 2000
    data, found = (dma.allocate(num_pages * GEOMETRY.page_size) for _ in range(2))
    data[:] = np.random.default_rng(1).integers(0, 256, data.size, np.uint8)
    lbas = np.random.default_rng(2).permutation(4000)[:num_pages]
    with opened("create", FlashTranslationLayer.format) as ftl:
        ftl.write(lbas, dma.page_addresses(data, GEOMETRY.page_size))
        ftl.deallocate([(lbas[0], 1)])
        ftl.flush()
    with opened("open", FlashTranslationLayer.open) as ftl:
        ftl.read(lbas, dma.page_addresses(found, GEOMETRY.page_size))
    assert not found[: GEOMETRY.page_size].any()
    np.testing.assert_array_equal(found[GEOMETRY.page_size :], data[GEOMETRY.page_size :])
    return f"{num_pages} pages of {GEOMETRY.page_size} bytes written, found again after opening anew"


def check_drive() -> str:
    """A kvfs drive: format, write, close, open, read."""
    from ftl.media_namespace import NamespaceMedia

    @contextmanager
    def opened(how, layer):
        with ExitStack() as closing:
            namespace = BlockNamespace(open_transport(character(PLAIN)))
            media = (
                NamespaceMedia.create(namespace, GEOMETRY)
                if how == "create"
                else NamespaceMedia.open(namespace)
            )
            closing.callback(media.close)
            ftl = layer(media)
            closing.callback(ftl.close)
            yield ftl

    return write_and_find(opened)


def store_and_find(location: str) -> str:
    """A KV cache at a location: format, append, close, open, read."""
    import kvfs

    geometry = {"num_layers": 2, "num_query_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    num_tokens = 1000
    shape = (geometry["num_layers"], num_tokens, geometry["num_kv_heads"], geometry["head_dim"])
    keys = np.random.default_rng(5).standard_normal(shape).astype(np.float16)
    kvfs.format(location, "256MiB", overwrite=True)
    with kvfs.open(location) as store:
        sequence = store.create_sequence(store.add_model("m", **geometry), "s")
        for layer in range(geometry["num_layers"]):
            sequence.append(layer, keys[layer], -keys[layer])
        sequence.flush()
    with kvfs.open(location) as store:
        for layer in range(geometry["num_layers"]):
            found_keys, found_values = store.sequence("s").read(layer, 0, num_tokens)
            np.testing.assert_array_equal(found_keys, keys[layer])
            np.testing.assert_array_equal(found_values, -keys[layer])
    return f"{location}: {num_tokens} tokens written, found again after opening anew"


def check_store() -> str:
    return store_and_find(character(PLAIN))


def check_store_small_blocks() -> str:
    return store_and_find(block(PLAIN, 2))


def check_store_zoned() -> str:
    """Zones are the superblocks; what needs random writes is logged in the first of them."""
    return store_and_find(character(ZONED))


def compile_kernels() -> None:
    """The same in memory and in a file: on the host, so that the guest finds Numba's kernels in the cache."""
    from ftl.media_memory import MemoryMedia

    media = MemoryMedia(GEOMETRY)

    @contextmanager
    def opened(how, layer):
        ftl = layer(media)
        yield ftl
        ftl.close()

    write_and_find(opened)
    with tempfile.TemporaryDirectory() as folder:
        store_and_find(f"{folder}/drive.kvfs")


def refusal(location: str) -> str:
    try:
        LinuxTransport.open(location).close()
    except NamespaceInUse as error:
        return str(error)
    raise AssertionError(f"{location} was taken although it is in use")


def make_partition(disk: str) -> None:
    """One of Linux's type, from block 256 on: an MBR counts in blocks of the drive."""
    first_lba, num_lbas = 256, 1 << 14
    record = bytes(446) + struct.pack("<4xB3xII", 0x83, first_lba, num_lbas) + bytes(48) + b"\x55\xaa"
    fd = os.open(disk, os.O_RDWR)
    os.write(fd, record)
    os.fsync(fd)
    fcntl.ioctl(fd, BLKRRPART)
    os.close(fd)
    wait_for(Path(f"{disk}p1").exists, f"no partition on {disk}")


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
    make_partition(disk)
    subprocess.run(["mkfs.ext4", "-q", "-F", f"{disk}p1"], **tool)
    subprocess.run(["mount", f"{disk}p1", mountpoint], **tool)
    said.append(refusal(location))
    subprocess.run(["umount", mountpoint], **tool)
    subprocess.run(["wipefs", "--quiet", "--all", disk], **tool)
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
    words = ["nvme0n1 is mounted at /run/mounted", "p1 is mounted at /run/mounted", "is in use for swapping"]
    words += ["cannot be had alone", "cannot be had alone"]
    for line, word in zip(said, words, strict=True):
        assert word in line, line
    with namespace_of(location), namespace_of(location, alone=False) as looking:
        looking.read(0, 1)
    return "mounted, partition mounted, swap, claimed, open in kvfs"


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
    invalid_write = 0x1BC  # zone invalid write
    reset_all = 4 | 1 << 8
    with namespace_of(character(ZONED)) as namespace:
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


def write_and_read(namespace, is_told_to_end) -> None:
    """Scattered blocks, a new byte in all of them every turn."""
    size = namespace.block_bytes
    data, found = (dma.allocate(BUSY_COMMANDS * size) for _ in range(2))
    for turn in count(1):
        data[:] = turn & 0xFF
        for call, memory in ((namespace.write_scattered, data), (namespace.read_scattered, found)):
            call([(2 * i, memory[i * size : (i + 1) * size]) for i in range(BUSY_COMMANDS)])
        np.testing.assert_array_equal(found, data)
        if is_told_to_end():
            return


def submit_and_wait(namespace, is_told_to_end) -> None:
    size = namespace.block_bytes
    data = dma.allocate(256 * size)
    while not is_told_to_end():
        namespace.complete(namespace.submit_write([(i, data[i * size : (i + 1) * size]) for i in range(256)]))


def during(work, location: str, event, **options) -> list[BaseException]:
    """What goes wrong with work on a namespace while something happens to its drive."""
    ends, failures = threading.Event(), []

    def run():
        try:
            with namespace_of(location, **options) as namespace:
                work(namespace, ends.is_set)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(2)
    assert thread.is_alive(), failures
    event()
    thread.join(10)
    ends.set()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive(), "a transfer hangs"
    return failures


WAYS = {
    "io_uring": (write_and_read, True),
    "submitted": (submit_and_wait, True),
    "ioctl": (write_and_read, False),
    "submitted by ioctl": (submit_and_wait, False),
}


def check_reset() -> str:
    """Resets of the controller cancel what is under way: it is sent again, and no data are wrong."""
    controller_reset = controller(PLAIN) / "reset_controller"

    def reset():
        for _ in range(NUM_RESETS):
            with suppress(OSError):  # one is going on
                controller_reset.write_text("1")
            time.sleep(0.3)

    for way, (work, use_uring) in WAYS.items():
        print("reset,", way, file=sys.stderr, flush=True)
        failures = during(work, character(PLAIN), reset, use_uring=use_uring)
        assert failures == [], (way, failures)
    return f"{NUM_RESETS} times each, all went on: {'; '.join(WAYS)}"


def check_removal() -> str:
    """A drive that is pulled out is one clear error, and everything can be closed."""
    for way, (work, use_uring) in WAYS.items():
        print("removal,", way, file=sys.stderr, flush=True)
        remove = controller(PLAIN) / "device/remove"
        failures = during(
            work, character(PLAIN), lambda remove=remove: remove.write_text("1"), use_uring=use_uring
        )
        assert [type(error) for error in failures] == [ConnectionLost], (way, failures)
        Path("/sys/bus/pci/rescan").write_text("1")
    with namespace_of(character(PLAIN)) as namespace:  # it is back
        namespace.read(0, 1)
    return str(failures[0])


CHECKS = {
    "character": check_character,
    "block": check_block,
    "small-blocks": check_small_blocks,
    "block-alone": check_block_alone,
    "drive": check_drive,
    "store": check_store,
    "store-small": check_store_small_blocks,
    "memory": check_memory,
    "zoned": check_zoned,
    "store-zoned": check_store_zoned,
    "refusals": check_refusals,
    "unprivileged": check_unprivileged,
    "reset": check_reset,
    "removal": check_removal,  # the last: the drive is gone then
}


def main() -> None:
    for name in sys.argv[1:]:
        started = time.monotonic()
        faulthandler.dump_traceback_later(HANG_SECONDS)  # to the console
        try:
            message, passed = CHECKS[name](), True
        except BaseException as error:
            traceback.print_exc()
            message, passed = f"{type(error).__name__}: {error}"[:500], False
        check = Check(name, passed, round(time.monotonic() - started, 1), message)
        print(json.dumps(check.as_dict()), flush=True)
    print(REPORT_END, flush=True)


if __name__ == "__main__":
    compile_kernels() if sys.argv[1:] == ["--compile"] else main()
