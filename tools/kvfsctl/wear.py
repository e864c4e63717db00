"""`kvfsctl wear`: how worn the flash is, and how evenly."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfsctl.opening import open_inspection
from kvfsctl.output import DriveArgument, JsonOption, fail, print_json, print_table

if TYPE_CHECKING:
    import numpy as np

MAX_BINS = 16


def wear(
    drive: DriveArgument,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the histogram and a map of the superblocks.")
    ] = None,
    json_output: JsonOption = False,
):
    """Show erase counts against the cycles that the flash is rated for, bad blocks and spare.

    A superblock's count is that of its most worn block. Wear levelling keeps the counts within 5% of the
    rated cycles of each other.
    """

    import numpy as np

    if plot is not None and plot.suffix != ".png":
        raise typer.BadParameter("the plot is a .png file", param_hint="--plot")
    with open_inspection(drive) as inspection:
        superblocks = inspection.flash.superblocks()
        health, smart = inspection.flash.health(), inspection.flash.smart()
    counts = superblocks["erase_count"].astype(np.int64)
    facts = {
        "rated_cycles": int(health["rated_cycles"]),
        "erase_count_min": int(counts.min()),
        "erase_count_mean": float(counts.mean()),
        "erase_count_max": int(counts.max()),
        "percentage_used": int(smart["percentage_used"]),
        "available_spare_percent": int(smart["available_spare"]),
        "num_erase_blocks": int(health["num_erase_blocks"]),
        "bad_erase_blocks": int(health["bad_erase_blocks"]),
    }
    histogram = erase_histogram(counts)
    if json_output:
        states, numbers = np.unique(superblocks["state"], return_counts=True)
        print_json(
            "wear",
            drive=str(drive),
            **facts,
            superblocks_by_state={s.decode(): int(n) for s, n in zip(states, numbers, strict=True)},
            histogram=[{"first": first, "last": last, "superblocks": n} for first, last, n in histogram],
            superblocks=[
                {
                    "state": record["state"].decode(),
                    "erase_count": int(record["erase_count"]),
                    "valid_pages": int(record["valid_pages"]),
                    "capacity_pages": int(record["capacity_pages"]),
                    "bad_erase_blocks": int(record["bad_erase_blocks"]),
                }
                for record in superblocks
            ],
        )
    else:
        _print(drive, facts, histogram)
    if plot is not None:
        try:
            from kvfsctl.wear_plot import draw
        except ImportError:
            fail("--plot needs matplotlib: pip install matplotlib")
        try:
            draw(superblocks, facts["rated_cycles"], plot)
        except OSError as error:
            fail(f"{plot}: {error.strerror or error}")


def erase_histogram(counts: "np.ndarray") -> list[tuple[int, int, int]]:
    """(lowest count, highest count, superblocks) of at most MAX_BINS bins of equal width."""
    import numpy as np  # only now: kvfsctl doctor tells when it is missing

    low, high = int(counts.min()), int(counts.max())
    width = -(-(high - low + 1) // MAX_BINS)
    numbers = np.bincount((counts - low) // width)
    return [
        (low + i * width, min(low + (i + 1) * width - 1, high), int(number)) for i, number in enumerate(numbers)
    ]


def _print(drive, facts: dict, histogram: list[tuple[int, int, int]]) -> None:
    spread = facts["erase_count_max"] - facts["erase_count_min"]
    print_table(
        f"wear of {drive}",
        ["", "value"],
        [
            [
                "erases per superblock: least, mean, most",
                f"{facts['erase_count_min']:,}, {facts['erase_count_mean']:,.1f}, {facts['erase_count_max']:,}",
            ],
            ["rated cycles", f"{facts['rated_cycles']:,}"],
            ["spread, of the rated cycles", f"{spread / facts['rated_cycles']:.1%}"],
            ["life used", f"{facts['percentage_used']} %"],
            ["bad erase blocks", f"{facts['bad_erase_blocks']:,} of {facts['num_erase_blocks']:,}"],
            ["spare left", f"{facts['available_spare_percent']} %"],
        ],
    )
    top = max(number for _, _, number in histogram)
    print_table(
        "superblocks by erase count",
        ["erases", "superblocks", ""],
        [
            [
                str(first) if first == last else f"{first} to {last}",
                f"{number:,}",
                "#" * -(-40 * number // top),
            ]
            for first, last, number in histogram
        ],
    )
