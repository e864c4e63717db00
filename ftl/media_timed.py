"""Flash media whose operations are timed: histograms of what flash takes, and the media's spans of a trace."""

from time import perf_counter_ns

import numpy as np

from ftl.media import FlashMedia
from spdk_glue.probes import Probe


class TimedMedia:
    """The same media; all but the four verbs is passed on as it is."""

    def __init__(self, media: FlashMedia):
        self._media = media
        self._read, self._program, self._erase, self._sync = self.probes = tuple(
            Probe("media", name) for name in ("read", "program", "erase", "sync")
        )

    def __getattr__(self, name: str):
        return getattr(self._media, name)

    def read(self, pages: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        started = perf_counter_ns()
        found = self._media.read(pages, addresses)
        self._read.since(started, note={"pages": len(pages)})
        return found

    def program(self, pages: np.ndarray, addresses: np.ndarray, oob: np.ndarray, stream: int = 0) -> None:
        started = perf_counter_ns()
        self._media.program(pages, addresses, oob, stream)
        self._program.since(started, note={"pages": len(pages), "stream": stream})

    def erase(self, superblock: int) -> None:
        started = perf_counter_ns()
        self._media.erase(superblock)
        self._erase.since(started, note={"superblock": superblock})

    def sync(self) -> None:
        started = perf_counter_ns()
        self._media.sync()
        self._sync.since(started)
