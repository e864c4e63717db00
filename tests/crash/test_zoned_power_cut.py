"""The translation layer on a zoned drive: power cuts and killed hosts, at every operation of the drive.

The long run is `make sim ARGS="--mode zoned"`.
"""

from contextlib import suppress

import numpy as np
import pytest

from ftl.layout import BLOCK_BYTES
from ftl.media_nand import PowerCut
from ftl.zoned_blocks import ZonedBlocks, zones_needed
from ftl.zones import Zones
from spdk_glue import dma
from spdk_glue.dma import EXTENT
from tests.unit.spdk_glue.zoned_drive import ACTIVE

from .fragile_zoned_drive import FragileZonedDrive
from .zoned_simulator import ZonedSimulation

CRASHES_PER_SEED = 12


@pytest.mark.parametrize("seed", range(6))
def test_crashes(seed):
    """Flushed data after any end, and a layer that goes on: the drive refuses what breaks a zone's rules."""
    print(f"seed {seed}")
    report = ZonedSimulation(seed).run(CRASHES_PER_SEED)
    assert len(report.crash_points) >= CRASHES_PER_SEED


@pytest.mark.parametrize("seed", range(2))
def test_zones_that_wear_out(seed):
    """One that can only be read any more: what it holds is moved, and nothing is lost."""
    print(f"seed {seed}")
    ZonedSimulation(seed, ["weak-blocks"]).run(CRASHES_PER_SEED)


@pytest.mark.parametrize("seed", range(2))
def test_a_crash_in_every_operation(seed):
    """No operation is too short for the power to fail in it: writes, resets, finishes and flushes, each in
    turn."""
    print(f"seed {seed}")
    simulation = ZonedSimulation(seed)
    simulation.what_if_chance, simulation.longest_cut = 1.0, 60
    report = simulation.run(60)
    assert len({operation for operation, _ in report.crash_points}) >= 40


def test_runs_repeat():
    """A seed that fails must fail again."""
    first, second = (ZonedSimulation(5).run(4) for _ in range(2))
    assert (first.digest, first.crash_points) == (second.digest, second.crash_points)


NUM_BLOCKS = 40


class BlocksTrial:
    """Random writes and zeroing of blocks in zones; may_hold[block]: what it may hold after a crash now."""

    def __init__(self, seed: int):
        random = self.random = np.random.default_rng(seed)
        capacity = int(random.choice([16, 20, 25])) * BLOCK_BYTES
        self.num_zones = zones_needed(NUM_BLOCKS, capacity)
        block_bytes, unwritten = int(random.choice([512, 4096])), int(random.choice([0, 0xFF]))
        self.drive = FragileZonedDrive(
            random,
            num_zones=self.num_zones,
            capacity_bytes=capacity,
            block_bytes=block_bytes,
            unwritten=unwritten,
        )
        self.drive.max_active = 1
        self.zones = Zones(self.drive.host())
        self.blocks = ZonedBlocks.create(self.zones, NUM_BLOCKS, self.num_zones)
        self.may_hold = [[0] for _ in range(NUM_BLOCKS)]
        self.num_crashes = 0

    def run(self, num_steps: int) -> None:
        """The first record has to be there, or nothing would tell a drive."""
        self.step()
        self.flush()
        for _ in range(num_steps):
            self.drive.on_operation = self.what_if
            self.step()
            if self.random.random() < 0.2:
                self.flush()
            self.drive.on_operation = None
            assert self.read(self.blocks) == [values[-1] for values in self.may_hold]
            if self.random.random() < 0.2:
                self.crash()
                self.blocks = self.reopen(self.may_hold)
                found = self.read(self.blocks)
                self.may_hold = [[value] for value in found]

    def step(self) -> None:
        count = int(self.random.integers(1, 9))
        first = int(self.random.integers(NUM_BLOCKS - count + 1))
        # zeros, and blocks that end in zeros, look like what was never written
        values = self.random.choice([0, 1, 2, 3], count) if self.random.random() < 0.7 else np.zeros(count, int)
        for values_of_block, value in zip(self.may_hold[first : first + count], values.tolist(), strict=True):
            values_of_block.append(value)
        if not values.any() and self.random.random() < 0.5:
            self.blocks.clear(first * BLOCK_BYTES, count * BLOCK_BYTES)
            return
        buffer = dma.allocate(count * BLOCK_BYTES)
        buffer.reshape(count, -1)[:, :100] = values[:, None]
        self.blocks.write_extents(
            np.array([(dma.address_of(buffer), first * BLOCK_BYTES, buffer.nbytes)], EXTENT)
        )

    def flush(self) -> None:
        self.zones.flush()
        self.may_hold = [values[-1:] for values in self.may_hold]

    def read(self, blocks: ZonedBlocks) -> list[int]:
        buffer = dma.allocate(NUM_BLOCKS * BLOCK_BYTES)
        blocks.read_extents(np.array([(dma.address_of(buffer), 0, buffer.nbytes)], EXTENT))
        rows = buffer.reshape(NUM_BLOCKS, -1)
        assert (rows[:, :100] == rows[:, :1]).all() and not rows[:, 100:].any(), "a torn block was served"
        return rows[:, 0].tolist()

    def crash(self) -> None:
        self.num_crashes += 1
        self.drive.restart() if self.random.random() < 0.3 else self.drive.reboot()

    def what_if(self, operation) -> None:
        zones, may_hold = self.zones, [list(values) for values in self.may_hold]
        with self.drive.what_if():
            operation()
            self.crash()
            self.reopen(may_hold)
        self.zones = zones

    def reopen(self, may_hold: list[list[int]]) -> ZonedBlocks:
        """Opened again, after crashes in opening perhaps, it holds what it may, for whoever opens it next."""
        while self.random.random() < 0.4:
            self.drive.cut_in(int(self.random.integers(4)))
            with suppress(PowerCut):
                ZonedBlocks.open(Zones(self.drive.host()), read_only=False)
            self.crash()
        found = self.read(ZonedBlocks.open(Zones(self.drive.host()), read_only=True))
        assert all(value in values for value, values in zip(found, may_hold, strict=True))
        ZonedBlocks.open(Zones(self.drive.host()), read_only=False)
        self.drive.reboot()  # what was found is durable
        self.zones = Zones(self.drive.host())
        blocks = ZonedBlocks.open(self.zones, read_only=False)
        assert self.read(blocks) == found and not blocks.is_damaged
        assert self.drive.num_in(ACTIVE) <= 1
        return blocks


@pytest.mark.parametrize("seed", range(8))
def test_blocks_in_zones(seed):
    """The tables' own log, which has fewer and shorter operations: many more crashes while it empties zones."""
    print(f"seed {seed}")
    trial = BlocksTrial(seed)
    trial.run(40)
    assert trial.num_crashes > 40
