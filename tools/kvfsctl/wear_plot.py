"""Wear as a PNG: erase counts as a histogram, and superblock by superblock with the data they hold."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

MAX_BINS = 64


def draw(superblocks: list[dict], rated_cycles: int, path: Path) -> None:
    """superblocks: see kvfs.administration.drive_care."""
    counts = np.array([record["erase_count"] for record in superblocks], np.int64)
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    low, high = int(counts.min()), int(counts.max())
    width = -(-(high - low + 1) // MAX_BINS)
    left.hist(counts, bins=np.arange(low, high + width + 1, width) - 0.5)
    left.set(xlabel="erases", ylabel="superblocks", title=f"rated for {rated_cycles:,} cycles")
    index = np.arange(len(counts))
    right.plot(index, counts, ".", markersize=3)
    right.set(xlabel="superblock", ylabel="erases", ylim=(0, max(1, high) * 1.1))
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    share = right.twinx()
    valid = [record["valid_pages"] / max(record["capacity_pages"], 1) for record in superblocks]
    share.fill_between(index, valid, step="mid", alpha=0.25, color="tab:orange")
    share.set(ylabel="share of pages that is valid", ylim=(0, 1))
    bad = np.array([record["state"] == "bad" for record in superblocks])
    right.plot(index[bad], counts[bad], "x", color="tab:red")
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)
