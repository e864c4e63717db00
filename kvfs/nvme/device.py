"""One NVMe namespace, opened by its location to be administered: read, written, asked, whatever it holds."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from kvfs.embedded_drive import hold_alone, holds_flash, open_transport
from kvfs.errors import InUse, InvalidArgument
from kvfs.metadata_vfs import VOLUME_HEADER, VOLUME_MAGIC
from kvfs.nvme import linux_devices
from kvfs.nvme.meaning import block_bytes_of
from kvfs.nvme.raw_command import RawCommand, check
from spdk_glue import command, dma
from spdk_glue.identify import (
    FLBAS_EXTENDED,
    IDENTIFY_NAMESPACE,
    SMART_LOG,
    WARNING_READ_ONLY,
    Cns,
    LogPage,
)
from spdk_glue.namespace import BlockNamespace, Transport
from spdk_glue.transports.url import is_nvme

STEP_BYTES = 8 << 20


class Device:
    """A namespace, its controller, and what is checked before either is changed.

    controller, namespace: IDENTIFY_CONTROLLER and IDENTIFY_NAMESPACE
    """

    def __init__(self, location: str, transport: Transport, read_only: bool):
        self.location = location
        self._is_embedded_read_only = read_only and not is_nvme(location)
        self._blocks = BlockNamespace(transport)
        self.controller: np.void = self._blocks.controller
        self.nsid = self._blocks.nsid
        data = np.zeros(IDENTIFY_NAMESPACE.itemsize, np.uint8)
        self._blocks.admin(command.identify(Cns.NAMESPACE, self.nsid), data)
        self.namespace: np.void = data.view(IDENTIFY_NAMESPACE)[0]
        self.block_bytes = block_bytes_of(self.namespace)
        self.num_lbas = self._blocks.num_lbas
        form = self.namespace["lbaf"][int(self.namespace["flbas"]) & 0xF]
        self._metadata_bytes = int(form["ms"])
        self._is_extended = bool(int(self.namespace["flbas"]) & FLBAS_EXTENDED)

    def smart(self) -> np.void:
        """SMART_LOG of the whole controller."""
        record = self._blocks.log_page(LogPage.SMART, SMART_LOG)[0]
        if self._is_embedded_read_only:  # by us, which is nothing to warn of
            record["critical_warning"] &= ~WARNING_READ_ONLY & 0xFF
        return record

    # blocks

    def read(self, first_lba: int, num_lbas: int) -> Iterator[np.ndarray]:
        """uint8 arrays that follow each other, of at most some MiB."""
        self._check_range(first_lba, num_lbas)
        step = max(1, STEP_BYTES // self.block_bytes)
        for start in range(first_lba, first_lba + num_lbas, step):
            yield self._blocks.read(start, min(step, first_lba + num_lbas - start))

    def write(self, first_lba: int, data: bytes) -> int:
        """Write whole blocks; how many they were. Raises InvalidArgument with nothing written."""
        num_lbas, rest = divmod(len(data), self.block_bytes)
        if rest or not num_lbas:
            raise InvalidArgument(
                f"{len(data)} bytes of data are not a whole number of {self.block_bytes}-byte blocks"
            )
        self._check_range(first_lba, num_lbas)
        self._blocks.write(first_lba, new_buffer(len(data), data))
        return num_lbas

    def _check_range(self, first_lba: int, num_lbas: int) -> None:
        if self._metadata_bytes:
            raise InvalidArgument(
                f"{self.location} is formatted with {self._metadata_bytes} bytes of metadata per block:"
                " use passthru"
            )
        if first_lba < 0 or num_lbas < 1 or first_lba + num_lbas > self.num_lbas:
            raise InvalidArgument(
                f"blocks {first_lba} to {first_lba + num_lbas - 1} are not all in {self.location}, which has"
                f" {self.num_lbas}"
            )

    # raw commands

    def check(self, raw: RawCommand) -> None:
        """Raises InvalidArgument for a command that `run` would not send."""
        per_block = self.block_bytes + (self._metadata_bytes if self._is_extended else 0)
        check(
            raw,
            per_block,
            self._blocks.max_transfer_lbas * self.block_bytes,
            separate_metadata=self._metadata_bytes > 0 and not self._is_extended,
        )

    def run(self, raw: RawCommand, data: np.ndarray | None = None) -> int:
        """Send a command and wait for it: CDW0 of its completion. data: uint8 [data_bytes], filled or sent."""
        self.check(raw)
        if (0 if data is None else data.nbytes) != raw.data_bytes:
            raise InvalidArgument(f"a buffer of another length than {raw.data_bytes} bytes")
        entry = raw.entry(self.nsid)
        return self._blocks.admin(entry, data) if raw.is_admin else self._blocks.execute(entry, data)

    # what must not be overwritten unasked

    def contents(self) -> str | None:
        """What kvfs has on it. Raises NvmeStatusError."""
        return contents_of(self._blocks)

    def check_free(self) -> None:
        """Raises InUse where the namespace holds a kvfs drive or store, is mounted or otherwise in use."""
        in_use = linux_devices.why_in_use(self.location)
        if in_use:
            raise InUse(self.location, f"is in use: {in_use}")
        contents = self.contents()
        if contents:
            raise InUse(self.location, f"holds {contents}")


def new_buffer(size_bytes: int, data: bytes = b"", prefill: int = 0) -> np.ndarray:
    """uint8 [size_bytes] of DMA memory: `data`, and `prefill` behind it."""
    buffer = dma.allocate(size_bytes)
    if prefill:
        buffer[:] = prefill
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return buffer


def contents_of(blocks: BlockNamespace) -> str | None:
    """What kvfs has on a namespace. Raises NvmeStatusError."""
    if holds_flash(blocks):
        return "a kvfs drive"
    header = blocks.read(0, 1)[: VOLUME_HEADER.itemsize].view(VOLUME_HEADER)
    return "a kvfs store" if header["magic"][0] == VOLUME_MAGIC else None


@contextmanager
def open_device(location: str | os.PathLike, read_only: bool = False) -> Iterator[Device]:
    """See kvfs.embedded_drive.open_transport; whoever may change it has it alone. Raises DriveBusy, too."""
    location = os.fspath(location)
    with ExitStack() as stack:
        device = Device(location, stack.enter_context(open_transport(location, read_only)), read_only)
        stack.callback(device._blocks.close_queue_pairs)
        if not read_only:
            stack.enter_context(hold_alone(device._blocks, location))
        yield device
