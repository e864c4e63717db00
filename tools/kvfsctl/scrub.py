"""`kvfsctl scrub`: read everything before anybody needs it."""

import sys

from kvfsctl.opening import drives_of, open_inspection
from kvfsctl.output import EXIT_DAMAGED, DriveArgument, JsonOption, print_json, progress_bar


def scrub(drive: DriveArgument, json_output: JsonOption = False):
    """Read every page of the drive, repair what parity can, and name what is lost.

    What only parity could give back is written anew elsewhere, so that the next fault costs nothing. Each
    block that is lost is one line: whose it is, and which tokens it held. `kvfsctl check --repair` cuts
    sequences to what is whole of them. Run it every few weeks: flash forgets what is never read.

    Of a set each drive is scrubbed. Exit code 3 when something is lost.
    """
    found = [_scrub(one, json_output) for one in drives_of(drive)]
    if json_output and len(found) == 1:
        print_json("scrub", **found[0])
    elif json_output:
        print_json("scrub", set=str(drive), drives=found)
    if any(one["lost"] for one in found):
        sys.exit(EXIT_DAMAGED)


def _scrub(drive, json_output: bool) -> dict:
    """One drive; what JSON says of it."""
    from kvfs.scrub import verify_all

    with open_inspection(drive, read_only=False) as inspection:
        num_blocks, lost = 0, []
        with progress_bar("scrubbing") as progress:
            for step in verify_all(inspection.namespace):
                num_blocks = step.num_lbas
                lost += [(lba, inspection.owner(lba)) for lba in step.lost]
                progress(step.num_lbas, step.total_lbas)
            num_repaired = int(inspection.flash.health()["repaired_pages"])
            num_renewed = inspection.flash.renew() if num_repaired else 0
        num_bytes = num_blocks * inspection.namespace.block_bytes
    if not json_output:
        _print(drive, num_bytes, num_repaired, num_renewed, lost)
    return {
        "drive": str(drive),
        "blocks_read": num_blocks,
        "bytes_read": num_bytes,
        "blocks_repaired": num_repaired,
        "superblocks_renewed": num_renewed,
        "lost": [{"lba": lba, **owner.as_dict()} for lba, owner in lost],
    }


def _print(drive, num_bytes: int, num_repaired: int, num_renewed: int, lost: list) -> None:
    from kvfs.sizes import format_size

    for lba, owner in lost:
        print(f"LBA {lba} is lost: {owner.text}")
    repaired = f", {num_repaired} repaired and {num_renewed} superblocks written anew" if num_repaired else ""
    print(f"{drive}: read {format_size(num_bytes)}{repaired}, {len(lost) or 'no'} blocks lost")
