"""What goes wrong in one run, and when: drawn from the run's seed before anything happens."""

from dataclasses import dataclass

import numpy as np

from ftl.collector import CollectorOptions
from ftl.garbage_collection import POLICIES
from ftl.geometry import Geometry
from ftl.media_nand import NandModel

# (pages_per_erase_block, num_superblocks): small, so that collection runs all the time
STORE_SHAPES = ((8, 24), (16, 24), (8, 32), (16, 16))
METADATA_AREAS = ((62, 62), (54, 46), (46, 46))  # blocks for the catalogue and its log; the last soon full
FTL_SHAPES = ((8, 12), (8, 16), (16, 12))
# Faults that a run has only if asked for, as changes of the medium. Bit flips and power cuts are always there.
FAULTS = {
    "program": {"program_failure_rate": 1e-4},
    "erase": {"erase_failure_rate": 1e-4},
    "weak-blocks": {"program_failure_rate": 5e-4, "erase_failure_rate": 2e-3},  # some fail in a short run
    "bad-blocks": {"factory_bad_fraction": 0.02, "grown_bad_fraction": 0.02, "rated_cycles": 200},
    "lost-writes": {"lost_write_rate": 2e-3},
    "misdirected-writes": {"misdirected_write_rate": 2e-3},
    "dead-die": {},  # one dies: before anything else, or later
    "parity": {},  # no fault: always a drive with parity
    "flip-and-reopen": {},  # bits also flip while the drive is closed
}
MAX_DEPTH = 3  # power cuts in a row: in the workload, in opening, in opening again


@dataclass(frozen=True)
class FaultSchedule:
    """One run's geometry, options and faults. Distances are in media operations, chances per round."""

    geometry: Geometry
    nand: NandModel
    collector: CollectorOptions
    checkpoint_pages: int
    metadata_lbas: tuple[int, int]  # database and log
    writeback_tokens: int | None
    tail_bytes: int
    dies_in: int | None  # operations until a die dies
    longest_cut: int
    what_if_chance: float  # of trying a power cut in a media operation, without having it
    clean_close_chance: float  # instead of a power cut
    bit_flip_chance: float
    reopen_chance: float  # of opening the drive again between a bit flip and the reads

    @classmethod
    def draw(cls, random: np.random.Generator, faults=(), shapes=STORE_SHAPES) -> "FaultSchedule":
        """faults: names of FAULTS."""
        pages_per_erase_block, num_superblocks = shapes[random.integers(len(shapes))]
        parity = max(int(random.choice([0, 0, 1])), int("parity" in faults))
        geometry = Geometry(
            num_channels=4 if parity else 2,
            pages_per_erase_block=pages_per_erase_block // (1 + parity),
            num_superblocks=num_superblocks + 4 * parity,
            spare_percent=25 if parity or "weak-blocks" in faults else 7,  # rows and blocks are lost
            parity=parity,
        )
        return cls(
            geometry,
            NandModel(**{name: value for fault in faults for name, value in FAULTS[fault].items()}),
            collector=CollectorOptions(policy=str(random.choice(sorted(POLICIES)))),
            checkpoint_pages=int(random.choice([30, 150, 1 << 20])),
            metadata_lbas=METADATA_AREAS[random.integers(len(METADATA_AREAS))],
            writeback_tokens=[None, None, 1, 8, 40][random.integers(5)],
            tail_bytes=int(random.choice([1 << 30, 1 << 30, 128 << 10, 32 << 10])),
            dies_in=int(random.choice([0, 100, 300, 600])) if "dead-die" in faults else None,
            longest_cut=int(random.choice([20, 60, 150])),
            what_if_chance=float(random.choice([0.1, 0.3, 0.6])),
            clean_close_chance=0.1,
            bit_flip_chance=0.2,
            reopen_chance=0.5 if "flip-and-reopen" in faults else 0,
        )

    def cut_distance(self, random: np.random.Generator) -> int:
        """Media operations of the workload until the power fails."""
        return int(random.integers(0, self.longest_cut))

    def opening_cuts(self, random: np.random.Generator) -> list[int]:
        """The operation of each opening, one after the other, that the power fails in."""
        cuts = []
        while len(cuts) < MAX_DEPTH - 1 and random.random() < 0.7:
            cuts.append(int(random.integers(0, [3, 10][random.integers(2)])))
        return cuts
