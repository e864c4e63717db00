"""Which drives get which KV heads of a new sequence, and which an object.

All drives that there are, as long as each gets a head. Where heads are fewer than drives, or not the same for
all, the drives with the most room for what they have take part, or take one more: so the sequences of a batch
end up on all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from kvfs.drive_set.part_record import PartPlace


@dataclass(frozen=True)
class Candidate:
    """A drive that takes parts. num_heads: it has already, of all sequences."""

    drive_id: str
    free_bytes: int
    num_heads: int

    @property
    def load(self) -> float:
        return (self.num_heads + 1) / (self.free_bytes + 1)


def spread(num_kv_heads: int, candidates: Sequence[Candidate]) -> tuple[PartPlace, ...]:
    """Parts in the order of their heads, on drives in the order of the candidates."""
    assert candidates
    by_room = sorted(range(len(candidates)), key=lambda index: (candidates[index].load, index))
    chosen = by_room[:num_kv_heads]
    share, extra = divmod(num_kv_heads, len(chosen))
    counts = {index: share + (place < extra) for place, index in enumerate(chosen)}
    places, first = [], 0
    for index in sorted(counts):
        places.append(PartPlace(first, first + counts[index], candidates[index].drive_id))
        first += counts[index]
    return tuple(places)


def ranked(key: bytes, drive_ids: Iterable[str]) -> list[str]:
    """Drives in the order in which they are to have an object: the first that takes it has it."""
    return sorted(drive_ids, key=lambda drive_id: blake2b(key, digest_size=8, key=drive_id.encode()).digest())
