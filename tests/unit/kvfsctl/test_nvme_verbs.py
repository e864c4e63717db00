"""kvfsctl nvme over a real drive in this machine's files, as an administrator runs it."""

import json
import os
import random

import numpy as np
import pytest

import kvfs
from kvfs.errors import InUse, InvalidArgument
from kvfs.nvme import device as nvme_device
from kvfs.nvme.device import open_device
from kvfs.nvme.raw_command import RawCommand, check
from tests.unit.kvfsctl.command_line import kvfsctl_binary

BLOCK = 4096


def kvfsctl(*arguments, stdin=b""):
    result = kvfsctl_binary("nvme", *arguments, stdin=stdin)
    assert b"Traceback" not in result.stderr, result.stderr.decode()
    return result


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    path = tmp_path_factory.mktemp("nvme") / "drive.kvfs"
    kvfs.format(path, "48MiB")
    return path


def test_identify(drive):
    """What a drive says: in words, and as integers that agree with the drive."""
    document = json.loads(kvfsctl("identify", f"inproc:{drive}", "--json").stdout)
    controller, namespace = document["controller"], document["namespace"]
    assert controller["mn"] == "kvfs computational drive" and controller["nn"] == 1
    assert controller["attention"]["signature"] == "KVFSATTN"
    assert namespace["lbaf"][0] == {"ms": 0, "lbads": 12, "rp": 0}
    assert namespace["nsze"] * BLOCK > 32 << 20 and namespace["nguid"] == ""
    table = kvfsctl("identify", drive).stdout.decode()
    assert "serial number" in table and controller["sn"] in table
    assert "Dataset Management, Verify" in table and "in use" in table


def test_smart_log(drive):
    document = json.loads(kvfsctl("smart-log", drive, "--json").stdout)
    smart = document["smart"]
    assert (smart["critical_warning"], smart["available_spare"]) == (0, 100)
    assert len(smart["temperature_sensors_kelvin"]) == 8
    table = kvfsctl("smart-log", drive).stdout.decode()
    assert "100 %" in table and "power_on_hours" in table


def test_blocks(drive, tmp_path):
    """What is written is what is read, through files and pipes; neighbours stay."""
    data = os.urandom(3 * BLOCK)
    (tmp_path / "in").write_bytes(data)
    written = kvfsctl("write", drive, "-s", 5000, "-c", 2, "-d", tmp_path / "in", "--force")
    assert (written.returncode, written.stderr) == (0, b"write: 3 blocks from 5000 on\n")
    assert kvfsctl("write", drive, "-s", "0x138b", "-z", BLOCK, "--force", stdin=data[:BLOCK]).returncode == 0
    result = kvfsctl("read", drive, "--start-block", 4999, "--block-count", 5)
    assert result.stdout == bytes(BLOCK) + data + data[:BLOCK] + bytes(BLOCK)
    out = tmp_path / "out"
    assert kvfsctl("read", f"inproc:{drive}", "-s", 5001, "-z", 2 * BLOCK, "-d", out).stdout == b""
    assert out.read_bytes() == data[BLOCK:]
    assert kvfsctl("read", drive, "-s", 5000).stdout == data[:BLOCK]


def test_write_spares_what_is_in_use(drive, monkeypatch):
    """Without --force neither a store nor a mounted device is written: either would be lost."""
    before = kvfsctl("read", drive).stdout
    result = kvfsctl("write", drive, stdin=bytes(BLOCK))
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"holds a kvfs store: --force" in result.stderr
    result = kvfsctl("passthru", drive, "-o", 1, "-w", "-l", BLOCK, stdin=bytes(BLOCK))
    assert result.returncode == 1 and b"--force" in result.stderr
    assert kvfsctl("read", drive).stdout == before
    with open_device(drive) as device:
        monkeypatch.setattr(nvme_device.linux_devices, "why_in_use", lambda location: "mounted at /mnt")
        with pytest.raises(InUse, match="mounted at /mnt"):
            device.check_free()


def test_a_kvfs_drives_flash_is_recognized(tmp_path):
    """A drive's flash on a namespace, a damaged one too, is more than free blocks."""
    outer, inner = tmp_path / "outer.kvfs", tmp_path / "inner.kvfs"
    kvfs.format(outer, "48MiB")
    kvfs.format(inner, "48MiB")
    header = bytearray(inner.read_bytes()[: 2 * BLOCK])
    with open_device(outer) as device:
        device.write(0, bytes(2 * BLOCK))
        assert device.contents() is None
        device.check_free()
        header[100] ^= 1
        device.write(0, bytes(header))
        assert device.contents() == "a kvfs drive"
        header[:BLOCK] = bytes(BLOCK)  # the second copy is left
        device.write(0, bytes(header))
        with pytest.raises(InUse, match="holds a kvfs drive"):
            device.check_free()


def test_open_drive_is_busy(drive):
    """A drive that another process has is refused, with who has it."""
    with kvfs.open(drive, cache_bytes="8MiB", worker="reference"):
        result = kvfsctl("identify", drive)
    assert result.returncode == 1 and str(os.getpid()).encode() in result.stderr


def test_passthru(drive, tmp_path):
    data = os.urandom(2 * BLOCK)
    (tmp_path / "in").write_bytes(data)
    command = ("--cdw10", 6000, "--cdw12", 1, "--data-len", 2 * BLOCK)
    sent = kvfsctl("passthru", drive, "-o", "0x01", *command, "-w", "-i", tmp_path / "in", "--force")
    assert sent.stdout == b"I/O command 0x01: success, result 0x00000000\n"
    read = ("passthru", drive, "-o", "0x02", "--namespace-id", 1, *command, "--read")
    assert kvfsctl(*read, "--raw-binary").stdout == data
    assert kvfsctl(*read, "-i", tmp_path / "out").returncode == 0
    assert (tmp_path / "out").read_bytes() == data
    assert json.loads(kvfsctl(*read, "--json").stdout)["data"] == data.hex()
    dump = kvfsctl(*read).stdout.decode().splitlines()
    assert len(dump) == 1 + 2 * BLOCK // 16 + 1
    assert dump[1].startswith("00000000: " + data[:16].hex(" "))
    dry = json.loads(kvfsctl("passthru", drive, "-o", 1, *command, "--dry-run", "--json").stdout)
    assert (dry["cdw10"], dry["cdw12"], dry["nsid"], dry["dry_run"]) == (6000, 1, 1, True)
    identify = ("--opcode", 6, "--admin", "--cdw10", 1, "-l", 4096, "-r", "-b")
    assert kvfsctl("passthru", drive, *identify).stdout[24:48] == b"kvfs computational drive"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("read", "{drive}", "-s", 1 << 40), 1, "are not all in"),
        (("read", "{drive}", "-c", -1), 1, "not negative"),
        (("read", "{drive}", "-z", 100), 1, "not a whole number"),
        (("read", "{drive}", "-c", 1, "-z", 4096), 1, "counts from zero"),
        (("read", "{drive}", "-d", "/nonexistent/file"), 1, "/nonexistent/file"),
        (("write", "{drive}", "--force"), 1, "not a whole number of 4096-byte blocks"),
        (("write", "{drive}", "--force", "-d", __file__), 1, "not a whole number of 4096-byte blocks"),
        (("write", "{drive}", "--force", "-d", "/nonexistent/file"), 1, "/nonexistent/file"),
        (("read", "/nonexistent/drive"), 1, "no such file"),
        (("identify", "/dev/ng77n1"), 1, "/dev/ng77n1"),
        (("identify", "/dev/nvme0"), 1, "or an NVMe namespace such as"),
        (("passthru", "{drive}", "-o", 2, "-l", 4096, "--cdw12", 1), 1, "says 2 blocks"),
        (("passthru", "{drive}", "-o", 2, "-l", 4096, "--cdw10", 1 << 31), 1, "lba out of range"),
        (("passthru", "{drive}", "-o", 2, "-l", 4096, "-n", 9), 1, "invalid namespace"),
        (("passthru", "{drive}", "-o", 0x7F, "-l", 4096), 1, "Fabrics"),
        (("passthru", "{drive}", "-o", 2, "-l", 4096, "-w"), 2, "moves data another way"),
        (("passthru", "{drive}", "-o", "two"), 2, "--opcode"),
        (("passthru", "{drive}"), 2, "--opcode"),
    ],
)
def test_bad_input_is_one_line(drive, arguments, code, message):
    result = kvfsctl(*(drive if argument == "{drive}" else argument for argument in arguments))
    text = result.stderr.decode()
    assert result.returncode == code and message in text, text
    if code == 1:
        assert text.startswith("kvfsctl: ") and text.count("\n") == 1


# what a raw command is checked for

BAD_COMMANDS = {
    "asynchronous events never complete": RawCommand(0x0C, is_admin=True),
    "queues are the driver's": RawCommand(0x05, is_admin=True, data_bytes=BLOCK),
    "no data for a read": RawCommand(0x02),
    "data for a flush": RawCommand(0x00, data_bytes=BLOCK),
    "both ways": RawCommand(0x83, data_bytes=BLOCK),
    "more than the limit": RawCommand(0x82, data_bytes=(1 << 20) + BLOCK),
    "shorter than the blocks": RawCommand(0x02, data_bytes=BLOCK, dwords=(("cdw12", 1),)),
    "longer than the blocks": RawCommand(0x01, data_bytes=2 * BLOCK),
    "compare": RawCommand(0x05, data_bytes=BLOCK, dwords=(("cdw12", 7),)),
    "zone append": RawCommand(0x7D, data_bytes=BLOCK, dwords=(("cdw12", 7),)),
    "ranges": RawCommand(0x09, data_bytes=16, dwords=(("cdw10", 1),)),
    "a log page": RawCommand(0x02, is_admin=True, data_bytes=512, dwords=(("cdw10", 255 << 16),)),
    "a long log page": RawCommand(0x02, is_admin=True, data_bytes=512, dwords=(("cdw11", 1),)),
    "identify": RawCommand(0x06, is_admin=True, data_bytes=512),
    "an opcode": RawCommand(0x101, data_bytes=BLOCK),
    "a dword": RawCommand(0x02, data_bytes=BLOCK, dwords=(("cdw10", 1 << 32),)),
    "a negative length": RawCommand(0x02, data_bytes=-1),
    "flags": RawCommand(0x02, flags=1, data_bytes=BLOCK),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_dangerous_commands(name):
    """A controller that moves more than its buffer holds writes to other memory."""
    with pytest.raises(InvalidArgument):
        check(BAD_COMMANDS[name], BLOCK, 1 << 20)


def test_metadata_count():
    """Metadata behind each block are data; those apart need a buffer that nobody gave."""
    check(RawCommand(0x02, data_bytes=2 * 520, dwords=(("cdw12", 1),)), 520, 1 << 20)
    with pytest.raises(InvalidArgument):
        check(RawCommand(0x02, data_bytes=2 * 512, dwords=(("cdw12", 1),)), 520, 1 << 20)
    with pytest.raises(InvalidArgument, match="metadata"):
        check(RawCommand(0x02, data_bytes=512), 512, 1 << 20, separate_metadata=True)


def test_what_may_change_a_drive():
    harmless = [RawCommand(0), RawCommand(2), RawCommand(0x0C), RawCommand(6, is_admin=True)]
    harmful = [RawCommand(1), RawCommand(8), RawCommand(9), RawCommand(0x80, is_admin=True)]
    assert all(command.changes_nothing for command in harmless)
    assert not any(command.changes_nothing for command in harmful)
    assert not RawCommand(0x0C, is_admin=True).changes_nothing


def test_no_command_hangs_an_embedded_drive(tmp_path):
    """Any command that passes the check ends, with a status; the drive works on."""
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, "48MiB")
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    sent = 0
    with open_device(path) as device:
        for _ in range(3000):
            raw = RawCommand(
                dice.choice((dice.randrange(256), 1, 2, 6, 9, 0x0C, 0x81, 0x82, 0x84, 0x85, 0x86, 0xC0)),
                is_admin=dice.random() < 0.5,
                nsid=dice.choice((None, 0, 1, 2, 0xFFFFFFFF)),
                data_bytes=dice.choice((0, 0, 1, 4, 512, BLOCK, BLOCK, 2 * BLOCK, 1 << 16)),
                dwords=tuple(
                    (f"cdw{number}", dice.choice((0, 0, 1, 2, 3, 0x02000000, dice.getrandbits(32))))
                    for number in range(10, 16)
                ),
            )
            try:
                device.check(raw)
            except InvalidArgument:
                continue
            data = np.frombuffer(dice.randbytes(raw.data_bytes), np.uint8).copy() if raw.data_bytes else None
            sent += 1
            try:
                device.run(raw, data)
            except kvfs.NvmeStatusError:
                continue
        data = os.urandom(BLOCK)
        device.write(10, data)
        assert b"".join(piece.tobytes() for piece in device.read(10, 1)) == data
    assert sent > 500
