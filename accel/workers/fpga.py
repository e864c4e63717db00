"""Attention by the FPGA core of accel/fpga: simulated in this process, or on a card by XRT.
accel/fpga/options.py says which and what for.

What the core cannot compute, other dtypes and head sizes, soft caps, biases, elements that are not finite,
scores beyond 32767, goes to the numba worker, unit by unit, is counted, and the log says so once; so does what
a core has failed at. Where that is forbidden it is an error.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import cache

import numpy as np

from accel.fpga.arithmetic import (
    BAD_COMMAND,
    BAD_LENGTH,
    BFLOAT16,
    FLOAT16,
    MAX_CHANNELS,
    MAX_TOKENS,
    NOT_FINITE,
    Shape,
)
from accel.fpga.model import Command, outputs, quantised_queries
from accel.fpga.options import Options, read_options
from accel.fpga.simulation import CannotSimulate, SimulatedCore, verilator_root
from accel.fpga.xrt import CannotUseCard, Card, CardCore, CardFailed, open_card
from accel.workers import (
    AttentionBatch,
    CannotCompute,
    UnitRange,
    WorkerCounts,
    WorkerFailed,
    check_shape,
)
from accel.workers import numba as fallback

name = "fpga"
DTYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16}
ELEMENT_BYTES = 2
log = logging.getLogger(__name__)
_local = threading.local()
_lock = threading.Lock()


def options() -> Options:
    """Raises ValueError for an environment that makes no sense."""
    return read_options(os.environ)


def _card() -> Card | None:
    """Raises CannotUseCard, also for a core that is not of the lanes and rows that were asked for."""
    wanted = options()
    if not wanted.xclbin:
        return None
    card = open_card(wanted.xclbin, wanted.device)
    for field in ("lanes", "rows"):
        asked, found = getattr(wanted, field), getattr(card.shape, field)
        if asked not in (None, found):
            raise CannotUseCard(f"{wanted.xclbin}: a core of {found} {field}, not {asked}: leave {field} to it")
    return card


@cache
def shape() -> Shape:
    """What the cores are built for. Raises ValueError, CannotUseCard."""
    card = _card()
    return options().shape if card is None else card.shape


def forget() -> None:
    """Read the environment anew: for tests."""
    shape.cache_clear()
    _say_once.cache_clear()
    _say_failed.cache_clear()


def check_ready() -> None:
    """Raises ValueError with a line for the user where no core can be had here."""
    try:
        if _card() is None:
            verilator_root()
    except (CannotSimulate, CannotUseCard) as error:
        raise ValueError(str(error)) from error


def _core() -> SimulatedCore | CardCore:
    """This thread's."""
    card, built = _card(), shape()
    if getattr(_local, "made_for", None) != (card, built):
        if card is None:
            with _lock:  # the first one builds it
                core = SimulatedCore(built)
        else:
            core = card.core()
        _local.made_for, _local.core = (card, built), core
    return _local.core


def why_not(dtype: str, head_dim: int) -> str:
    """What the core is not built for, in a word or two; else nothing."""
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    built = shape()
    if head_dim % built.lanes or head_dim > built.lanes * built.max_beats:
        return f"head_dim {head_dim}"
    return ""


def prepare(dtype: str, head_dim: int, group_size: int) -> float:
    """Build the core, if it is new; the seconds that took. Raises ValueError."""
    check_shape(dtype, head_dim, group_size)
    check_ready()
    began = time.perf_counter()
    if not (why := why_not(dtype, head_dim)):
        _core()
    elif options().fallback:
        return fallback.prepare(dtype, head_dim, group_size)
    else:
        raise CannotCompute(why)
    return time.perf_counter() - began


def attend_units(batch: AttentionBatch, units: UnitRange, out: np.ndarray, lse: np.ndarray) -> None:
    """See AttentionBatch. Raises CannotCompute and WorkerFailed where numba must not help. Source of the
    method: accel/fpga/model.py."""
    check_shape(batch.dtype, batch.head_dim, batch.group_size)
    why = why_not(batch.dtype, batch.head_dim)
    why = why or ("softcap" if batch.softcap else "linear bias" if len(batch.alibi_slopes) else "")
    for unit in units:
        reason = why or _attend_unit(batch, unit, out[unit], lse[unit])
        if reason:
            _leave_to_numba(reason, batch.counts)
            fallback.attend_units(batch, UnitRange(unit, unit + 1), out, lse)


def approximate_scores(
    pages, num_tokens: int, page_size: int, dtype, weights, scores, counts: WorkerCounts | None = None
) -> None:
    """See accel.sparf.kernels. Raises as attend_units does."""
    from accel.fpga import channel_scores
    from accel.sparf import kernels

    counts = counts or WorkerCounts()
    stored, built = dtype.name.lower(), shape()

    def compute(core: SimulatedCore | CardCore) -> str:
        done = channel_scores.fill(core, DTYPES[stored], pages, num_tokens, page_size, weights, scores)
        return "" if done else "not finite"

    if stored not in DTYPES:
        reason = f"dtype {stored}"
    elif page_size % (built.lanes * built.max_beats * ELEMENT_BYTES):
        reason = f"pages of {page_size}"
    elif weights.shape[1] > MAX_CHANNELS:
        reason = f"{weights.shape[1]} channels"
    else:
        reason = _tried(compute, counts) if np.isfinite(weights).all() else "queries not finite"
    if reason:
        _leave_to_numba(reason, counts)
        kernels.approximate_scores(pages, num_tokens, page_size, dtype, weights, scores)


def _leave_to_numba(reason: str, counts: WorkerCounts) -> None:
    if not options().fallback:
        raise CannotCompute(reason)
    _say_once(reason)
    counts.add(fallback_units=1)


@cache
def _say_once(reason: str) -> None:
    log.warning("the FPGA core cannot compute some units (%s): numba does", reason)


def _tried(compute: Callable[[SimulatedCore | CardCore], str], counts: WorkerCounts) -> str:
    """What `compute` says of a unit on this thread's core; counted. A failed card is a reason, too."""
    core = _core()
    cycles, beats = core.cycles, core.beats
    try:
        return compute(core)
    except CardFailed as error:
        return _failed("card failed", error)
    finally:
        streamed = (core.beats - beats) * core.shape.beat_bits // 8
        counts.add(core_units=1, core_cycles=core.cycles - cycles, core_bytes=streamed)


def _failed(what: str, error: Exception | str) -> str:
    """The reason to leave a unit to numba, if it may be."""
    _say_failed(str(error))
    if not options().fallback:
        raise WorkerFailed(what)
    return what


@cache
def _say_failed(error: str) -> None:
    log.error("the FPGA has failed: %s", error)


def _attend_unit(batch: AttentionBatch, unit: int, out: np.ndarray, lse: np.ndarray) -> str:
    """Why the core cannot; else nothing."""
    built = shape()
    position, tokens, keys, values = _blocks(batch, unit, built.block_tokens)
    item, first_head = batch.unit_item[unit], batch.unit_kv_head[unit] * batch.group_size
    queries = batch.queries[item, :, first_head : first_head + batch.group_size]
    if tokens.sum() > MAX_TOKENS:
        return f"{tokens.sum()} tokens"
    if not np.isfinite(queries).all():
        return "queries not finite"
    rows = queries.reshape(-1, batch.head_dim)
    start, stop = (
        np.repeat(bounds[item], batch.group_size).clip(0, (1 << 32) - 1)
        for bounds in (batch.visible_start, batch.visible_stop)
    )
    if not len(tokens):
        out[:], lse[:] = 0, -np.inf
        return ""
    found_out, found_lse = out.reshape(rows.shape), lse.reshape(-1)

    def compute(core: SimulatedCore | CardCore) -> str:
        for first in range(0, len(rows), built.rows):
            taken = slice(first, first + built.rows)
            count = len(rows[taken])
            padding = ((0, built.rows - count), (0, 0))
            quantised, exponents = quantised_queries(np.pad(rows[taken], padding), batch.scale)
            command = Command(
                quantised,
                exponents,
                np.pad(start[taken], padding[0]),
                np.pad(stop[taken], padding[0]),
                DTYPES[batch.dtype],
            )
            result = core.run(command, position, tokens, keys, values)
            if result.status < 0 or result.status & (BAD_LENGTH | BAD_COMMAND):
                return _failed(f"core status {result.status}", f"status {result.status} of a unit")
            if result.status:
                return "not finite" if result.status & NOT_FINITE else "score too large"
            row_out, row_lse = outputs(result)
            found_out[taken], found_lse[taken] = row_out[:count], row_lse[:count]
        return ""

    return _tried(compute, batch.counts)


def _blocks(
    batch: AttentionBatch, unit: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(position, tokens, address of K, of V) of runs of rows of up to `most` tokens."""
    pages = slice(int(batch.unit_first_page[unit]), int(batch.unit_first_page[unit + 1]))
    skipped = batch.page_first_row[pages] if len(batch.page_first_row) else 0
    tokens = batch.page_num_tokens[pages].astype(np.int64) - skipped
    position = batch.page_first_token[pages] + skipped
    offset = np.broadcast_to(np.asarray(skipped, np.int64) * batch.head_dim * ELEMENT_BYTES, tokens.shape)
    keys, values = (
        addresses[pages] + offset.astype(np.uint64) for addresses in (batch.key_pages, batch.value_pages)
    )
    parts = -(-tokens // most)
    which = np.repeat(np.arange(len(tokens)), parts)
    before = (np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)) * most
    step = (before * batch.head_dim * ELEMENT_BYTES).astype(np.uint64)
    return (
        position[which] + before,
        np.minimum(tokens[which] - before, most),
        keys[which] + step,
        values[which] + step,
    )
