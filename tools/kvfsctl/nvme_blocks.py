"""`kvfsctl nvme read` and `write`: blocks of any namespace, as they are."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.nvme_describe import LocationArgument
from kvfsctl.output import fail

ROW_BYTES = 16


def number(text: str | int) -> int:
    """4096 or 0x1000, as nvme-cli takes them. Defaults come as they are."""
    return text if isinstance(text, int) else int(text, 0)


Start = Annotated[int, typer.Option("--start-block", "-s", parser=number, metavar="N", help="The first block.")]
Count = Annotated[
    int | None,
    typer.Option(
        "--block-count",
        "-c",
        parser=number,
        metavar="N",
        help="How many blocks, counted from zero as in nvme-cli: 0 is one block.",
    ),
]
Size = Annotated[
    int | None, typer.Option("--data-size", "-z", parser=number, metavar="BYTES", help="The same in bytes.")
]


def read(
    location: LocationArgument,
    start_block: Start = 0,
    block_count: Count = None,
    data_size: Size = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", metavar="FILE", help="Where to; else standard output.")
    ] = None,
):
    """Read blocks, one where nothing else is said. On a terminal they are shown as a hex dump."""
    from kvfs.nvme.device import open_device

    with open_device(location, read_only=True) as device:
        num_blocks = _num_blocks(device.block_bytes, block_count, data_size) or 1
        pieces = device.read(start_block, num_blocks)
        if data is not None:
            _to_file(pieces, data)
        else:
            _to_stdout(pieces, start_block * device.block_bytes)
    print(f"read: {num_blocks} blocks from {start_block} on", file=sys.stderr)


def write(
    location: LocationArgument,
    start_block: Start = 0,
    block_count: Count = None,
    data_size: Size = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", metavar="FILE", help="What to write; else standard input.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also on a device that is in use, or holds a kvfs drive.")
    ] = False,
):
    """Write whole blocks, as many as the data are.

    A device that is mounted or otherwise in use, or that holds a kvfs drive, is refused without --force.
    """
    from kvfs.nvme.device import open_device

    if data is None and sys.stdin.isatty():
        raise typer.BadParameter("give a file, or data on standard input", param_hint="--data")
    try:
        payload = sys.stdin.buffer.read() if data is None else data.read_bytes()
    except OSError as error:
        fail(f"{data}: {error.strerror}")
    with open_device(location) as device:
        wanted = _num_blocks(device.block_bytes, block_count, data_size)
        if wanted is not None and wanted * device.block_bytes != len(payload):
            fail(
                f"{len(payload)} bytes of data where {wanted} blocks of {device.block_bytes} bytes are wanted"
                " (--block-count counts from zero)"
            )
        if not force:
            device.check_free()
        num_blocks = device.write(start_block, payload)
    print(f"write: {num_blocks} blocks from {start_block} on", file=sys.stderr)


def _num_blocks(block_bytes: int, block_count: int | None, data_size: int | None) -> int | None:
    """Blocks that the options ask for; None if they say nothing."""
    if block_count is not None and block_count < 0:
        fail(f"--block-count is not negative: {block_count}")
    if data_size is None:
        return None if block_count is None else block_count + 1
    if data_size <= 0 or data_size % block_bytes:
        fail(f"--data-size {data_size} is not a whole number of {block_bytes}-byte blocks")
    if block_count is not None and (block_count + 1) * block_bytes != data_size:
        fail(f"--data-size {data_size} is not {block_count + 1} blocks (--block-count counts from zero)")
    return data_size // block_bytes


def _to_file(pieces, path: Path) -> None:
    try:
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece.data)
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def _to_stdout(pieces, offset: int) -> None:
    for piece in pieces:
        if sys.stdout.isatty():
            print_hex_dump(piece.tobytes(), offset)
        else:
            sys.stdout.buffer.write(piece.data)
        offset += piece.nbytes
    sys.stdout.flush()


def print_hex_dump(data: bytes, offset: int = 0) -> None:
    """Sixteen bytes a line with their offset; lines that repeat the one before are one `*`."""
    before, starred = None, False
    for start in range(0, len(data), ROW_BYTES):
        row = data[start : start + ROW_BYTES]
        if row == before:
            if not starred:
                print("*")
            starred = True
            continue
        before, starred = row, False
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        print(f"{offset + start:08x}: {row.hex(' '):<{3 * ROW_BYTES}} {letters}")
    print(f"{offset + len(data):08x}")
