"""Handlers of the vendor commands: attention tickets, and sealing of token groups."""

from collections.abc import Sequence

import numpy as np

from accel.attention_unit import AttentionUnit
from accel.block_commands import flash_errors_as_status
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma
from spdk_glue.command import IoOpcode
from spdk_glue.controller import Handler, Request
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import COMPACT, GROUP_EXTENT, SEAL_HEADER, SEAL_MAGIC

COMPACTION_BYTES = 8 << 20  # moved at a time: long runs, bounded memory


class VendorCommands:
    def __init__(self, unit: AttentionUnit, ftl: FlashTranslationLayer):
        self._unit = unit
        self._ftl = ftl

    def handlers(self) -> dict[int, Handler]:
        return {
            IoOpcode.ATTENTION_SUBMIT: _each(self._submit),
            IoOpcode.ATTENTION_FETCH: _each(self._fetch),
            IoOpcode.ATTENTION_CANCEL: _each(self._cancel),
            IoOpcode.SEAL_GROUPS: _each(self._seal_groups),
        }

    def _submit(self, request: Request) -> None:
        self._unit.submit(request.cdw10, request.data)

    def _fetch(self, request: Request) -> None:
        request.result = self._unit.fetch(request.cdw10, request.data)

    def _cancel(self, request: Request) -> None:
        self._unit.cancel(request.cdw10)

    def _seal_groups(self, request: Request) -> None:
        """Rewrite groups so that each layer's pages are physical neighbours again."""
        data = request.data
        if data.nbytes < SEAL_HEADER.itemsize:
            raise CommandFailed(Status.INVALID_DESCRIPTOR, detail="shorter than its header")
        header = data[: SEAL_HEADER.itemsize].view(SEAL_HEADER)[0]
        if header["magic"] != SEAL_MAGIC or header["version"] != 1:
            raise CommandFailed(Status.INVALID_DESCRIPTOR, detail="magic or version")
        if header["derive"] != COMPACT:
            raise CommandFailed(Status.INVALID_DESCRIPTOR, detail="derive")
        stop = SEAL_HEADER.itemsize + int(header["num_extents"]) * GROUP_EXTENT.itemsize
        if data.nbytes < stop or any(header["reserved"].tobytes()):
            raise CommandFailed(Status.INVALID_DESCRIPTOR, detail="num_extents or reserved")
        extents = data[SEAL_HEADER.itemsize : stop].view(GROUP_EXTENT)
        num_layers, layer_lbas = int(header["num_layers"]), int(header["layer_lbas"])
        if not 1 <= num_layers * layer_lbas <= self._ftl.num_lbas:
            raise CommandFailed(Status.INVALID_DESCRIPTOR, detail="num_layers or layer_lbas")
        group_lbas = num_layers * layer_lbas
        if (extents["base_lba"] >= self._ftl.num_lbas).any() or (
            extents["num_groups"] > self._ftl.num_lbas // group_lbas
        ).any():
            raise CommandFailed(Status.INVALID_DESCRIPTOR, detail="extent beyond the drive")
        bases = np.concatenate(
            [int(extent["base_lba"]) + group_lbas * np.arange(int(extent["num_groups"])) for extent in extents]
            or [np.empty(0, np.int64)]
        )
        if len(bases) and bases.max() + group_lbas > self._ftl.num_lbas:
            raise CommandFailed(Status.INVALID_DESCRIPTOR, detail="extent beyond the drive")
        with flash_errors_as_status(Status.WRITE_FAULT):
            for layer in range(num_layers):
                lbas = (bases[:, None] + layer * layer_lbas + np.arange(layer_lbas)).reshape(-1)
                self._rewrite(lbas, int(header["placement_id"]))

    def _rewrite(self, lbas: np.ndarray, placement_id: int) -> None:
        lbas = lbas[self._ftl.resolve(lbas) >= 0]
        page_size = self._ftl.page_size
        step = COMPACTION_BYTES // page_size
        for start in range(0, len(lbas), step):
            part = lbas[start : start + step]
            buffer = dma.allocate(len(part) * page_size)
            addresses = dma.page_addresses(buffer, page_size)
            self._ftl.read(part, addresses)
            self._ftl.write(part, addresses, stream=placement_id)


def _each(handler) -> Handler:
    """A handler of one request as a handler of a run of them, each with its own status."""

    def run(requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                handler(request)
            except CommandFailed as failure:
                request.fail(failure)

    return run
