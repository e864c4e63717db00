"""How much of the machine other processes used while something was timed."""

import os
import time
from pathlib import Path

# Fields of /proc/stat's first line that are not idle or waiting: user nice system irq softirq steal.
_BUSY_FIELDS = (1, 2, 3, 6, 7, 8)


class LoadMeter:
    """CPUs that everyone but this process kept busy since the meter was made."""

    def __init__(self):
        self._start = self._now()

    @staticmethod
    def _now():
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        busy_s = sum(int(fields[n]) for n in _BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy_s - time.process_time()

    def cpus_elsewhere(self):
        """Mean number of CPUs; 0.0 for a machine that did nothing else."""
        (began, busy_then), (now, busy_now) = self._start, self._now()
        return max(0.0, (busy_now - busy_then) / (now - began))
