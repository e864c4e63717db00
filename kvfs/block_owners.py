"""Whose a logical block is: from an LBA to the sequence, layer and tokens, or the file, that it holds.

Reads the catalogue's rows as they are, so that what contradicts itself can be named as well.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvfs.files.file_check import FileExtent
from kvfs.layout import GroupLayout
from kvfs.metadata import Catalogue, SequenceRow
from kvfs.metadata_vfs import Volume
from kvfs.objects.object_extent import ObjectExtent, object_extents
from kvfs.sealing.derived_extent import DerivedExtent, derived_extents


@dataclass(frozen=True)
class Owner:
    """What one block holds. token_stop is exclusive; layers, tokens and what is None where it has none.

    area: "header", "database", "log" (of the catalogue), "tokens", "tail", "slack" (a group's block without
        tokens that are stored; an open store may be about to name some), "file", "object", "derived" (made of
        tokens, and not missed by them), "nothing", or "unknown" where the catalogue is damaged
    offset: of the block in the file or object, bytes
    whole_tokens: of each sequence, by id, the tokens that remain whole without this block
    """

    area: str
    text: str
    sequences: tuple[str, ...] = ()
    model: str | None = None
    layer: int | None = None  # None in a tail record whose block spans several
    token_start: int | None = None
    token_stop: int | None = None
    whole_tokens: dict[int, int] = field(default_factory=dict)
    file: int | None = None  # inode
    offset: int | None = None
    object: int | None = None  # the number of its row
    segment: int | None = None  # of derived data: the number of its row

    def as_dict(self) -> dict:
        named = {name: value for name, value in vars(self).items() if value not in (None, ())}
        del named["whole_tokens"]
        return named


@dataclass
class NamedExtent:
    """Blocks that catalogue rows name: a token group, or (position None) a sequence's tail record.

    shares: (sequence, position of the group in it); forks share groups
    """

    first_lba: int
    num_lbas: int
    layout: GroupLayout | None  # None for a model without a row
    model_id: int
    model: str
    group_id: int | None
    shares: list[tuple[SequenceRow, int | None]]

    @property
    def stop_lba(self) -> int:
        return self.first_lba + self.num_lbas

    @property
    def names(self) -> str:
        return ", ".join(repr(row.name) for row, _ in self.shares) or "no sequence"

    def __str__(self) -> str:
        kind = "tail record" if self.group_id is None else f"group {self.group_id}"
        return f"blocks {self.first_lba} to {self.stop_lba - 1} ({kind} of {self.names})"

    @property
    def expected_lbas(self) -> int:
        """How many blocks the model's shape asks for."""
        if self.group_id is not None:
            return self.layout.group_lbas
        row = self.shares[0][0]
        return tail_record_lbas(self.layout, row.num_tokens - row.num_spilled)

    def expected_pages(self) -> Iterator[range]:
        """Ranges of LBAs that must be on flash: a part group has the first pages of each head only."""
        if self.group_id is None:
            yield range(self.first_lba, self.stop_lba)
            return
        layout, group_tokens = self.layout, self.layout.geometry.group_tokens
        rows = max((row.num_spilled - position * group_tokens for row, position in self.shares), default=0)
        pages = min(layout.pages_per_head, -(-max(rows, 0) // layout.tokens_per_page))
        if pages == layout.pages_per_head:
            yield range(self.first_lba, self.first_lba + layout.group_lbas)
        elif pages:
            for first in range(self.first_lba, self.first_lba + layout.group_lbas, layout.pages_per_head):
                yield range(first, first + pages)


def tail_record_lbas(layout: GroupLayout, num_tokens: int) -> int:
    return -(-max(num_tokens, 0) * layout.geometry.token_bytes // layout.page_size)


class BlockOwners:
    """extents: list of NamedExtent, FileExtent, ObjectExtent and DerivedExtent by LBA; files: the files' rows;
    unlinked: extents of groups that no sequence has; broken_links: (sequence id, position) without a group or a
    sequence.

    bad_models: why nothing can be said of a model's sequences, by model id: its row is missing, or gives a
    shape that none of its extents has. untold: the extents of these.
    """

    def __init__(self, volume: Volume, catalogue: Catalogue, block_bytes: int):
        """Raises what reading the catalogue raises: apsw.Error, NvmeError, InvalidArgument."""
        self._volume = volume
        self._block_bytes = block_bytes
        self.sequences = {row.id: row for row in catalogue.sequences()}
        self.models = {row.id: row for row in catalogue.models()}
        self._layouts = {row.id: GroupLayout(row.geometry, block_bytes) for row in self.models.values()}
        self.broken_links: list[tuple[int, int]] = []
        self.unlinked = list(catalogue.unlinked_groups())
        extents = sorted(self._groups(catalogue) + self._tails(), key=lambda extent: extent.first_lba)
        self.bad_models = self._bad_models(extents)
        self.untold = [extent for extent in extents if extent.model_id in self.bad_models]
        told = [extent for extent in extents if extent.model_id not in self.bad_models]
        self.files = catalogue.files.rows()
        others = self.files.extents() + object_extents(catalogue.objects)
        others += derived_extents(catalogue.derived, self._named_layout)
        self.extents: list[NamedExtent | FileExtent | ObjectExtent | DerivedExtent] = sorted(
            told + others, key=lambda extent: extent.first_lba
        )
        self._starts = [extent.first_lba for extent in self.extents]
        self._by_sequence: dict[int, list[NamedExtent]] = {}
        for extent in self.extents:
            for row, _ in extent.shares:
                self._by_sequence.setdefault(row.id, []).append(extent)

    def _groups(self, catalogue: Catalogue) -> list[NamedExtent]:
        links: dict[tuple[int, int, int], list[tuple[SequenceRow, int]]] = {}
        for sequence_id, position, group_id, base_lba, num_lbas in catalogue.links():
            row = self.sequences.get(sequence_id)
            if row is None or base_lba is None or position < 0:
                self.broken_links.append((sequence_id, position))
            else:
                links.setdefault((group_id, base_lba, num_lbas), []).append((row, position))
        found = []
        for (group_id, base_lba, num_lbas), shares in links.items():
            rows = [row for row, _ in shares]
            # where forks disagree, the one is right that the group's size speaks for
            fits = [row for row in rows if self._group_lbas(row) == num_lbas]
            extent = self._extent((fits or rows)[0], base_lba, num_lbas, group_id)
            extent.shares += [share for share in shares if share[0].model_id == extent.model_id]
            found.append(extent)
        return found

    def _named_layout(self, sequence_id: int) -> tuple[str, GroupLayout] | None:
        row = self.sequences.get(sequence_id)
        layout = None if row is None else self._layouts.get(row.model_id)
        return None if layout is None else (row.name, layout)

    def _group_lbas(self, row: SequenceRow) -> int | None:
        layout = self._layouts.get(row.model_id)
        return layout and layout.group_lbas

    def _tails(self) -> list[NamedExtent]:
        found = []
        for row in self.sequences.values():
            if row.tail_lbas:
                found.append(self._extent(row, row.tail_lba, row.tail_lbas, None))
                found[-1].shares.append((row, None))
        return found

    def _extent(self, row: SequenceRow, first_lba: int, num_lbas: int, group_id: int | None) -> NamedExtent:
        model = self.models.get(row.model_id)
        layout, name = self._layouts.get(row.model_id), model.name if model else str(row.model_id)
        return NamedExtent(first_lba, num_lbas, layout, row.model_id, name, group_id, [])

    def _bad_models(self, extents: list[NamedExtent]) -> dict[int, str]:
        found = {
            row.model_id: f"model {row.model_id} does not exist"
            for row in self.sequences.values()
            if row.model_id not in self.models
        }
        for model in self.models.values():
            own = [extent for extent in extents if extent.model_id == model.id]
            own = [extent for extent in own if extent.group_id is not None] or own  # groups tell more
            if own and not any(extent.num_lbas == extent.expected_lbas for extent in own):
                found[model.id] = f"model {model.name!r} has a shape that none of its sequences has"
        return found

    def extents_of(self, sequence_id: int) -> list[NamedExtent]:
        return self._by_sequence.get(sequence_id, [])

    def layout(self, row: SequenceRow) -> GroupLayout:
        return self._layouts[row.model_id]

    def owner(self, lba: int) -> Owner:
        if lba < self._volume.first_data_lba:
            return catalogue_owner(self._volume, self._block_bytes, lba)
        for extent in self.untold:
            if extent.first_lba <= lba < extent.stop_lba:
                return Owner("unknown", f"{extent}: {self.bad_models[extent.model_id]}")
        index = bisect_right(self._starts, lba) - 1
        if index < 0 or lba >= self.extents[index].stop_lba:
            return Owner("nothing", "nothing names it")
        extent = self.extents[index]
        if isinstance(extent, FileExtent):
            return self._of_file(extent, lba)
        if isinstance(extent, ObjectExtent):
            return self._of_object(extent, lba)
        if isinstance(extent, DerivedExtent):
            return self._of_derived(extent, lba)
        return self._of_tail(extent, lba) if extent.group_id is None else self._of_group(extent, lba)

    def _of_file(self, extent: FileExtent, lba: int) -> Owner:
        offset = (extent.first_block + lba - extent.first_lba) * self._block_bytes
        text = f"{extent.path}, bytes {offset} to {offset + self._block_bytes - 1}"
        return Owner("file", text, file=extent.inode, offset=offset)

    def _of_object(self, extent: ObjectExtent, lba: int) -> Owner:
        offset = (extent.first_block + lba - extent.first_lba) * self._block_bytes
        text = f"{extent.name}, bytes {offset} to {offset + self._block_bytes - 1}"
        return Owner("object", text, object=extent.object_id, offset=offset)

    def _of_derived(self, extent: DerivedExtent, lba: int) -> Owner:
        found = {"segment": extent.segment_id, "sequences": (extent.sequence,) if extent.sequence else ()}
        if not extent.fits:
            return Owner("derived", extent.name, **found)
        layer, head, is_refinement = extent.place(lba)
        start, stop = extent.first_token, extent.first_token + extent.layout.num_tokens
        kind = "refinement" if is_refinement else "index"
        text = f"{extent.name}, layer {layer}, tokens {start} to {stop - 1} ({kind} page of KV head {head})"
        return Owner("derived", text, layer=layer, token_start=start, token_stop=stop, **found)

    def _of_group(self, extent: NamedExtent, lba: int) -> Owner:
        layout, group_tokens = extent.layout, extent.layout.geometry.group_tokens
        layer, rest = divmod(lba - extent.first_lba, layout.layer_lbas)
        head, rest = divmod(rest, 2 * layout.pages_per_head)
        is_value, page = divmod(rest, layout.pages_per_head)
        first = page * layout.tokens_per_page
        starts = {
            row.id: position * group_tokens + first
            for row, position in extent.shares
            if position * group_tokens + first < row.num_spilled
        }
        if not starts:
            return Owner("slack", f"{extent}, where no stored token is")
        start = max(starts.values())
        stop = min(start + layout.tokens_per_page, (start // group_tokens + 1) * group_tokens)
        what = f"{'values' if is_value else 'keys'} of KV head {head}"
        return self._owner("tokens", extent, layer, start, stop, what, starts)

    def _of_tail(self, extent: NamedExtent, lba: int) -> Owner:
        row = extent.shares[0][0]
        geometry = extent.layout.geometry
        token_bytes = geometry.num_kv_heads * geometry.head_dim * geometry.numpy_dtype.itemsize
        num_tokens = row.num_tokens - row.num_spilled
        first_byte = (lba - extent.first_lba) * self._block_bytes
        last = min(
            (first_byte + self._block_bytes - 1) // token_bytes, 2 * geometry.num_layers * num_tokens - 1
        )
        (first_run, start), (last_run, stop) = (
            divmod(index, max(num_tokens, 1)) for index in (first_byte // token_bytes, last)
        )
        if first_run != last_run:  # from one layer's K or V into the next
            start, stop = 0, num_tokens - 1
        layer = first_run // 2 if first_run // 2 == last_run // 2 else None
        start, stop = row.num_spilled + start, row.num_spilled + stop + 1
        return self._owner("tail", extent, layer, start, stop, "tail record", {row.id: row.num_spilled})

    @staticmethod
    def _owner(area, extent: NamedExtent, layer, start: int, stop: int, what: str, whole) -> Owner:
        names = tuple(row.name for row, _ in extent.shares)
        where = "several layers" if layer is None else f"layer {layer}"
        text = (
            f"{'sequence' if len(names) == 1 else 'sequences'} {extent.names} of model {extent.model!r},"
            f" {where}, tokens {start} to {stop - 1} ({what})"
        )
        return Owner(area, text, names, extent.model, layer, start, stop, whole)


def catalogue_owner(volume: Volume, block_bytes: int, lba: int) -> Owner:
    """The part of the catalogue that a block below the data area holds."""
    if lba == 0:
        return Owner("header", "the volume header")
    for area, file in (("database", volume.database), ("log", volume.wal)):
        index = lba - file.first_lba
        if 0 <= index < file.capacity // block_bytes:
            in_use = index * block_bytes < file.size and (area == "database" or volume.wal_exists)
            if not in_use:
                return Owner("nothing", f"the catalogue's {area}, in no use there")
            return Owner(area, f"the catalogue's {area}, block {index}")
    raise AssertionError(lba)
