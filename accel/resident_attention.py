"""Attention whose pages are all in DRAM: the short way of a command, from its bytes to its answer in one go.

Decoding from a warm cache is nothing else. There is no ticket, no span and nothing to read, and of a command of
a few pages no thread but the caller's. The arrays that it fills stay with its plan.
"""

import threading
from time import perf_counter_ns

import numpy as np

from accel.attention_job import INLINE_BYTES, Engine
from accel.attention_work import AttentionWork, DescriptorReader, attention_batch
from accel.merge import merge_units_into
from accel.workers import UnitRange
from ftl.errors import FlashError
from spdk_glue import dma
from spdk_glue.status import CommandFailed
from spdk_glue.vendor_command import ANSWER_HEADER, record_struct

_HEADER = record_struct(ANSWER_HEADER)


class ResidentCommand:
    """What one command over a plan's pages fills."""

    def __init__(self, work: AttentionWork):
        tables, plan = work.tables, work.plan
        self.lbas = plan.lbas.reshape(-1)
        self.pages = np.empty(len(self.lbas), np.int64)
        self.addresses = np.empty(len(self.lbas), np.uint64)
        self.batch = attention_batch(work, self.addresses.reshape(2, -1))
        shape = (plan.num_units, tables.visible_start.shape[1], tables.group_size)
        self.out = np.empty((*shape, tables.head_dim), np.float32)
        self.lse = np.empty(shape, np.float32)


class ResidentAttention:
    """Of one attention unit; safe to use from several threads."""

    def __init__(self, engine: Engine, descriptors: DescriptorReader):
        self._engine = engine
        self._descriptors = descriptors
        self._max_lines = engine.span_lines
        self._max_pages = engine.resident_pages

    def attend(self, data: np.ndarray, answer: np.ndarray) -> tuple[int, int, int, int] | None:
        """Fill a descriptor's answer, uint8 of its exact length: (items, pages, kernel ns, command ns).

        None, with nothing done, if a page is not there or anything is wrong: the long way tells what.
        """
        started = perf_counter_ns()
        try:
            work = self._descriptors.read(data)
        except CommandFailed:
            return None
        return self._attend(work, answer, started)

    def attend_small(self, work: AttentionWork, answer: np.ndarray) -> tuple[int, int, int, int] | None:
        """As `attend`, of what is computed on the caller's thread anyway; None for all else."""
        if 2 * work.plan.num_pages * self._engine.ftl.page_size > INLINE_BYTES:
            return None
        return self._attend(work, answer, perf_counter_ns())

    def _attend(
        self, work: AttentionWork, answer: np.ndarray, started: int
    ) -> tuple[int, int, int, int] | None:
        tables, plan = work.tables, work.plan
        if (
            answer.nbytes != tables.answer_bytes
            or dma.address_of(answer) % 4
            or 2 * plan.num_pages > self._max_pages
        ):
            return None
        try:
            command = work.idle.pop()
        except IndexError:
            command = ResidentCommand(work)
        lba_offset = work.layer * tables.layer_lbas

        def pin(entries: np.ndarray) -> bool:
            return self._engine.cache.acquire_resident(
                entries, command.lbas, lba_offset, self._max_lines, command.pages, command.addresses
            )

        try:
            guard = self._engine.ftl.begin_read(pin)
        except FlashError:
            guard = None
        if guard is None:
            work.idle.append(command)
            return None
        try:
            command.batch.queries = work.queries
            kernel_ns = self._compute(command, plan)
        except Exception:
            return None  # the long way meets it again, and reports it
        finally:
            self._engine.cache.release(command.pages)
            self._engine.ftl.end_read(guard)
        values = answer[_HEADER.size :].view(np.float32)
        out = values[: work.queries.size].reshape(work.queries.shape)
        lse = values[work.queries.size :].reshape(out.shape[:-1])
        merge_units_into(command.out, command.lse, plan.unit_item, plan.unit_kv_head, out, lse)
        command_ns = perf_counter_ns() - started
        num_pages = len(command.pages)
        _HEADER.pack_into(answer, 0, 1, 0, 0, num_pages, kernel_ns, command_ns)
        work.idle.append(command)
        return len(tables.items), num_pages, kernel_ns, command_ns

    def _compute(self, command: ResidentCommand, plan) -> int:
        """Nanoseconds in kernels, of all threads. Raises what the worker raises."""
        units = UnitRange(0, plan.num_units)
        if len(command.pages) * self._engine.ftl.page_size <= INLINE_BYTES:
            return self._attend_units(command, units)
        kernel_ns, failures = [], []
        ended = threading.Lock()
        ended.acquire()

        def compute(units: UnitRange) -> None:
            try:
                kernel_ns.append(self._attend_units(command, units))
            except Exception as error:
                failures.append(error)
                for _ in units:  # nobody else shall
                    pass

        self._engine.workers.submit(units, compute, ended.release)
        ended.acquire()
        if failures:
            raise failures[0]
        return sum(kernel_ns)

    def _attend_units(self, command: ResidentCommand, units: UnitRange) -> int:
        started = perf_counter_ns()
        self._engine.worker.attend_units(command.batch, units, command.out, command.lse)
        return perf_counter_ns() - started
