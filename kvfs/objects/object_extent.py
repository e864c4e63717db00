"""An object's blocks, as a check sees them."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvfs.objects.object_catalogue import ObjectCatalogue


@dataclass(frozen=True)
class ObjectExtent:
    """Blocks that an object has, as a row says. first_block: of the object."""

    first_lba: int
    num_lbas: int
    object_id: int
    cache: str
    key: bytes
    first_block: int
    shares: tuple = ()  # no sequence has a part

    @property
    def stop_lba(self) -> int:
        return self.first_lba + self.num_lbas

    @property
    def name(self) -> str:
        return f"object {self.key.hex()} of cache {self.cache!r}"

    def expected_pages(self) -> Iterator[range]:
        """Ranges of LBAs that must be on flash."""
        yield range(self.first_lba, self.stop_lba)

    def __str__(self) -> str:
        return f"blocks {self.first_lba} to {self.stop_lba - 1} ({self.name})"


def object_extents(catalogue: ObjectCatalogue) -> list[ObjectExtent]:
    found = []
    for object_id, cache, key, extents in catalogue.placed():
        first_block = 0
        for first_lba, count in extents:
            found.append(ObjectExtent(first_lba, count, object_id, cache, key, first_block))
            first_block += count
    return found
