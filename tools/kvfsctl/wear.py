"""`kvfsctl wear`: how worn the flash is, and how evenly."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfsctl.opening import each_drive
from kvfsctl.output import JsonOption, StoreArgument, fail, print_json, print_table

if TYPE_CHECKING:
    import numpy as np

MAX_BINS = 16


def wear(
    drive: StoreArgument,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the histogram and a map of the superblocks.")
    ] = None,
    json_output: JsonOption = False,
):
    """Show erase counts against the cycles that the flash is rated for, bad blocks and spare.

    A superblock's count is that of its most worn block. Wear levelling keeps the counts within 5% of the
    rated cycles of each other. Of a set each drive is shown, and --plot draws one: name it.
    """
    if plot is not None and plot.suffix != ".png":
        raise typer.BadParameter("the plot is a .png file", param_hint="--plot")
    worn = [(one, care.superblocks(), care.health()) for one, care in each_drive(drive)]
    if plot is not None and len(worn) > 1:
        raise typer.BadParameter("a set has a plot for each drive: name one", param_hint="--plot")
    found = [_worn(one, superblocks, health) for one, superblocks, health in worn]
    if json_output:
        print_json("wear", **(found[0] if len(found) == 1 else {"set": str(drive), "drives": found}))
    else:
        for one in found:
            _print(one)
    if plot is not None:
        _, superblocks, health = worn[0]
        try:
            from kvfsctl.wear_plot import draw
        except ImportError:
            fail("--plot needs matplotlib: pip install matplotlib")
        try:
            draw(superblocks, health["rated_cycles"], plot)
        except OSError as error:
            fail(f"{plot}: {error.strerror or error}")


def _worn(drive, superblocks: list[dict], health: dict) -> dict:
    """What JSON says of one drive."""
    import numpy as np  # only now: kvfsctl doctor tells when it is missing

    counts = np.array([record["erase_count"] for record in superblocks], np.int64)
    names = (
        "rated_cycles",
        "percentage_used",
        "available_spare_percent",
        "num_erase_blocks",
        "bad_erase_blocks",
    )
    return {
        "drive": str(drive),
        **{name: health[name] for name in names},
        "erase_count_min": int(counts.min()),
        "erase_count_mean": float(counts.mean()),
        "erase_count_max": int(counts.max()),
        "superblocks_by_state": dict(sorted(Counter(record["state"] for record in superblocks).items())),
        "histogram": [
            {"first": first, "last": last, "superblocks": number}
            for first, last, number in erase_histogram(counts)
        ],
        "superblocks": superblocks,
    }


def erase_histogram(counts: "np.ndarray") -> list[tuple[int, int, int]]:
    """(lowest count, highest count, superblocks) of at most MAX_BINS bins of equal width."""
    import numpy as np  # only now: kvfsctl doctor tells when it is missing

    low, high = int(counts.min()), int(counts.max())
    width = -(-(high - low + 1) // MAX_BINS)
    numbers = np.bincount((counts - low) // width)
    return [
        (low + i * width, min(low + (i + 1) * width - 1, high), int(number)) for i, number in enumerate(numbers)
    ]


def _print(facts: dict) -> None:
    spread = facts["erase_count_max"] - facts["erase_count_min"]
    print_table(
        f"wear of {facts['drive']}",
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
    histogram = [(each["first"], each["last"], each["superblocks"]) for each in facts["histogram"]]
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
