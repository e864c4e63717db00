"""The plan: from a request and what was measured to what is chosen, why, and what it is predicted to give."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from accel.page_cache import LINE_BYTES
from accel.sketch.selection import run_of
from kvfs.engines.x_cache.share import DRIVE, HOST, seconds_of, share_of
from kvfs.errors import InvalidArgument
from kvfs.layout import GroupLayout
from kvfs_bench.planner import formulas
from kvfs_bench.planner.measured_quality import Quality, quality_of
from kvfs_bench.planner.model_shape import PAGE_SIZE, ModelShape
from kvfs_bench.planner.prediction import Step, Workload, predict
from kvfs_bench.planner.rates import DriveRates, Rates
from spdk_glue.vendor_command import DTYPE_OF_NAME, Derive

OVERHEAD_BYTES = 44 << 20  # the drive's map and index, the catalogue, units under way
MIN_CACHE_BYTES = 8 << 20  # of each drive
WORTH_IT = 0.97  # of the time without: what gains less is not recommended
MAX_CONTEXT = 1 << 30
MAX_BATCH = 4096
LONG_RUN_BYTES = 256 << 10  # smaller spills are written once more when their group is full (kvfs/tail.py)
SHARES_TRIED = 20
DERIVES = (Derive.SKETCH, Derive.CHANNEL_MAJOR_KEYS)


@dataclass(frozen=True)
class Request:
    """memory_bytes: for the KV cache, kvfs's own needs included, the model's weights not; num_drives: at most.
    Raises InvalidArgument naming the field."""

    shape: ModelShape
    memory_bytes: int
    context: int
    batch: int
    num_drives: int = 1
    x_in_host_memory: bool = False

    def __post_init__(self):
        for name, most in (("context", MAX_CONTEXT), ("batch", MAX_BATCH), ("num_drives", 64)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise InvalidArgument(f"{name} is a whole number from 1 to {most:,}, not {value!r}")
        if self.memory_bytes < self.least_memory_bytes:
            raise InvalidArgument(
                f"memory is at least {self.least_memory_bytes >> 20} MiB for the newest tokens of this model"
                f" and batch, the drives' least caches and kvfs itself, not {self.memory_bytes >> 20} MiB"
            )

    @property
    def layout(self) -> GroupLayout:
        return GroupLayout(self.shape.geometry, PAGE_SIZE)

    @property
    def tail_bytes(self) -> int:
        """Of the images in which the newest tokens wait."""
        return self.batch * self.shape.geometry.num_layers * self.layout.in_memory.image_bytes

    @property
    def least_memory_bytes(self) -> int:
        return self.tail_bytes + OVERHEAD_BYTES + self.num_drives * MIN_CACHE_BYTES

    @property
    def cache_bytes(self) -> int:
        """Of all drives together."""
        return self.memory_bytes - self.tail_bytes - OVERHEAD_BYTES

    @property
    def layer_bytes(self) -> int:
        """Pages of K and V that one layer's command reads, for the whole batch."""
        return self.batch * formulas.flash_pages(self.layout, self.context) * PAGE_SIZE

    @property
    def kv_bytes(self) -> int:
        return self.shape.geometry.num_layers * self.layer_bytes

    @property
    def cached_bytes(self) -> int:
        """Of kv_bytes, those that the drives' caches keep from step to step."""
        return formulas.cached_bytes(self.kv_bytes, self.cache_bytes, self.layer_bytes)

    @property
    def share_cached(self) -> float:
        return self.cached_bytes / self.kv_bytes if self.kv_bytes else 1.0

    @property
    def fits(self) -> bool:
        return self.kv_bytes <= self.cache_bytes


def workload(request: Request, writeback: int, tail_tokens: float | None = None) -> Workload:
    """tail_tokens: half of what waits for a spill, unless it is known."""
    geometry = request.shape.geometry
    return Workload(
        geometry.num_layers,
        request.batch,
        request.layer_bytes,
        request.cached_bytes,
        writeback / 2 if tail_tokens is None else tail_tokens,
        writeback,
    )


@dataclass(frozen=True)
class Compression:
    """quality: None where nobody has measured it."""

    compression: int
    share: float  # of the dense page bytes
    step: Step
    tokens_per_second: float
    quality: Quality | None


@dataclass(frozen=True)
class Writeback:
    tokens: int
    seconds: float  # of a step: the host's tail and the spills
    flash_writes: int  # of each page


@dataclass(frozen=True)
class XCache:
    """formula: alpha by the bandwidths alone; share: alpha chosen; recompute_seconds: of all K and V a step"""

    rho: float
    formula: float
    share: float
    drives_seconds: float
    link_seconds: float
    recompute_seconds: float | None
    tokens_per_second: float
    why: str


@dataclass(frozen=True)
class Storage:
    """In a storage dtype, all layers: flash of a token's K and V, what sparse attention keeps beside."""

    dtype: str
    token_bytes: float
    sketch_bytes: float  # for compression and target errors
    channel_bytes: float  # channel-major copies, for SparF
    kv_bytes: int
    media_seconds: float  # of a dense step, by this machine's media
    fits: bool


@dataclass(frozen=True)
class Candidate:
    num_drives: int
    num_workers: int
    step: Step
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    request: Request
    rates: Rates
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    writeback: tuple[Writeback, ...]
    writeback_tokens: int
    compressions: tuple[Compression, ...]
    compression: int | None  # None: dense
    x_cache: XCache
    storage: tuple[Storage, ...]
    link: formulas.LinkBytes

    @property
    def drive_rates(self) -> DriveRates:
        return self.rates_of(self.chosen)

    def rates_of(self, candidate: Candidate) -> DriveRates:
        return self.rates.drives[self.candidates.index(candidate)]

    @property
    def step(self) -> Step:
        """Of dense attention."""
        return self.chosen.step

    @property
    def chosen_compression(self) -> Compression | None:
        return next((one for one in self.compressions if one.compression == self.compression), None)

    @property
    def tokens_per_second(self) -> float:
        """With all that was chosen."""
        return (self.chosen_compression or self.chosen).tokens_per_second


def make_plan(request: Request, rates: Rates) -> Plan:
    model_seconds = rates.model.seconds or 0.0
    first = rates.drives[0]
    writeback = writebacks(request, first)
    work = workload(request, writeback[-1].tokens)
    default_step = predict(first, rates.num_cpus, work, model_seconds).total
    best = choose_writeback(writeback, default_step)
    work = workload(request, best.tokens)
    candidates = []
    for found in rates.drives:
        step = predict(found, rates.num_cpus, work, model_seconds)
        candidates.append(
            Candidate(found.num_drives, found.num_workers, step, step.tokens_per_second(request.batch))
        )
    chosen = candidates[0]  # one drive with a worker for each CPU, unless another is worth it
    for other in sorted(candidates[1:], key=lambda found: found.step.total):
        if other.step.total < WORTH_IT * chosen.step.total:
            chosen = other
            break
    plan = Plan(
        request, rates, chosen, tuple(candidates), tuple(writeback), best.tokens, (), None, None, (), None
    )
    found = tuple(compressions(plan, work))
    return replace(
        plan,
        compressions=found,
        compression=choose_compression(chosen, found),
        x_cache=choose_x_cache(plan),
        storage=tuple(storages(plan)),
        link=formulas.link_bytes(request.shape.geometry, request.batch, request.context),
    )


def writebacks(request: Request, rates: DriveRates) -> list[Writeback]:
    """What tokens that wait and spills cost together, from a page's tokens to a group's."""
    layout, geometry = request.layout, request.shape.geometry
    found, tokens = [], layout.tokens_per_page
    while True:
        tokens = min(tokens, geometry.group_tokens)
        of_layer = tokens / 2 * rates.tail + rates.spill / tokens
        piece_bytes = layout.image_bytes * tokens // geometry.group_tokens
        is_rewritten = (
            piece_bytes < LONG_RUN_BYTES and not geometry.is_quantized and tokens < geometry.group_tokens
        )
        found.append(
            Writeback(tokens, geometry.num_layers * request.batch * of_layer, 2 if is_rewritten else 1)
        )
        if tokens == geometry.group_tokens:
            return found
        tokens *= 2


def choose_writeback(found: list[Writeback], step_seconds: float) -> Writeback:
    """A whole group, which is written once and lies in one run, unless fewer tokens make the step shorter."""
    whole, best = found[-1], min(found, key=lambda one: one.seconds)
    return best if whole.seconds - best.seconds > (1 - WORTH_IT) * step_seconds else whole


def compressed_workload(request: Request, dense: Workload, compression: int) -> Workload | None:
    """A step that reads a sketch of all tokens in whole groups and refinements of a few; None: no group.

    Index pages have priority in a cache. In what they leave are refinements, of which each step chooses others.
    """
    geometry = request.shape.geometry
    pages = formulas.sketch_pages(geometry, request.context, compression, PAGE_SIZE)
    if not pages.dense:
        return None
    of_layer = request.batch * geometry.num_kv_heads * PAGE_SIZE
    layer_bytes = of_layer * (pages.index + pages.refinement)
    index_bytes, pool_bytes, refined_bytes = (
        geometry.num_layers * of_layer * count
        for count in (pages.index, pages.all_refinement, pages.refinement)
    )
    # a chosen run of pages takes a line of the cache, however little of it is read
    num_runs = math.ceil(pages.refinement / run_of(PAGE_SIZE // geometry.head_dim))
    lines = of_layer // PAGE_SIZE * num_runs * LINE_BYTES
    pinned = of_layer * pages.index + min(lines, of_layer * pages.all_refinement)
    kept = formulas.cached_bytes(index_bytes + pool_bytes, request.cache_bytes, pinned)
    index_cached = min(index_bytes, kept)
    refined_cached = (kept - index_cached) / pool_bytes * refined_bytes
    return replace(
        dense,
        layer_bytes=layer_bytes,
        refined_bytes=of_layer * pages.refinement,
        cached_bytes=index_cached + refined_cached,
        refined_cached_bytes=refined_cached,
    )


def compressions(plan: Plan, dense: Workload) -> Iterator[Compression]:
    """None where the context fits in memory: then no sketch was measured, as none is needed."""
    request, rates = plan.request, plan.drive_rates
    if rates.sketch is None:
        return
    for compression in formulas.COMPRESSIONS:
        work = compressed_workload(request, dense, compression)
        if work is not None:
            step = predict(rates, plan.rates.num_cpus, work, plan.rates.model.seconds or 0.0)
            share = work.layer_bytes / request.layer_bytes
            rate = step.tokens_per_second(request.batch)
            yield Compression(compression, share, step, rate, quality_of(compression))


def choose_compression(chosen: Candidate, found: tuple[Compression, ...]) -> int | None:
    """Dense unless something whose quality is known is faster."""
    known = [one for one in found if one.quality is not None]
    best = max(known, key=lambda one: one.tokens_per_second, default=None)
    if best is None or best.tokens_per_second * WORTH_IT <= chosen.tokens_per_second:
        return None
    return best.compression


def choose_x_cache(plan: Plan) -> XCache:
    """The formula's alpha, or less of it where recomputing K and V takes longer than it saves."""
    request, rates = plan.request, plan.rates
    geometry, rho = request.shape.geometry, request.shape.rho
    from_flash, media = plan.step.flash_bytes, plan.drive_rates.media
    placement = HOST if request.x_in_host_memory else DRIVE
    formula = share_of(rho, rates.link, media, placement)
    drives_seconds, link_seconds = seconds_of(formula, rho, from_flash, rates.link, media, placement)
    recompute = None
    if rates.model.projection_flops:
        operations = 2 * request.shape.hidden_size * 2 * geometry.num_kv_heads * geometry.head_dim
        tokens = request.batch * request.context * geometry.num_layers
        recompute = operations * tokens / rates.model.projection_flops
    without = plan.step.total

    def total(share: float) -> float:
        """What is not read is saved, unless the host needs longer for its share."""
        on_drives, on_link = seconds_of(share, rho, from_flash, rates.link, media, placement)
        saved = from_flash / media - on_drives
        return max(without - saved, on_link + share * (recompute or 0.0) + (rates.model.seconds or 0.0))

    share, why = 0.0, ""
    if formula == 0:
        why = f"X is {rho:.2g} times as large as K and V: it would save no reads from the drive"
    elif not from_flash:
        why = "nothing is read from flash"
    elif recompute is None:
        why = "how long recomputing K and V takes is not known without hidden_size"
    else:
        tried = [formula * i / SHARES_TRIED for i in range(SHARES_TRIED + 1)]
        share = min(tried, key=total)
        if total(share) > WORTH_IT * without:
            share = 0.0
            why = f"recomputing K and V of alpha {formula:.2f} takes {formula * recompute:.3g} s a step here"
        elif share < formula:
            why = f"recomputing all of the formula's share would take {formula * recompute:.3g} s a step"
        else:
            why = "link and drives end together"
    return XCache(
        rho, formula, share, drives_seconds, link_seconds, recompute, request.batch / total(share), why
    )


def storages(plan: Plan):
    """K and V in other storage dtypes: bytes, and how long these media need for them."""
    request, shape = plan.request, plan.request.shape
    for dtype in DTYPE_OF_NAME:
        try:
            other = replace(request, shape=shape.stored_as(dtype))
        except InvalidArgument:  # not in this head_dim, or memory
            continue
        seconds = (other.kv_bytes - other.cached_bytes) / plan.drive_rates.media
        group_bytes = other.layout.group_lbas * PAGE_SIZE
        geometry = other.shape.geometry
        sketches, channels = (formulas.derived_token_bytes(geometry, derive, PAGE_SIZE) for derive in DERIVES)
        token_bytes = group_bytes / geometry.group_tokens
        yield Storage(dtype, token_bytes, sketches, channels, other.kv_bytes, seconds, other.fits)


def as_dict(plan: Plan) -> dict:
    """For JSON: plain values, seconds and bytes."""
    request, geometry = plan.request, plan.request.shape.geometry
    return {
        "model": {"name": request.shape.name, **asdict(geometry), "hidden_size": request.shape.hidden_size},
        "memory_bytes": request.memory_bytes,
        "cache_bytes": request.cache_bytes,
        "tail_bytes": request.tail_bytes,
        "context": request.context,
        "batch": request.batch,
        "kv_bytes": request.kv_bytes,
        "fits_in_memory": request.fits,
        "measured": plan.rates.as_dict(),
        "choice": {
            "num_drives": plan.chosen.num_drives,
            "num_workers": plan.chosen.num_workers,
            "writeback_tokens": plan.writeback_tokens,
            "compression": plan.compression,
            "x_cache_share": plan.x_cache.share,
            "dtype": geometry.dtype,
        },
        "step": {**asdict(plan.step), "total": plan.step.total},
        "tokens_per_second": plan.tokens_per_second,
        "dense_tokens_per_second": plan.chosen.tokens_per_second,
        "candidates": [asdict(one) for one in plan.candidates],
        "writeback": [asdict(one) for one in plan.writeback],
        "compressions": [asdict(one) for one in plan.compressions],
        "x_cache": asdict(plan.x_cache),
        "storage": [asdict(one) for one in plan.storage],
        "link_bytes": asdict(plan.link),
    }
