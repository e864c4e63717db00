"""Looking up a prompt's longest stored prefix among a million groups, on a drive's own catalogue.

The catalogue is real, on an embedded drive in a file; the groups' keys and values are not written, since no
look-up reads them. Chains of 512 groups of 256 tokens share nothing. A look-up is timed with what earlier ones
left in the caches, and cold: right after the drive was opened.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvfs.embedded_drive import DriveConfig, format_drive, open_drive
from kvfs.formatting import format_volume
from kvfs.metadata import GroupRow
from kvfs.prefix.match import Miss
from kvfs.store import Store
from kvfs_bench.figures import Figure

GROUP_TOKENS = 256
PROMPT_GROUPS = 512  # 131,072 tokens
GOAL_MS = 5.0
GROUP_LBAS = 2  # of the smallest model
GROUP_CATALOGUE_BYTES = 1600  # token ids, entry, rows and indexes of a group, with room to spare
CHAINS_PER_SYNC = 64
MODEL = {"num_layers": 1, "num_query_heads": 1, "num_kv_heads": 1, "head_dim": 32, "dtype": "float16"}


@dataclass(frozen=True)
class Sizes:
    num_chains: int
    num_prompts: int
    num_openings: int

    @property
    def num_groups(self) -> int:
        return self.num_chains * PROMPT_GROUPS


FULL = Sizes(1954, 50, 5)  # 1,000,448 groups
QUICK = Sizes(8, 3, 1)


def _tokens(chain: int) -> np.ndarray:
    return np.random.default_rng(chain).integers(0, 150_000, PROMPT_GROUPS * GROUP_TOKENS, dtype=np.uint32)


def _open(path: Path) -> Store:
    return Store(open_drive(path, DriveConfig(cache_bytes=64 << 20, num_workers=1)), path)


def _format(path: Path, sizes: Sizes) -> None:
    """A drive whose catalogue takes so many groups."""
    catalogue_lbas = max(1024, sizes.num_groups * GROUP_CATALOGUE_BYTES // 4096)
    data_lbas = sizes.num_groups * GROUP_LBAS
    format_drive(path, 4096 * (2 * catalogue_lbas + data_lbas + (64 << 20) // 4096) * 5 // 4, None)
    drive = open_drive(path, DriveConfig(cache_bytes=8 << 20, num_workers=1, worker="reference"))
    format_volume(drive, path, (catalogue_lbas, catalogue_lbas))
    drive.close()


def _fill(path: Path, sizes: Sizes) -> None:
    """Chains of groups as flushes would name them, by way of the same transactions."""
    with _open(path) as store:
        model = store.add_model("bench", **MODEL, group_tokens=GROUP_TOKENS)
        catalogue, base_lba = store._catalogue, store._volume.first_data_lba
        for chain in range(sizes.num_chains):
            tokens = _tokens(chain)
            with catalogue.transaction():
                row = catalogue.create_sequence(model.id, f"chain-{chain}")
                catalogue.prefixes.set_publication(row.id, "", model.id, "{}")
                row.num_tokens = row.num_spilled = len(tokens)
                groups = [
                    GroupRow(None, base_lba + position * GROUP_LBAS, GROUP_LBAS)
                    for position in range(PROMPT_GROUPS)
                ]
                catalogue.store_sequence(row, groups, 0, tokens, 0)
            base_lba += PROMPT_GROUPS * GROUP_LBAS
            if chain % CHAINS_PER_SYNC == 0:
                catalogue.sync()


def _look_up(store: Store, prompt: np.ndarray, tenant: str = "") -> tuple[float, int]:
    """(ms, groups found)."""
    model = store.model("bench")
    started = time.perf_counter()
    match = store.find_prefix(model, prompt, tenant)
    milliseconds = (time.perf_counter() - started) * 1e3
    assert match.miss in (None, Miss.UNKNOWN)
    return milliseconds, match.num_tokens // GROUP_TOKENS


def measure(directory: Path, quick: bool = False) -> list[Figure]:
    """Figures of look-ups: whole, half and no hits, of another tenant's prompts, and after opening."""
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = Path(folder, "drive.kvfs")
        _format(path, sizes)
        _fill(path, sizes)
        return _measure(path, sizes)


def _measure(path: Path, sizes: Sizes) -> list[Figure]:
    random = np.random.default_rng(0)
    cold = []
    for opening in range(sizes.num_openings):
        with _open(path) as store:
            cold.append(_look_up(store, _tokens(opening))[0])
    with _open(path) as store:
        times = {"whole": [], "half": [], "none": [], "other_tenant": []}
        for chain in random.integers(0, sizes.num_chains, sizes.num_prompts).tolist():
            prompt = _tokens(chain)
            half = prompt.copy()
            half[len(half) // 2 :] += 1
            for kind, tokens, tenant, wanted in (
                ("whole", prompt, "", PROMPT_GROUPS),
                ("half", half, "", PROMPT_GROUPS // 2),
                ("none", prompt + np.uint32(1), "", 0),
                ("other_tenant", prompt, "other", 0),
            ):
                milliseconds, found = _look_up(store, tokens, tenant)
                if found != wanted:
                    raise RuntimeError(f"a look-up found {found} groups where {wanted} are stored")
                times[kind].append(milliseconds)
        started = time.perf_counter()
        sequence = store.restore_prefix(store.find_prefix(store.model("bench"), _tokens(0)), "restored")
        restore_ms = (time.perf_counter() - started) * 1e3
        assert sequence.num_tokens == PROMPT_GROUPS * GROUP_TOKENS
    figures = [Figure("prefix.groups_stored", sizes.num_groups, "groups")]
    for kind, values in times.items():
        goal = GOAL_MS if kind == "whole" else None
        name = f"prefix.lookup_128k.{kind}"
        figures.append(
            Figure(f"{name}.median", statistics.median(values), "ms", goal=goal, goal_is_maximum=True)
        )
        figures.append(Figure(f"{name}.max", max(values), "ms"))
    figures.append(Figure("prefix.lookup_128k.after_opening.median", statistics.median(cold), "ms"))
    figures.append(Figure("prefix.find_and_restore_128k", restore_ms, "ms"))
    return figures
