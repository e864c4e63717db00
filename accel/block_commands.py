"""Handlers of the standard NVMe commands, over the flash translation layer."""

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from time import perf_counter_ns

import numpy as np

from accel.drive_probes import DriveProbes
from ftl.errors import BackingFull, CorruptPage, FlashError, LbaOutOfRange, OutOfFlash, ReadOnlyMedia
from ftl.scrub import verify
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma
from spdk_glue.command import DATASET_DEALLOCATE, DATASET_RANGE, DIRECTIVE_DATA_PLACEMENT, IoOpcode
from spdk_glue.controller import BatchHandler, Handler, Request
from spdk_glue.status import CommandFailed, Status

log = logging.getLogger(__name__)


@contextmanager
def flash_errors_as_status(otherwise: Status):
    """Turn the flash layer's errors into status codes; what has no code of its own is `otherwise`."""
    try:
        yield
    except CorruptPage as error:
        log.error("%s", error)
        raise CommandFailed(Status.UNRECOVERED_READ_ERROR, lba=error.lba, detail="page checksum") from error
    except OutOfFlash as error:
        raise CommandFailed(Status.CAPACITY_EXCEEDED, detail="no free flash") from error
    except BackingFull as error:
        log.error("%s", error)
        raise CommandFailed(Status.CAPACITY_EXCEEDED, detail="disk of drive full") from error
    except LbaOutOfRange as error:
        raise CommandFailed(Status.LBA_OUT_OF_RANGE) from error
    except ReadOnlyMedia as error:
        raise CommandFailed(Status.NAMESPACE_WRITE_PROTECTED, detail="read-only drive") from error
    except FlashError as error:
        log.error("%s", error)
        raise CommandFailed(otherwise, detail="media error, see log") from error


class BlockCommands:
    """Read, Write, Flush, Dataset Management and Verify."""

    def __init__(self, ftl: FlashTranslationLayer, probes: DriveProbes):
        self._ftl = ftl
        self._probes = probes

    def handlers(self) -> dict[int, Handler]:
        return {
            IoOpcode.READ: self.read,
            IoOpcode.WRITE: self.write,
            IoOpcode.FLUSH: self.flush,
            IoOpcode.DATASET_MANAGEMENT: self.dataset_management,
            IoOpcode.VERIFY: self.verify,
        }

    def batch_handlers(self) -> dict[int, BatchHandler]:
        return {IoOpcode.READ: self.read_batch}

    def read_batch(self, entries: np.ndarray, buffers: Sequence[np.ndarray | None]) -> bool:
        """As `read`, if all goes well. Raises FlashError."""
        if not all(buffer is not None and buffer.flags.c_contiguous for buffer in buffers):
            return False
        page_size = self._ftl.page_size
        first_lbas = entries["cdw10"].astype(np.int64) | entries["cdw11"].astype(np.int64) << 32
        counts = (entries["cdw12"] & 0xFFFF).astype(np.int64) + 1
        sizes = np.array([buffer.nbytes for buffer in buffers])
        addresses = np.array([dma.address_of(buffer) for buffer in buffers], np.uint64)
        if (
            (sizes != counts * page_size).any()
            or (first_lbas < 0).any()
            or (first_lbas > self._ftl.num_lbas - counts).any()
            or (addresses % np.uint64(dma.ALIGNMENT)).any()
        ):
            return False
        started = perf_counter_ns()
        self._ftl.read(*_spread(first_lbas, counts, addresses, page_size))
        self._probes.read.since(started, len(entries))
        return True

    def _check(self, request: Request) -> bool:
        """Whether the request's range and length hold; a bad one gets its status."""
        if request.first_lba + request.num_lbas > self._ftl.num_lbas:
            request.fail(CommandFailed(Status.LBA_OUT_OF_RANGE, lba=request.first_lba))
        elif request.data.nbytes != request.num_lbas * self._ftl.page_size:
            request.fail(CommandFailed(Status.SGL_LENGTH_INVALID, lba=request.first_lba))
        return request.status == Status.SUCCESS

    def verify(self, requests: Sequence[Request]) -> None:
        """Read and check without transfer; a failure names the first LBA that is lost."""
        for request in requests:
            try:
                if request.first_lba + request.num_lbas > self._ftl.num_lbas:
                    raise CommandFailed(Status.LBA_OUT_OF_RANGE, lba=request.first_lba)
                with flash_errors_as_status(Status.UNRECOVERED_READ_ERROR):
                    verify(self._ftl, request.first_lba, request.num_lbas)
            except CommandFailed as failure:
                request.fail(failure)

    def _scatter(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """(lbas int64, addresses uint64) of all pages of some requests."""
        return _spread(
            np.array([request.first_lba for request in requests], np.int64),
            np.array([request.num_lbas for request in requests]),
            np.array([dma.address_of(request.data) for request in requests], np.uint64),
            self._ftl.page_size,
        )

    def read(self, requests: Sequence[Request]) -> None:
        accepted = [r for r in requests if self._check(r)]
        if not accepted:
            return
        try:
            self._read(accepted)
        except CommandFailed:
            # one bad page must not fail its neighbours' commands: ask again one by one
            for request in accepted:
                try:
                    self._read([request])
                except CommandFailed as failure:
                    request.fail(failure)

    def _read(self, requests: Sequence[Request]) -> None:
        started = perf_counter_ns()
        with flash_errors_as_status(Status.UNRECOVERED_READ_ERROR), _aligned_buffers(requests):
            self._ftl.read(*self._scatter(requests))
        self._probes.read.since(started, len(requests))

    def write(self, requests: Sequence[Request]) -> None:
        accepted = [r for r in requests if self._check(r)]
        first = 0
        while first < len(accepted):  # neighbours with one placement identifier are one batch
            placement_id = self._placement_id(accepted[first])
            stop = first + 1
            while stop < len(accepted) and self._placement_id(accepted[stop]) == placement_id:
                stop += 1
            run = accepted[first:stop]
            started = perf_counter_ns()
            try:
                with flash_errors_as_status(Status.WRITE_FAULT), _aligned_buffers(run, copy_in=True):
                    self._ftl.write(*self._scatter(run), stream=placement_id)
                self._probes.write.since(started, len(run))
            except CommandFailed as failure:
                for request in run:
                    request.fail(failure)
            first = stop

    @staticmethod
    def _placement_id(request: Request) -> int:
        placed = request.cdw12 >> 20 & 0xF == DIRECTIVE_DATA_PLACEMENT
        return request.cdw13 >> 16 if placed else 0

    def flush(self, requests: Sequence[Request]) -> None:
        started = perf_counter_ns()
        with flash_errors_as_status(Status.WRITE_FAULT):
            self._ftl.flush()
        self._probes.flush.since(started, len(requests))

    def dataset_management(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.cdw11 & DATASET_DEALLOCATE:
                continue  # the other attributes are hints that we may ignore
            count = (request.cdw10 & 0xFF) + 1
            if request.data.nbytes < count * DATASET_RANGE.itemsize:
                request.fail(CommandFailed(Status.SGL_LENGTH_INVALID))
                continue
            ranges = request.data[: count * DATASET_RANGE.itemsize].view(DATASET_RANGE)
            pairs = np.stack([ranges["first_lba"], ranges["num_lbas"].astype(np.uint64)], axis=1)
            started = perf_counter_ns()
            try:
                if int(pairs[:, 0].max()) >= 1 << 62:
                    raise CommandFailed(Status.LBA_OUT_OF_RANGE)
                with flash_errors_as_status(Status.WRITE_FAULT):
                    self._ftl.deallocate(pairs.astype(np.int64))
                self._probes.deallocate.since(started)
            except CommandFailed as failure:
                request.fail(failure)


def _spread(first_lbas: np.ndarray, counts: np.ndarray, addresses: np.ndarray, page_size: int):
    """(int64 LBA, uint64 address) of each page, from those of each command's first."""
    behind = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # within its command
    starts = np.repeat(addresses, counts)
    return np.repeat(first_lbas, counts) + behind, starts + behind.astype(np.uint64) * np.uint64(page_size)


@contextmanager
def _aligned_buffers(requests: Sequence[Request], copy_in: bool = False):
    """Lend page-aligned memory to requests whose buffer is not: direct I/O takes nothing else."""
    lent = []
    for request in requests:
        if dma.address_of(request.data) % dma.ALIGNMENT or not request.data.flags.c_contiguous:
            original, request.data = request.data, dma.allocate(request.data.nbytes)
            lent.append((request, original))
            if copy_in:
                request.data[:] = original
    try:
        yield
        if not copy_in:
            for request, original in lent:
                original[:] = request.data
    finally:
        for request, original in lent:
            request.data = original
