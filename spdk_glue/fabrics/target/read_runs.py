"""Runs of Reads of one connection: many commands as arrays, nothing in Python for each of them."""

from collections.abc import Iterator

import numpy as np

from spdk_glue import dma
from spdk_glue.command import IoOpcode
from spdk_glue.fabrics.records import PSDT_SGL, SGL_DESCRIPTOR, SGL_TRANSPORT


class ReadRuns:
    """A part of Connection."""

    def _is_read_run(self, entries: np.ndarray, frames: np.ndarray) -> bool:
        sgls = entries["dptr"].view(SGL_DESCRIPTOR)
        cids = set(entries["cid"].tolist())
        return bool(
            (entries["opcode"] == IoOpcode.READ).all()
            and (entries["flags"] == PSDT_SGL).all()
            and (sgls["type"] == SGL_TRANSPORT).all()
            and not frames["data_length"].any()
            and int(sgls["length"].min()) > 0
            and int(sgls["length"].max()) <= self._limits.max_transfer_bytes
            and len(cids) == len(entries)
            and cids.isdisjoint(self._outstanding)
        )

    def _run_reads(self, entries: np.ndarray) -> Iterator[np.ndarray]:
        if self._arena is None:
            self._arena = dma.allocate(self._limits.buffer_bytes)
        lengths = entries["dptr"].view(SGL_DESCRIPTOR)["length"].astype(np.int64)
        stops = np.cumsum(-(-lengths // dma.ALIGNMENT) * dma.ALIGNMENT)  # of each one's place, page-aligned
        first, base = 0, 0
        while first < len(entries):
            # how many of them the arena holds
            stop = int(np.searchsorted(stops, base + len(self._arena), side="right"))
            part = slice(first, stop)
            starts = np.concatenate([[base], stops[first : stop - 1]]) - base
            buffers = [
                self._arena[start : start + length]
                for start, length in zip(starts.tolist(), lengths[part].tolist(), strict=True)
            ]
            completions = self.association.execute(self.qid, entries[part], buffers)
            self._answer_reads(completions, buffers, starts, lengths[part])
            yield from self._flush()
            first, base = stop, int(stops[stop - 1])

    def _answer_reads(self, completions, buffers, starts: np.ndarray, lengths: np.ndarray) -> None:
        num = len(completions)
        completions["sqhd"] = (self._sqhd + 1 + np.arange(num)) % self._num_entries
        if not completions["status"].any():
            self._sqhd = (self._sqhd + num) % self._num_entries
            addresses = starts + dma.address_of(self._arena)
            self._out.read_answers(completions, addresses, lengths, self._may_omit_responses)
            return
        for completion, data in zip(completions.tolist(), buffers, strict=True):
            cdw0, cdw1, _, _, cid, status = completion
            self._sqhd = (self._sqhd + 1) % self._num_entries
            self._send_answer(cid, status, cdw0, cdw1, data)
