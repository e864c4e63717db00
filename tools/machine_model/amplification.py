"""Write amplification of the drives under a load: from the real translation layer, over media that count.

Sequences come and die at random on a drive that is this full. A sequence's part on one drive against the
drive's reclaim unit decides: what is larger than a unit frees whole units. Runs take seconds, so those of a
grid are kept in amplification.json, made by `python -m machine_model.make_tables`; seeds make them the same
everywhere.
"""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np

from kvfs_bench.churn import SHORT, churn
from kvfs_bench.churn_trace import TraceOptions
from machine_model.situation import Situation

UNITS = (0.25, 0.5, 1.0, 2.0, 4.0)  # mean size of sequences, in reclaim units
FULLNESS = (0.5, 0.7, 0.8, 0.9)
TABLE = Path(__file__).with_name("amplification.json")


def measure(units: float, fullness: float) -> float:
    """Pages programmed over pages written, in a run of the translation layer: seconds."""
    return churn(SHORT, SHORT.churn, TraceOptions(fullness, "random", units)).waf


def amplification_of(at: Situation, stored_bytes: float) -> float:
    """Of the situation's drives with so many bytes of its sequences on them. Between runs of the grid it is
    interpolated; what is beyond them counts as their last."""
    drive = at.machine.drive
    of_drive = stored_bytes / at.work.batch / at.num_drives
    units = math.log2(max(of_drive / drive.reclaim_unit_bytes, UNITS[0]))
    fullness = stored_bytes / (at.num_drives * drive.capacity_bytes)
    rows = [np.interp(units, np.log2(UNITS), row) for row in _table()]
    return float(np.interp(fullness, FULLNESS, rows))


@cache
def _table() -> list[list[float]]:
    """By fullness, then by units."""
    return json.loads(TABLE.read_text())["waf"]
