"""A derived segment's blocks, as a check sees them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvfs.layout import GroupLayout
from kvfs.sealing.commands import derived_layout
from kvfs.sealing.derived_catalogue import DerivedCatalogue, PlacedSegment
from kvfs.sealing.policy import DERIVES, name_of
from spdk_glue.derived_layout import DerivedLayout
from spdk_glue.vendor_command import Derive

_NAMES = {int(derive): name_of(derive) for derive in DERIVES.values()}


@dataclass(frozen=True)
class DerivedExtent:
    """Blocks that a segment has, as its row says. sequence: the name of one that has it; layout: None where the
    row fits no model."""

    first_lba: int
    num_lbas: int
    segment_id: int
    derive: int
    sequence: str | None
    layout: DerivedLayout | None
    first_token: int
    shares: tuple = ()  # no token is lost with it

    @property
    def stop_lba(self) -> int:
        return self.first_lba + self.num_lbas

    @property
    def name(self) -> str:
        whose = f"of sequence {self.sequence!r}" if self.sequence else "of no sequence"
        return f"{_NAMES.get(self.derive, f'derived data {self.derive}')} {self.segment_id} {whose}"

    @property
    def fits(self) -> bool:
        """Whether it has as many blocks as its layout takes."""
        return self.layout is not None and self.layout.num_lbas == self.num_lbas

    def expected_pages(self) -> Iterator[range]:
        """Ranges of LBAs that must be on flash."""
        yield range(self.first_lba, self.stop_lba)

    def place(self, lba: int) -> tuple[int, int, bool]:
        """(layer, KV head, whether it is a refinement page) of a block."""
        layer, rest = divmod(lba - self.first_lba, self.layout.layer_lbas)
        head, _ = divmod(rest, self.layout.index_pages)
        if head < self.layout.num_kv_heads:
            return layer, head, False
        rest -= self.layout.num_kv_heads * self.layout.index_pages
        return layer, rest // self.layout.refinement_pages, True

    def __str__(self) -> str:
        return f"blocks {self.first_lba} to {self.stop_lba - 1} ({self.name})"


def derived_extents(
    catalogue: DerivedCatalogue, sequence: Callable[[int], tuple[str, GroupLayout] | None]
) -> list[DerivedExtent]:
    """sequence: the name and the layout of a sequence by its id; None where nothing is known of it."""
    return [
        _extent(row, None if row.sequence_id is None else sequence(row.sequence_id))
        for row in catalogue.placed()
    ]


def _extent(row: PlacedSegment, known: tuple[str, GroupLayout] | None) -> DerivedExtent:
    name, layout, first_token = None, None, 0
    if known is not None:
        name, group_layout = known
        first_token = (row.position + 1 - row.num_groups) * group_layout.geometry.group_tokens
        if row.derive in _NAMES and row.num_groups >= 1:
            layout = derived_layout(group_layout, Derive(row.derive), row.num_groups)
    return DerivedExtent(row.base_lba, row.num_lbas, row.id, row.derive, name, layout, first_token)
