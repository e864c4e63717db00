"""What a drive holds: blocks that were written, blocks that can still be read."""

from collections.abc import Iterator

import numpy as np

from spdk_glue import command
from spdk_glue.command import LBA_STATUS_DESCRIPTOR, LBA_STATUS_HEADER
from spdk_glue.status import NvmeStatusError, Status

STATUS_DESCRIPTORS = 4095  # of one Get LBA Status: with its header 64 KiB less 8 bytes
VERIFY_STEP_MIN = 32  # blocks read again at most for each lost one


class HeldBlocks:
    """A part of BlockNamespace, which has what is used here."""

    def allocated(self) -> Iterator[tuple[int, int]]:
        """(first LBA, number of LBAs) of every run of blocks that were written and not deallocated."""
        first_lba, run = 0, None
        size = LBA_STATUS_HEADER.itemsize + STATUS_DESCRIPTORS * LBA_STATUS_DESCRIPTOR.itemsize
        while first_lba < self.num_lbas:
            data = np.zeros(size, np.uint8)
            self.admin(command.get_lba_status(first_lba, size), data)
            count = int(data[: LBA_STATUS_HEADER.itemsize].view(LBA_STATUS_HEADER)["num_descriptors"][0])
            records = data[LBA_STATUS_HEADER.itemsize :].view(LBA_STATUS_DESCRIPTOR)[:count]
            for first, num_lbas in records[["first_lba", "num_lbas"]].tolist():
                if run is not None and sum(run) == first:  # the drive may cut a run in two
                    run = (run[0], run[1] + num_lbas)
                    continue
                if run is not None:
                    yield run
                run = (first, num_lbas)
            if count < STATUS_DESCRIPTORS:
                break
            first_lba = sum(run)
        if run is not None:
            yield run

    def verify(self, first_lba: int, num_lbas: int) -> None:
        """Have the drive read blocks and check them, without transfer.

        Raises NvmeStatusError with the first LBA that is lost.
        """
        step = command.MAX_LBAS_PER_COMMAND
        starts = range(first_lba, first_lba + num_lbas, step)
        for start in starts:
            self._run(command.verify(start, min(step, first_lba + num_lbas - start)), [None])

    def lost(self, first_lba: int, num_lbas: int) -> list[int]:
        """Every LBA of a range that the drive cannot give back: Verify goes on behind each that it reports."""
        found: list[int] = []
        stop = first_lba + num_lbas
        step = num_lbas
        while first_lba < stop:
            count = min(step, stop - first_lba)
            try:
                self.verify(first_lba, count)
            except NvmeStatusError as error:
                if error.status != Status.UNRECOVERED_READ_ERROR or error.lba is None:
                    raise
                found.append(error.lba)
                first_lba = error.lba + 1
                step = VERIFY_STEP_MIN  # where one is lost, others are
            else:
                first_lba += count
                step *= 2
        return found
