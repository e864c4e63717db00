"""The numbers of Store.telemetry as Prometheus metrics: names, units, labels and help, each declared once here.

Base units (seconds, bytes, ratios), counters end in _total. What a drive counts has the label `drive`; sums are
the query's business. Labels are bounded: drives of a set, and tenants with models as kvfs.tenant_counters keeps
them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from spdk_glue.probes import BOUNDS_NS

NS_PER_SECOND = 1e9


class Number(NamedTuple):
    """A metric of one of a drive's counters. where: its layer and name in Store.counters."""

    name: str
    help: str
    where: tuple[str, str]
    scale: float = 1


COUNTERS = (
    Number("kvfs_flash_read_bytes", "Read from flash.", ("flash", "bytes_read")),
    Number("kvfs_flash_programmed_bytes", "Programmed to flash.", ("flash", "bytes_written")),
    Number("kvfs_host_written_bytes", "Written by the host.", ("flash", "host_bytes_written")),
    Number("kvfs_erased_superblocks", "Superblocks erased.", ("flash", "superblocks_erased")),
    Number("kvfs_media_syncs", "Syncs of the medium.", ("flash", "media_syncs")),
    Number("kvfs_corrupt_pages", "Pages whose checksum did not hold.", ("flash", "corrupt_pages")),
    Number("kvfs_repaired_pages", "Corrupt pages that parity gave back.", ("flash", "repaired_pages")),
    Number("kvfs_program_failures", "Erase blocks that failed to program.", ("flash", "program_failures")),
    Number("kvfs_erase_failures", "Erase blocks that failed to erase.", ("flash", "erase_failures")),
    Number("kvfs_attention_commands", "Attention commands done.", ("attention", "commands")),
    Number("kvfs_attention_failures", "Attention commands that failed.", ("attention", "failed")),
    Number("kvfs_attention_cancelled", "Attention commands cancelled.", ("attention", "cancelled")),
    Number("kvfs_attention_items", "Sequences attended over.", ("attention", "items")),
    Number(
        "kvfs_kernel_busy_seconds",
        "Spent in attention kernels, of all workers together: over kvfs_workers it is their use.",
        ("attention", "kernel_ns"),
        1 / NS_PER_SECOND,
    ),
    Number("kvfs_sparse_commands", "Sparse attention commands.", ("attention", "sparse_commands")),
    Number("kvfs_damaged_segments", "Times damaged derived data was met.", ("attention", "damaged_segments")),
    Number("kvfs_read_ahead_pages", "Read for commands to come.", ("attention", "pages_read_ahead")),
    Number("kvfs_core_cycles", "Cycles of FPGA cores with a unit under way.", ("attention", "core_cycles")),
    Number("kvfs_core_streamed_bytes", "K and V streamed to FPGA cores.", ("attention", "core_bytes")),
    Number("kvfs_fallback_units", "Units that a worker left to another.", ("attention", "fallback_units")),
    Number("kvfs_link_commands", "NVMe commands on the link.", ("link", "commands")),
    Number("kvfs_sealing_read_bytes", "Read to derive data from groups.", ("sealing", "bytes_read")),
    Number("kvfs_sealing_written_bytes", "Derived data written.", ("sealing", "bytes_written")),
)
GAUGES = (
    Number("kvfs_capacity_bytes", "For sequences, objects and files.", ("space", "capacity_bytes")),
    Number("kvfs_free_bytes", "Free of the capacity.", ("space", "free_bytes")),
    Number("kvfs_metadata_bytes", "Reserved for the catalogue.", ("space", "metadata_bytes")),
    Number("kvfs_tail_bytes", "Host memory of tokens that are not on flash yet.", ("memory", "tail_bytes")),
    Number("kvfs_workers", "Compute threads of the drive.", ("attention", "num_workers")),
    Number("kvfs_cache_capacity_bytes", "The drive's DRAM cache.", ("attention", "cache_bytes")),
    Number("kvfs_cache_used_bytes", "In the drive's DRAM cache.", ("attention", "cache_bytes_used")),
    Number("kvfs_mapped_pages", "Pages of flash that hold data.", ("flash", "mapped_pages")),
    Number("kvfs_bad_erase_blocks", "Factory and grown.", ("flash", "bad_erase_blocks")),
    Number("kvfs_erase_count_min", "Of the least worn superblock.", ("flash", "erase_count_min")),
    Number("kvfs_erase_count_mean", "Mean of all superblocks.", ("flash", "erase_count_mean")),
    Number("kvfs_erase_count_max", "Of the most worn superblock.", ("flash", "erase_count_max")),
    Number("kvfs_endurance_used_ratio", "Of the rated cycles.", ("flash", "percentage_used"), 0.01),
    Number("kvfs_available_spare_ratio", "Spare flash left.", ("flash", "available_spare_percent"), 0.01),
    Number(
        "kvfs_write_amplification_ratio",
        "Flash pages used up per host page since the drive was opened.",
        ("waf", "total"),
    ),
    Number(
        "kvfs_write_amplification_lifetime_ratio", "At least, since the drive was made.", ("waf", "lifetime")
    ),
    Number("kvfs_sketch_bytes", "Sketches on flash.", ("sealing", "sketch_bytes")),
)


class Split(NamedTuple):
    """A metric of several of a drive's counters, told apart by a label. values: of the label, by counter."""

    name: str
    help: str
    label: str
    layer: str
    values: dict[str, str]


SPLIT_COUNTERS = (
    Split(
        "kvfs_attention_pages",
        "Pages that attention commands read.",
        "source",
        "attention",
        {"pages_from_flash": "flash", "pages_from_cache": "cache"},
    ),
    Split(
        "kvfs_sparse_pages",
        "Pages that sparse commands read, by what they are.",
        "kind",
        "attention",
        {"index_pages": "index", "chosen_pages": "chosen", "dense_pages": "dense"},
    ),
    Split(
        "kvfs_link_bytes",
        "Over the link: entries and data.",
        "direction",
        "link",
        {"bytes_to_drive": "to_drive", "bytes_from_drive": "from_drive"},
    ),
)
STATES = ("free", "open", "full", "log", "erasing", "quarantined", "bad")
SPLIT_GAUGES = (
    Split(
        "kvfs_superblocks",
        "Superblocks by state.",
        "state",
        "flash",
        {f"{state}_superblocks": state for state in STATES},
    ),
)
CAUSES = {  # of pages used up, as kvfs.write_amplification has them
    "host": "host_pages_written",
    "garbage_collection": "gc_pages_written",
    "wear_levelling": "wear_leveling_pages_written",
    "padding": "padding_pages",
    "parity": "parity_pages_written",
    "metadata": "metadata_pages_written",
}


OF_EVICTION = {
    "evictions": "Sequences evicted, whatever for.",
    "expired": "Sequences evicted unasked for their time to live.",
    "watermark_evictions": "Sequences evicted for the drive's low watermark.",
    "refusals": "Requests for space that a cap refused.",
}


class StoreCollector(Collector):
    """read: gives what Store.telemetry does, once for each scrape."""

    def __init__(self, read: Callable[[], dict]):
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()  # registering asks the drive nothing

    def collect(self) -> Iterator[Metric]:
        telemetry = self._read()
        drives = telemetry["drives"]
        yield from _of_store(telemetry)
        yield from _of_requests(telemetry)
        yield _drive_states(drives)
        known = [(row["drive"], row["counters"]) for row in drives if "counters" in row]
        yield from (_of_drives(CounterMetricFamily, number, known) for number in COUNTERS)
        yield from (_of_drives(GaugeMetricFamily, number, known) for number in GAUGES)
        yield from (_split(CounterMetricFamily, split, known) for split in SPLIT_COUNTERS)
        yield from (_split(GaugeMetricFamily, split, known) for split in SPLIT_GAUGES)
        yield _written_by_cause(known)
        yield from _space(drives)
        yield from _queues(drives)
        yield from _prefixes(telemetry["prefix"]["tenants"])
        yield from _objects(telemetry["objects"])


def metrics_text(telemetry: dict) -> bytes:
    """In the text format that Prometheus reads. telemetry: as of Store.telemetry"""
    registry = CollectorRegistry()
    registry.register(StoreCollector(lambda: telemetry))
    return generate_latest(registry)


def _of_store(telemetry: dict) -> Iterator[Metric]:
    for name, total in telemetry["totals"].items():
        if total is not None:
            yield GaugeMetricFamily(f"kvfs_{name}", f"In the store: {name}.", value=total)
    evicted = telemetry.get("eviction", {})  # nothing of it where there is a drive and no store
    for name, what in OF_EVICTION.items():
        if name in evicted:
            yield CounterMetricFamily(f"kvfs_sequence_{name}", what, value=evicted[name])


def _of_requests(telemetry: dict) -> Iterator[Metric]:
    durations = HistogramMetricFamily(
        "kvfs_request_duration_seconds", "What requests of the store took.", labels=["operation"]
    )
    for row in telemetry["latencies"]:
        _add_histogram(durations, [row["name"]], row)
    yield durations
    failures = CounterMetricFamily("kvfs_request_failures", "Requests that failed.", labels=["operation"])
    for operation, count in telemetry["failures"].items():
        failures.add_metric([operation], count)
    yield failures


def _add_histogram(family: HistogramMetricFamily, labels: list[str], row: dict) -> None:
    buckets, total = [], 0
    bounds = [*(f"{bound / NS_PER_SECOND:.9f}".rstrip("0") for bound in BOUNDS_NS), "+Inf"]
    for bound, count in zip(bounds, row["counts"], strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric(labels, buckets, row["sum_ns"] / NS_PER_SECOND)


def _drive_states(drives: list[dict]) -> Metric:
    up = GaugeMetricFamily(
        "kvfs_drive_up", "1 while the drive can be used, by its state.", labels=["drive", "state"]
    )
    for row in drives:
        up.add_metric([row["drive"], row["state"]], int("counters" in row))
    return up


def _of_drives(kind: type, number: Number, known: list[tuple[str, dict]]) -> Metric:
    layer, name = number.where
    family = kind(number.name, number.help, labels=["drive"])
    for drive, counters in known:
        value = counters[layer].get(name)  # a link that counts nothing has none
        if value is not None:
            family.add_metric([drive], value * number.scale)
    return family


def _split(kind: type, split: Split, known: list[tuple[str, dict]]) -> Metric:
    family = kind(split.name, split.help, labels=["drive", split.label])
    for drive, counters in known:
        for name, value in split.values.items():
            if name in counters[split.layer]:
                family.add_metric([drive, value], counters[split.layer][name])
    return family


def _written_by_cause(known: list[tuple[str, dict]]) -> Metric:
    family = CounterMetricFamily(
        "kvfs_flash_used_bytes",
        "Flash used up, by cause: over that of the host it is the write amplification.",
        labels=["drive", "cause"],
    )
    for drive, counters in known:
        flash = counters["flash"]
        for cause, name in CAUSES.items():
            pages = flash[name] - (flash[CAUSES["wear_levelling"]] if cause == "garbage_collection" else 0)
            family.add_metric([drive, cause], pages * flash["page_size"])
    return family


def _space(drives: list[dict]) -> Iterator[Metric]:
    blocks = GaugeMetricFamily(
        "kvfs_space_bytes",
        "What a drive's space is taken by: blocks by what they are for, and flash reserved beyond them.",
        labels=["drive", "kind"],
    )
    pages = GaugeMetricFamily(
        "kvfs_flash_bytes", "All flash of a drive, by the state of its pages.", labels=["drive", "state"]
    )
    for row in drives:
        space = row.get("space", {})  # nothing of it where there is a drive and no store
        for family, sizes in ((blocks, "blocks"), (pages, "pages")):
            for kind, size in space.get(sizes, {}).items():
                family.add_metric([row["drive"], kind], size)
    yield blocks
    yield pages


def _queues(drives: list[dict]) -> Iterator[Metric]:
    outstanding = GaugeMetricFamily("kvfs_commands_outstanding", "NVMe commands under way.", labels=["drive"])
    durations = HistogramMetricFamily(
        "kvfs_layer_duration_seconds",
        "What work of a layer below the store took: queue, drive, ftl, media, kernel.",
        labels=["drive", "layer", "operation"],
    )
    for row in drives:
        if "counters" in row:
            outstanding.add_metric([row["drive"]], row["commands_outstanding"])
            for of_layer in row["latencies"]:
                _add_histogram(durations, [row["drive"], of_layer["layer"], of_layer["name"]], of_layer)
    yield outstanding
    yield durations


def _prefixes(tenants: list[dict]) -> Iterator[Metric]:
    yield from _lookups("kvfs_prefix", "Look-ups for stored prefixes", ["tenant", "model"], tenants)
    for name in ("wanted", "found"):
        tokens = CounterMetricFamily(
            f"kvfs_prefix_tokens_{name}", f"Tokens {name} by look-ups.", labels=["tenant", "model"]
        )
        for row in tenants:
            tokens.add_metric([row["tenant"], row["model"]], row[f"tokens_{name}"])
        yield tokens


def _lookups(prefix: str, what: str, labels: list[str], rows: list[dict]) -> Iterator[Metric]:
    """By result, and by why less was found than was wanted; reasons that never came are left out."""
    results = CounterMetricFamily(f"{prefix}_lookups", f"{what}, by result.", labels=[*labels, "result"])
    misses = CounterMetricFamily(
        f"{prefix}_misses", f"{what} that found less than they wanted, by reason.", labels=[*labels, "reason"]
    )
    for row in rows:
        named = [row[label] for label in labels]
        results.add_metric([*named, "hit"], row["hits"])
        results.add_metric([*named, "miss"], row["misses"])
        for name, count in row.items():
            if name.startswith("miss_") and count:
                misses.add_metric([*named, name.removeprefix("miss_")], count)
    yield results
    yield misses


OF_CACHES = {"objects": "Objects held.", "bytes": "Of objects held.", "capacity_bytes": "The cap."}
COUNTED_OF_CACHES = {
    "stored": "Objects stored.",
    "present": "Objects that were there already.",
    "refused": "Objects refused for want of room.",
    "declined": "Objects declined because they were offered for the first time.",
    "evictions": "Objects evicted.",
    "bytes_read": "Read.",
    "bytes_written": "Written.",
    "bytes_spared": "Of objects that were declined, and so not written.",
}


def _objects(objects: dict) -> Iterator[Metric]:
    caches = objects["caches"]
    for name, what in OF_CACHES.items():
        gauge = GaugeMetricFamily(f"kvfs_object_cache_{name}", what, labels=["cache"])
        for row in caches:
            if row[name] is not None:
                gauge.add_metric([row["cache"]], row[name])
        yield gauge
    for name, what in COUNTED_OF_CACHES.items():
        unit = f"{name.removeprefix('bytes_')}_bytes" if name.startswith("bytes_") else name
        counter = CounterMetricFamily(f"kvfs_object_cache_{unit}", what, labels=["cache"])
        for row in caches:
            counter.add_metric([row["cache"]], row[name])
        yield counter
    yield from _lookups("kvfs_object", "Objects asked for", ["cache"], caches)
    of_requests = ["cache", "tenant", "model"]
    yield from _lookups("kvfs_object_request", "Engines' requests for objects", of_requests, objects["tenants"])
