"""Cycles of the simulated core, and what they are worth at a clock: `python -m accel.fpga.throughput`.

Cycles count from a unit's command to the last beat of its answer. GB/s are those of K and V, GFLOPS 4 * query
heads * head_dim for each token: a product and a sum, for scores and for outputs. Last, how fast the simulation
itself is.
"""

import argparse
import time

import numpy as np

from accel.fpga.arithmetic import FLOAT16, Shape
from accel.fpga.model import Command, quantised_queries
from accel.fpga.simulation import SimulatedCore

PAPERS_GBPS = 11.2  # of the flash channels in the papers' drive
HILOS_GFLOPS = {1: 11.9, 4: 46.8, 5: 56.3}  # as published, by group size


def cycles_of(core: SimulatedCore, head_dim: int, num_tokens: int, block: int, group: int) -> tuple[int, int]:
    """(cycles, beats of K and V) of a unit of `group` query heads."""
    random = np.random.default_rng(0)
    keys, values = random.standard_normal((2, num_tokens, head_dim)).astype(np.float16)
    queries, exponents = quantised_queries(random.standard_normal((core.shape.rows, head_dim)), head_dim**-0.5)
    stop = np.where(np.arange(core.shape.rows) < group, num_tokens, 0)
    command = Command(queries, exponents, np.zeros(core.shape.rows, np.int64), stop, FLOAT16)
    first = np.arange(0, num_tokens, block)
    tokens = np.minimum(num_tokens - first, block)
    cycles, beats = core.cycles, core.beats
    core.run(
        command, first, tokens, *(pages.ctypes.data + first * pages.strides[0] for pages in (keys, values))
    )
    return core.cycles - cycles, core.beats - beats


def channel_cycles(core: SimulatedCore, num_channels: int) -> tuple[int, int]:
    """(cycles, tokens) of a unit over channels, each of its own page."""
    num_beats = core.shape.max_beats
    elements = np.ones((num_channels, num_beats * core.shape.lanes), np.float16)
    weights = np.ones((num_channels, core.shape.lanes // 2), np.int32)
    addresses = [each.ctypes.data + np.arange(num_channels) * each.strides[0] for each in (weights, elements)]
    before = core.cycles
    core.weigh_channels(FLOAT16, num_beats, np.ones(num_channels, np.uint32), *addresses)
    return core.cycles - before, num_beats * core.shape.lanes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--mhz", type=float, default=200.0, help="clock, see accel.fpga.synthesis")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    core = SimulatedCore(Shape(lanes=arguments.lanes, rows=arguments.rows))
    beat_bytes, hertz = core.shape.beat_bits // 8, arguments.mhz * 1e6
    print(f"{arguments.lanes} lanes, {arguments.rows} rows, {arguments.tokens} tokens, {arguments.mhz:g} MHz\n")
    print("| head_dim | query heads | cycles | beats a cycle | GB/s | of 11.2 | GFLOPS | HILOS |")
    print("|---|---|---|---|---|---|---|---|")
    for head_dim in (64, 128):
        for group in (1, 4, 5, 8):
            if group > arguments.rows:
                continue
            cycles, beats = cycles_of(core, head_dim, arguments.tokens, core.shape.block_tokens, group)
            gbps = beats * beat_bytes / cycles * hertz / 1e9
            gflops = 4 * group * head_dim * arguments.tokens / cycles * hertz / 1e9
            print(
                f"| {head_dim} | {group} | {cycles:,} | {beats / cycles:.2f} | {gbps:.1f} |"
                f" {gbps / PAPERS_GBPS:.1f}x | {gflops:.1f} | {HILOS_GFLOPS.get(group, '')} |"
            )
    print("\n| head_dim | tokens of a block | beats a cycle |\n|---|---|---|")
    for head_dim in (64, 128):
        for block in (1, 2, 4, 16, 64):
            cycles, beats = cycles_of(core, head_dim, 1024, block, arguments.rows)
            print(f"| {head_dim} | {block} | {beats / cycles:.2f} |")
    print("\n| channels | cycles for their tokens | tokens a cycle | GB/s of channels |\n|---|---|---|---|")
    for channels in (8, 16, 32, 64, 128):
        cycles, tokens = channel_cycles(core, channels)
        gbps = channels * tokens * 2 / cycles * hertz / 1e9
        print(f"| {channels} | {cycles} for {tokens} | {tokens / cycles:.2f} | {gbps:.1f} |")
    print("\n| simulated | tokens x query heads a second, one CPU |\n|---|---|")
    for head_dim in (64, 128):
        started = time.perf_counter()
        cycles_of(core, head_dim, arguments.tokens, core.shape.block_tokens, core.shape.rows)
        speed = arguments.tokens * core.shape.rows / (time.perf_counter() - started)
        print(f"| head_dim {head_dim} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
