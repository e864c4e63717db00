"""Attention whose pages are all in DRAM: the short way of a command, from its bytes to its answer in one go.

Decoding from a warm cache is nothing else. There is no ticket, no span and nothing to read, and of a command of
a few pages no thread but the caller's. The arrays that it fills stay with its plan.
"""

import threading
from time import perf_counter_ns

import numpy as np

from accel.attention_job import INLINE_BYTES
from accel.attention_work import AttentionWork, DescriptorReader, attention_batch
from accel.merge import merge_units_into
from accel.page_job import Engine
from accel.workers import UnitRange, WorkerCounts
from ftl.errors import FlashError
from spdk_glue.status import CommandFailed
from spdk_glue.vendor_command import ANSWER_HEADER, ATTENTION_VERSION, record_struct

_HEADER = record_struct(ANSWER_HEADER)
Counts = tuple[int, int, int, int]  # items, pages, nanoseconds of kernels and of the command


class ResidentCommand:
    """What one command over a plan's pages fills."""

    def __init__(self, work: AttentionWork, counts: WorkerCounts):
        tables, plan = work.tables, work.plan
        self.lbas = plan.lbas.reshape(-1)
        self.pages = np.empty(len(self.lbas), np.int64)
        self.addresses = np.empty(len(self.lbas), np.uint64)
        self.batch = attention_batch(work, plan, self.addresses.reshape(2, -1), counts)
        shape = (plan.num_units, tables.visible_start.shape[1], tables.group_size)
        self.out = np.empty((*shape, tables.head_dim), np.float32)
        self.lse = np.empty(shape, np.float32)


class ResidentAttention:
    """Of one attention unit; safe to use from several threads."""

    def __init__(self, engine: Engine, descriptors: DescriptorReader):
        self._engine = engine
        self._descriptors = descriptors
        self._max_lines = engine.span_lines()
        self._max_pages = engine.resident_pages

    def attend(self, data: np.ndarray, answer: np.ndarray, max_bytes: int | None = None) -> Counts | None:
        """Fill a descriptor's answer, uint8 of its exact length.

        max_bytes: of the pages that it reads. None, with nothing done, if there are more, a page is not there
        or anything is wrong: the long way tells what.
        """
        started = perf_counter_ns()
        try:
            work = self._descriptors.read(data)
        except CommandFailed:
            return None
        if work.sparse is not None or (max_bytes is not None and self._bytes_of(work) > max_bytes):
            return None
        return self._attend(work, answer, started)

    def attend_small(self, work: AttentionWork) -> tuple[np.ndarray, Counts] | None:
        """As `attend`, of what is computed on the caller's thread anyway; None for all else."""
        if work.sparse is not None or self._bytes_of(work) > INLINE_BYTES:
            return None
        answer = np.empty(work.tables.answer_bytes, np.uint8)
        done = self._attend(work, answer, perf_counter_ns())
        return None if done is None else (answer, done)

    def _bytes_of(self, work: AttentionWork) -> int:
        return 2 * work.plan.num_pages * self._engine.ftl.page_size

    def _attend(self, work: AttentionWork, answer: np.ndarray, started: int) -> Counts | None:
        tables, plan = work.tables, work.plan
        if answer.nbytes != tables.answer_bytes or 2 * plan.num_pages > self._max_pages:
            return None
        values = answer[_HEADER.size :].view(np.float32)
        if not values.flags.aligned:
            return None
        try:
            command = work.idle.pop()
        except IndexError:
            command = ResidentCommand(work, self._engine.counts)
        lba_offset = work.layer * tables.layer_lbas

        def pin(entries: np.ndarray) -> bool:
            return self._engine.cache.acquire_resident(
                entries, command.lbas, lba_offset, self._max_lines, command.pages, command.addresses
            )

        resolving = perf_counter_ns()
        try:
            guard = self._engine.ftl.begin_read(pin)
        except FlashError:
            guard = None
        if guard is None:
            work.idle.append(command)
            return None
        self._engine.probes.resolve.since(resolving)
        try:
            command.batch.queries = work.queries
            kernel_ns = self._compute(command, plan)
        except Exception:
            return None  # the long way meets it again, and reports it
        finally:
            self._engine.cache.release(command.pages)
            self._engine.ftl.end_read(guard)
        out = values[: work.queries.size].reshape(work.queries.shape)
        lse = values[work.queries.size :].reshape(out.shape[:-1])
        merge_units_into(command.out, command.lse, plan.unit_item, plan.unit_kv_head, out, lse)
        ended = perf_counter_ns()
        self._engine.probes.command.between(started, ended)
        command_ns = ended - started
        num_pages = len(command.pages)
        _HEADER.pack_into(answer, 0, ATTENTION_VERSION, 0, 0, num_pages, kernel_ns, command_ns, 0, 0, 0, 0)
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
        ended = perf_counter_ns()
        self._engine.probes.kernel.between(started, ended)
        return ended - started
