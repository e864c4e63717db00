"""`kvfsctl scrub`: read everything before anybody needs it."""

import sys

from kvfsctl.opening import each_drive
from kvfsctl.output import EXIT_DAMAGED, JsonOption, StoreArgument, print_json, progress_bar


def scrub(drive: StoreArgument, json_output: JsonOption = False):
    """Read every page of the drive, repair what parity can, and name what is lost.

    What only parity could give back is written anew elsewhere, so that the next fault costs nothing. Each
    block that is lost is one line: whose it is, and which tokens it held. `kvfsctl check --repair` cuts
    sequences to what is whole of them. Run it every few weeks: flash forgets what is never read.

    A mounted drive stays in use meanwhile. Of a set each drive is scrubbed. Exit code 3 when something is lost.
    """
    found = [_scrub(one, care, json_output) for one, care in each_drive(drive, read_only=False)]
    if json_output and len(found) == 1:
        print_json("scrub", **found[0])
    elif json_output:
        print_json("scrub", set=str(drive), drives=found)
    if any(one["lost"] for one in found):
        sys.exit(EXIT_DAMAGED)


def _scrub(drive, care, json_output: bool) -> dict:
    """One drive; what JSON says of it."""
    from kvfs.administration.scrubbing import scrub as scrub_drive

    with progress_bar("scrubbing") as progress:
        found = scrub_drive(care, progress)
    num_bytes = found.blocks_read * found.block_bytes
    if not json_output:
        _print(drive, num_bytes, found.blocks_repaired, found.superblocks_renewed, found.lost)
    return {
        "drive": str(drive),
        "blocks_read": found.blocks_read,
        "bytes_read": num_bytes,
        "blocks_repaired": found.blocks_repaired,
        "superblocks_renewed": found.superblocks_renewed,
        "lost": found.lost,
    }


def _print(drive, num_bytes: int, num_repaired: int, num_renewed: int, lost: list[dict]) -> None:
    from kvfs.sizes import format_size

    for block in lost:
        print(f"LBA {block['lba']} is lost: {block['text']}")
    repaired = f", {num_repaired} repaired and {num_renewed} superblocks written anew" if num_repaired else ""
    print(f"{drive}: read {format_size(num_bytes)}{repaired}, {len(lost) or 'no'} blocks lost")
