"""`kvfsctl nvme passthru`: one command as it is, for what no verb does."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.nvme_blocks import number, print_hex_dump
from kvfsctl.nvme_describe import LocationArgument
from kvfsctl.output import JsonOption, fail, print_json, print_table

Dword = Annotated[int, typer.Option(parser=number, metavar="N")]


def passthru(
    location: LocationArgument,
    opcode: Annotated[int, typer.Option("--opcode", "-o", parser=number, metavar="N", help="Such as 0x02.")],
    admin: Annotated[bool, typer.Option("--admin", help="An admin command rather than one of I/O.")] = False,
    namespace_id: Annotated[
        int | None,
        typer.Option(
            "--namespace-id",
            "-n",
            parser=number,
            metavar="N",
            help="Without it: of I/O commands the namespace that is opened, of admin commands 0.",
        ),
    ] = None,
    cdw2: Dword = 0,
    cdw3: Dword = 0,
    cdw10: Dword = 0,
    cdw11: Dword = 0,
    cdw12: Dword = 0,
    cdw13: Dword = 0,
    cdw14: Dword = 0,
    cdw15: Dword = 0,
    data_len: Annotated[
        int, typer.Option("--data-len", "-l", parser=number, metavar="BYTES", help="Of the command's data.")
    ] = 0,
    is_read: Annotated[bool, typer.Option("--read", "-r", help="Data come from the drive.")] = False,
    is_write: Annotated[bool, typer.Option("--write", "-w", help="Data go to the drive.")] = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input-file",
            "-i",
            metavar="FILE",
            help="The data to send, else standard input; with --read where they go.",
        ),
    ] = None,
    prefill: Annotated[
        int, typer.Option("--prefill", "-p", parser=number, metavar="BYTE", help="Fills the buffer first.")
    ] = 0,
    raw_binary: Annotated[
        bool, typer.Option("--raw-binary", "-b", help="Data to standard output as they are.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-d", help="Check and show the command, send nothing.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also what may change a device in use, or one that holds a kvfs drive."),
    ] = False,
    json_output: JsonOption = False,
):
    """Send one command, after a check of its lengths against what the command itself says.

    The opcode says which way data go (bits 1:0); --read and --write must agree with it. Refused are commands
    beyond the drive's transfer limit and those that only a driver may send.
    """
    from kvfs.nvme.device import open_device
    from kvfs.nvme.raw_command import RawCommand

    dwords = {"cdw2": cdw2, "cdw3": cdw3, "cdw10": cdw10, "cdw11": cdw11}
    dwords |= {"cdw12": cdw12, "cdw13": cdw13, "cdw14": cdw14, "cdw15": cdw15}
    if not 0 <= prefill <= 0xFF:
        raise typer.BadParameter(f"a byte is 0 to 255, not {prefill}", param_hint="--prefill")
    raw = RawCommand(opcode, admin, namespace_id, data_bytes=data_len, dwords=tuple(dwords.items()))
    if (is_read and not raw.reads) or (is_write and not raw.writes):
        given = "--read" if is_read else "--write"
        raise typer.BadParameter(f"opcode {opcode:#04x} moves data another way", param_hint=given)
    with open_device(location, read_only=raw.reads or dry_run) as device:
        device.check(raw)
        if dry_run:
            _show(raw, device.nsid, json_output)
            return
        if not force and not raw.changes_nothing:
            device.check_free()
        data = _buffer(raw, input_file, prefill)
        result = device.run(raw, data)
    answer = data.tobytes() if raw.reads else b""
    if raw.reads and input_file is not None:
        try:
            input_file.write_bytes(answer)
        except OSError as error:
            fail(f"{input_file}: {error.strerror}")
    if json_output:
        print_json("nvme passthru", location=location, opcode=opcode, cdw0=result, data=answer.hex())
    elif raw_binary:
        sys.stdout.buffer.write(answer)
        sys.stdout.flush()
    else:
        print(f"{'admin' if admin else 'I/O'} command {opcode:#04x}: success, result {result:#010x}")
        if answer and input_file is None:
            print_hex_dump(answer)


def _buffer(raw, input_file: Path | None, prefill: int):
    """uint8 [data_bytes], or None; of a command that sends data with them in it."""
    from kvfs.nvme.device import new_buffer

    if not raw.data_bytes:
        return None
    payload = b""
    if raw.writes:
        try:
            payload = sys.stdin.buffer.read() if input_file is None else input_file.read_bytes()
        except OSError as error:
            fail(f"{input_file}: {error.strerror}")
    if len(payload) > raw.data_bytes:
        fail(f"{len(payload)} bytes of data for a command of {raw.data_bytes}")
    return new_buffer(raw.data_bytes, payload, prefill)


def _show(raw, nsid: int, json_output: bool) -> None:
    entry = raw.entry(nsid)[0]
    names = ("opcode", "flags", "nsid", "cdw2", "cdw3", *(f"cdw{i}" for i in range(10, 16)))
    if json_output:
        fields = {name: int(entry[name]) for name in names}
        print_json("nvme passthru", dry_run=True, **fields, data_len=raw.data_bytes)
    else:
        rows = [[name, f"{int(entry[name]):#x}"] for name in names]
        print_table("not sent", ["field", "value"], [*rows, ["data length", f"{raw.data_bytes:,} bytes"]])
