"""How long a decode step takes, from what was measured and what it moves.

One layer after the other: append the new token's K and V, attend. In a command the media, the kernels and the
host's part over the tail overlap as the drive overlaps them:

- pages in the drive's cache: kernels, all workers (one thread up to INLINE_BYTES), then the host's tail;
- pages on flash, up to INLINE_BYTES: one thread reads, then computes, then the host's tail;
- beyond: windows are read while workers compute those before and the host its tail; the last window is computed
  after the last read, or the first is read before anything is computed. Readers, workers and the host share
  the CPUs, which may be the limit;
- compressed: index pages are read while others are computed; then, chosen by these, refinements likewise.

Commands of drives of a set run side by side, each over its share of the heads.
"""

from dataclasses import astuple, dataclass

from kvfs_bench.planner.rates import INLINE_BYTES, WINDOW_BYTES, DriveRates, SketchCosts


@dataclass(frozen=True)
class Command:
    """One layer's attend call. num_bytes: of pages on all drives; from_flash: of these, not in a cache;
    tail: seconds of the host's attention over what is not on flash; refined_bytes: of num_bytes, refinements in
    single pages, the rest is index pages; None: K and V themselves; refined_from_flash: of both"""

    num_bytes: float
    from_flash: float
    tail: float = 0.0
    refined_bytes: float | None = None
    refined_from_flash: float = 0.0


@dataclass(frozen=True)
class CommandTime:
    """Seconds. media, kernel, tail, command: each alone; total: with what overlaps; limit: its largest term"""

    media: float
    kernel: float
    tail: float
    command: float
    total: float
    limit: str


def command_seconds(rates: DriveRates, num_cpus: int, command: Command) -> CommandTime:
    if command.refined_bytes is not None:
        return _sketch_seconds(rates, num_cpus, command)
    share = command.num_bytes / rates.num_drives  # of one drive, as all drives work side by side
    is_inline = share <= INLINE_BYTES
    threads = min(rates.num_drives * (1 if is_inline else rates.num_workers), num_cpus)
    kernel = command.num_bytes * rates.kernel / threads
    media = media_seconds(rates, command)
    beside = rates.cold_command if command.from_flash else rates.cached_command
    if is_inline or not command.from_flash:
        working = media + kernel + command.tail
        limit = _largest(media, kernel, command.tail, beside)
    else:
        window = min(1.0, WINDOW_BYTES / share)  # of the command, on all drives at once
        cpu = command.from_flash * rates.read_cpu + command.num_bytes * rates.kernel + command.tail
        ways = {
            "media": media + window * kernel,
            "kernel": window * media + kernel + command.tail,  # which compete for the CPUs
            "CPUs": cpu / num_cpus,
        }
        limit = max(ways, key=ways.get)
        working = ways[limit]
    return CommandTime(media, kernel, command.tail, beside, beside + working, limit)


def media_seconds(rates: DriveRates, command: Command) -> float:
    """Reading around what is cached takes no longer than reading all of it would."""
    return min(command.from_flash / rates.media_around_cached, command.num_bytes / rates.media)


def _sketch_seconds(rates: DriveRates, num_cpus: int, command: Command) -> CommandTime:
    threads = min(rates.num_drives * rates.num_workers, num_cpus)
    index_bytes = command.num_bytes - command.refined_bytes
    index_from_flash = command.from_flash - command.refined_from_flash
    costs = _between(rates.sketch.kept, rates.sketch.cold, index_from_flash, index_bytes)
    media = (
        index_from_flash / rates.media,
        command.refined_from_flash / (rates.media_random * rates.num_drives),
    )
    kernel = (
        index_bytes * costs.index_kernel / threads,
        command.refined_bytes * costs.refined_kernel / threads,
    )
    working = sum(map(max, media, kernel)) + command.tail
    beside = costs.command + command.refined_bytes * costs.refined_command
    limit = _largest(sum(media), sum(kernel), command.tail, beside)
    return CommandTime(sum(media), sum(kernel), command.tail, beside, beside + working, limit)


def _between(cached: SketchCosts, read: SketchCosts, from_flash: float, num_bytes: float) -> SketchCosts:
    """Costs where of num_bytes so many come from flash."""
    share = min(1.0, max(0.0, from_flash / num_bytes)) if num_bytes else 0.0
    pairs = zip(astuple(cached), astuple(read), strict=True)
    return SketchCosts(*(a + share * (b - a) for a, b in pairs))


def _largest(media: float, kernel: float, tail: float, command: float) -> str:
    terms = {"media": media, "kernel": kernel, "host's tail": tail, "commands": command}
    return max(terms, key=terms.get)


@dataclass(frozen=True)
class Workload:
    """A decode step: in each layer one command over layer_bytes of pages, of which cached_bytes of all layers
    together are in the drives' caches."""

    num_layers: int
    batch: int
    layer_bytes: float
    cached_bytes: float
    tail_tokens: float  # of each sequence and layer, waiting with the host
    writeback_tokens: int
    refined_bytes: float | None = None  # of layer_bytes, see Command
    refined_cached_bytes: float = 0.0  # of cached_bytes


@dataclass(frozen=True)
class Step:
    """Seconds of a decode step; terms are each alone, in all layers, `attention` with what overlaps."""

    media: float
    kernel: float
    tail: float
    commands: float
    appends: float
    spills: float
    model: float
    attention: float
    limit: str
    flash_bytes: float

    @property
    def total(self) -> float:
        return self.attention + self.model

    def tokens_per_second(self, batch: int) -> float:
        return batch / self.total


def predict(rates: DriveRates, num_cpus: int, work: Workload, model_seconds: float = 0.0) -> Step:
    """What the caches keep is spread over all layers, as it is after some rounds: layers that were whole in a
    cache at first lose lines to others."""
    all_bytes = work.num_layers * work.layer_bytes
    share_cached = min(1.0, work.cached_bytes / all_bytes) if all_bytes else 1.0
    tail = work.tail_tokens * work.batch * rates.tail
    from_flash = work.layer_bytes * (1 - share_cached)
    refined_from_flash = 0.0
    if work.refined_bytes is not None:
        refined_from_flash = work.refined_bytes - work.refined_cached_bytes / work.num_layers
    command = Command(work.layer_bytes, from_flash, tail, work.refined_bytes, refined_from_flash)
    time = command_seconds(rates, num_cpus, command)
    appends = work.num_layers * work.batch * rates.append
    spills = work.num_layers * work.batch * rates.spill / work.writeback_tokens
    attention = work.num_layers * time.total + appends + spills
    limit = time.limit
    if model_seconds > attention:
        limit = "model"
    return Step(
        work.num_layers * time.media,
        work.num_layers * time.kernel,
        work.num_layers * time.tail,
        work.num_layers * time.command,
        appends,
        spills,
        model_seconds,
        attention,
        limit,
        all_bytes * (1 - share_cached),
    )
