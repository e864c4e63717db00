"""pyspdk and our own initiator against spdk_nvme_perf, and attention over a drive whose flash SPDK reads.

All on one target in one run. The target is SPDK's own, over TCP on loopback, its namespace in memory, on the
first CPU; each side has the second. Where there are only two, attention's workers share them with the driver
and the target.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvfs_bench.figures import Figure
from kvfs_bench.nvmf_target import Target, why_no_spdk

GB = 1e9
BATCH = 32
ROUNDS = 5
SECONDS = 2
NAMESPACE_BYTES = 1 << 30
MAX_IO_BYTES = 1 << 20
PERF_MEMORY_MB = 256
COLD_CACHE_BYTES = 64 << 20
COLD_TOKENS, COLD_TOKENS_QUICK = 32_768, 8192  # 512 and 128 MiB
NUM_LAYERS, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 4, 8, 4, 128
TOTAL = re.compile(r"^Total\s*:\s*([\d.]+)\s+([\d.]+)", re.MULTILINE)


class SpdkMissing(Exception):
    """There is nothing to measure; says why."""


def perf(target, io_bytes: int, pattern: str, depth: int, seconds: float, nsid: int = 1) -> float:
    """Commands per second of spdk_nvme_perf on the second CPU; target: whatever has a `transport_id`."""
    done = subprocess.run(
        [
            *(
                "spdk_nvme_perf",
                "-q",
                str(depth),
                "-o",
                str(io_bytes),
                "-w",
                pattern,
                "-t",
                str(round(seconds)),
            ),
            *("-c", "0x2", "-s", str(PERF_MEMORY_MB), "--no-huge", "-r", f"{target.transport_id} ns:{nsid}"),
        ],
        capture_output=True,
        text=True,
    )
    found = TOTAL.search(done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"spdk_nvme_perf failed: {done.stderr.strip()[-500:]}")
    return float(found[1])


def pyspdk_rate(transport_id: str, io_bytes: int, is_random: bool, depth: int, seconds: float) -> float:
    """Commands per second: batches of BATCH, `depth` outstanding at most, on its process's second CPU."""
    from spdk_glue import command, dma
    from spdk_glue.pyspdk.controller import Controller

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    controller = Controller(transport_id)
    facts = controller.namespaces()[0]
    queue_pair = controller.create_queue_pair(2 * depth, facts)
    num_blocks = io_bytes // facts.block_bytes
    num_sets = 2 * depth // BATCH  # so that no memory has two reads at once
    memory = dma.allocate(num_sets * BATCH * io_bytes)
    memory[:] = 1
    places = facts.num_lbas // num_blocks
    many = np.random.default_rng(0).integers(0, places, 1 << 15) if is_random else np.arange(1 << 15) % places
    entries = command.read(many * num_blocks, np.full(len(many), num_blocks))
    addresses = dma.page_addresses(memory, io_bytes).reshape(num_sets, BATCH)
    lengths = np.full(BATCH, io_bytes, np.uint64)
    done = under_way = position = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        while under_way + BATCH <= depth:
            buffers = addresses[position // BATCH % num_sets]
            under_way += queue_pair.submit(entries[position : position + BATCH], buffers, lengths)
            position = (position + BATCH) % len(entries)
        completions = queue_pair.poll(wait=True)
        if completions["status"].any():
            raise RuntimeError("a read failed")
        under_way -= len(completions)
        done += len(completions)
    rate = done / (time.perf_counter() - start)
    while under_way:
        under_way -= len(queue_pair.poll(wait=True))
    controller.close()
    return rate


def initiator_rate(address: str, io_bytes: int, is_random: bool, depth: int, seconds: float) -> float:
    """As pyspdk_rate, over our own NVMe/TCP: transfers of many commands, as flash on a namespace uses them."""
    from spdk_glue import command, dma
    from spdk_glue.transports.tcp import TcpTransport

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    transport = TcpTransport.connect(address)
    facts = transport._namespace
    queue_pair = transport.create_queue_pair(depth)
    num_blocks, at_once = io_bytes // facts.block_bytes, (64 << 20) // io_bytes
    memory = dma.allocate(2 * depth * io_bytes)
    memory[:] = 1
    places = facts.num_lbas // num_blocks
    many = np.random.default_rng(0).integers(0, places, at_once) if is_random else np.arange(at_once) % places
    entries = command.read(many * num_blocks, np.full(at_once, num_blocks))
    addresses = np.resize(dma.page_addresses(memory, io_bytes), at_once)
    lengths = np.full(at_once, io_bytes, np.uint64)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        if queue_pair.transfer(entries, addresses, lengths)["status"].any():
            raise RuntimeError("a read failed")
        done += at_once
    rate = done / (time.perf_counter() - start)
    transport.close()
    return rate


def _in_a_process(function: str, location: str, *arguments) -> float:
    """What pyspdk_rate or initiator_rate returns."""
    call = f"print({function}({location!r}, {', '.join(map(repr, arguments))}))"
    done = subprocess.run(
        [sys.executable, "-c", f"from kvfs_bench.nvme import {function}; {call}"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1000:])
    return float(done.stdout)


def _rates(target: Target, seconds: float, rounds: int) -> Iterator[Figure]:
    """4 KiB random reads and 128 KiB reads; both sides with their best of two depths."""
    for name, io_bytes, pattern, scale, unit, goal in (
        ("random_read_4k", 4096, "randread", 1, "reads/s", 0.8),
        ("read_128k", 128 << 10, "read", (128 << 10) / GB, "GB/s", 0.95),
    ):
        depths = (BATCH, 2 * BATCH)
        sides = {side: {depth: [] for depth in depths} for side in ("pyspdk", "initiator", "perf")}
        for _ in range(rounds):
            for depth in depths:
                how = (io_bytes, pattern == "randread", depth, seconds)
                sides["pyspdk"][depth].append(_in_a_process("pyspdk_rate", target.transport_id, *how))
                sides["initiator"][depth].append(_in_a_process("initiator_rate", target.address, *how))
                sides["perf"][depth].append(perf(target, io_bytes, pattern, depth, seconds))
        best = {side: max(map(statistics.median, rates.values())) * scale for side, rates in sides.items()}
        for side, wanted in (("pyspdk", goal), ("initiator", None)):
            yield Figure(
                f"{side}.{name}",
                best[side],
                unit,
                rival=f"spdk_nvme_perf, best of depths {BATCH} and {2 * BATCH}",
                rival_value=best["perf"],
                ratio=best[side] / best["perf"],
                limit=best["perf"],
            )
            yield Figure(f"{side}.{name}.ratio", best[side] / best["perf"], "ratio", goal=wanted)


def _cold_attention(target: Target, num_tokens: int, seconds: float, rounds: int) -> Iterator[Figure]:
    """What dense attention reads of a sequence much larger than the cache, beside spdk_nvme_perf's best read
    bandwidth. What the cache holds all the same is not counted."""
    import kvfs
    from kvfs import PageCounts

    kvfs.format(target.location, overwrite=True)
    random = np.random.default_rng(3)
    shape = (num_tokens, NUM_KV_HEADS, HEAD_DIM)
    rows = random.standard_normal(shape, np.float32).astype(np.float16)
    queries = random.standard_normal((1, 1, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM), np.float32).astype(np.float16)
    ours, theirs = [], []
    with kvfs.open(target.location, cache_bytes=COLD_CACHE_BYTES) as store:
        model = store.add_model(
            "bench",
            num_layers=NUM_LAYERS,
            num_query_heads=NUM_KV_HEADS * GROUP_SIZE,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
        )
        page_bytes = store._namespace.block_bytes
        sequence = store.create_sequence(model, "cold")
        for layer in range(NUM_LAYERS):
            sequence.append(layer, rows, rows)
        sequence.flush()
        for layer in range(NUM_LAYERS):  # compile before timing
            store.attend(layer, queries, [sequence])
        best = max(
            ((size, depth) for size in (128 << 10, 512 << 10, MAX_IO_BYTES) for depth in (8, 32)),
            key=lambda way: way[0] * perf(target, way[0], "read", way[1], seconds),
        )
        for _ in range(rounds):
            start, read = time.perf_counter(), PageCounts()
            while time.perf_counter() - start < seconds:
                for layer in range(NUM_LAYERS):
                    store.attend(layer, queries, [sequence], counts=read)
            ours.append(read.pages_from_flash * page_bytes / (time.perf_counter() - start))
            theirs.append(best[0] * perf(target, best[0], "read", best[1], seconds))
    mine, rival = statistics.median(ours) / GB, statistics.median(theirs) / GB
    yield Figure(
        "attention.cold.spdk",
        mine,
        "GB/s",
        rival=f"spdk_nvme_perf read {best[0] >> 10} KiB, depth {best[1]}",
        rival_value=rival,
        ratio=mine / rival,
        limit=rival,
    )
    yield Figure("attention.cold.spdk.ratio", mine / rival, "ratio", goal=0.85)


def measure(quick: bool = False) -> list[Figure]:
    """All figures. Raises SpdkMissing."""
    from kvfs_bench import nvme_target, spdk_target

    why_not = why_no_spdk()
    if why_not:
        raise SpdkMissing(why_not)
    seconds, rounds = (1, 1) if quick else (SECONDS, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        target = Target(
            Path(folder),
            {"memory": ("malloc", NAMESPACE_BYTES)},
            max_io_size=MAX_IO_BYTES,
            cpu_mask="0x1",
            is_polling=True,
        )
        try:
            figures = [
                *_rates(target, seconds, rounds),
                *_cold_attention(target, COLD_TOKENS_QUICK if quick else COLD_TOKENS, seconds, rounds),
            ]
        finally:
            target.close()
    return [*figures, *nvme_target.measure(seconds, rounds), *spdk_target.measure(seconds, rounds)]
