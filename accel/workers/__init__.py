"""Attention workers: what computes over pages. All take an AttentionBatch; `reference` is the definition.

A worker is a module with `name` and two operations:

- `attend_units(batch, units, out, lse)` computes units of a batch, taken from a UnitRange until none is left;
- `prepare(dtype, head_dim, group_size) -> float` makes it ready (compiles) and returns the seconds that took.

One may have a third, `approximate_scores`, as accel.sparf.kernels has it and with `counts`; else that one is
used.

Both raise ValueError for a dtype or size that no kernel takes; `attend_units` raises BadScales for a quantized
page whose scales are damaged or missing, CannotCompute for what this worker has no numbers for and WorkerFailed
where it has broken down. A worker that needs what may not be there has `check_ready()`, which raises
ValueError.
"""

import threading
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np

from accel.workers.unit_range import UnitRange as UnitRange
from spdk_glue import vendor_command
from spdk_glue.vendor_command import DTYPE_NAME, INT4_CHANNELS

WORKERS = {  # modules, loaded on use
    "numba": "accel.workers.numba",
    "reference": "accel.workers.reference",
    "fpga": "accel.workers.fpga",
}
DTYPES = tuple(DTYPE_NAME.values())
QUANTIZED = tuple(name for dtype, name in DTYPE_NAME.items() if dtype in vendor_command.QUANTIZED)
HEAD_DIM_MIN, HEAD_DIM_MAX, HEAD_DIM_MULTIPLE = 32, 256, 8
GROUP_SIZE_MAX = 16


class BadScales(Exception):
    """A page has a scale that is not finite and above zero. page: its place in the batch's keys, or values."""

    def __init__(self, page: int, of_values: bool):
        super().__init__(f"scales of page {page} of the batch's {'values' if of_values else 'keys'}")
        self.page = page
        self.of_values = of_values


class CannotCompute(ValueError):
    """A worker that stands alone has no numbers for this; its text is the reason, 21 characters at most."""


class WorkerFailed(Exception):
    """A worker has broken down; its text says how, in 21 characters at most."""


class WorkerCounts:
    """What workers tell of their units, beside the results. Safe to use from several threads.

    core_units, core_cycles, core_bytes: computed by cores that count their cycles, and the K and V streamed to
    them; fallback_units: left to another worker
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("core_units", "core_cycles", "core_bytes", "fallback_units"), 0)

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def as_dict(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


def load_worker(name: str):
    """The worker of a name; raises KeyError with a line for the user."""
    if name not in WORKERS:
        raise KeyError(f"no worker named {name!r}: choose one of {', '.join(WORKERS)}")
    return import_module(WORKERS[name])


def host_worker(name: str):
    """What computes the host's part beside a drive's worker of a name: tails are in the host's memory, and far
    from a card."""
    return load_worker("numba" if name == "fpga" else name)


def check_worker(name: str) -> None:
    """Raises KeyError as load_worker does, and ValueError if the worker cannot be had on this machine."""
    check_ready = getattr(load_worker(name), "check_ready", None)
    if check_ready is not None:
        check_ready()


def check_shape(dtype: str, head_dim: int, group_size: int) -> None:
    """Raises ValueError for what the workers do not take."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if not HEAD_DIM_MIN <= head_dim <= HEAD_DIM_MAX or head_dim % HEAD_DIM_MULTIPLE:
        raise ValueError(
            f"head_dim {head_dim} is no multiple of {HEAD_DIM_MULTIPLE} from {HEAD_DIM_MIN} to {HEAD_DIM_MAX}"
        )
    if dtype == "int4" and head_dim % INT4_CHANNELS:
        raise ValueError(f"head_dim {head_dim} is no multiple of {INT4_CHANNELS}, as int4 needs it")
    if not 1 <= group_size <= GROUP_SIZE_MAX:
        raise ValueError(f"group size {group_size} is not in 1 to {GROUP_SIZE_MAX}")


@dataclass
class AttentionBatch:
    """One command's work: partial attention of many units.

    A unit is one item (a sequence's queries) on one KV head over a run of pages. A page is raw memory:
    rows [token, head_dim] of one KV head's keys (or values), packed from byte 0; bytes behind the last
    row are slack and never read.

    dtype: of K and V as they lie in pages, little endian; see spdk_glue.vendor_command for the quantized ones
    head_dim: a multiple of 8, 32 to 256; group_size: query heads per KV head, 1 to 16
    key_pages, value_pages: uint64 [num_pages], addresses, 64-byte aligned
    page_first_token: int64 [num_pages], position in the sequence of the page's row 0
    page_num_tokens: int32 [num_pages], rows in use
    page_first_row: int32 [num_pages], the first of them, or empty: 0
    unit_first_page: int64 [num_units + 1]; unit_item, unit_kv_head: int32 [num_units]
    queries: float32 [num_items, num_queries, num_query_heads, head_dim]; head h reads KV head
        h // group_size
    visible_start, visible_stop: int64 [num_items, num_queries]: a query sees start <= position < stop
    scale: score = scale * q . k
    softcap: above 0, scores become softcap * tanh(score / softcap)
    alibi_slopes: float32 [num_query_heads], or empty; score -= slope * (query_position - position)
    query_position: int64 [num_items, num_queries], where each query stands; of no use without slopes
    scales_offset: byte of a quantized page at which its scales begin
    counts: of the drive's, or whoever else wants to know

    `attend_units` fills, at the units it takes, out float32 [num_units, num_queries, group_size, head_dim]
    and lse float32 [num_units, num_queries, group_size], natural log, -inf (and out zero) where a query
    sees nothing of the unit, or only tokens whose score is -inf. Several threads may take units of one
    range at once.

    Infinities and NaN in K, V or queries go where IEEE arithmetic takes them and no further: a token of NaN
    or +inf score makes its head's out and lse NaN; a V that is not finite makes its channel infinite or NaN.
    Tokens that a query does not see have no influence, whatever they hold.
    """

    dtype: str
    head_dim: int
    group_size: int
    key_pages: np.ndarray
    value_pages: np.ndarray
    page_first_token: np.ndarray
    page_num_tokens: np.ndarray
    unit_first_page: np.ndarray
    unit_item: np.ndarray
    unit_kv_head: np.ndarray
    queries: np.ndarray
    visible_start: np.ndarray
    visible_stop: np.ndarray
    scale: float
    softcap: float = 0.0
    alibi_slopes: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    query_position: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    scales_offset: int = 0
    page_first_row: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    counts: WorkerCounts = field(default_factory=WorkerCounts)
