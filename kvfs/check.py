"""Is everything on a drive as it should be? Catalogue, extents, blocks on flash, and the drive's own map.

A check changes nothing. What it finds says whether something is damaged (or only left over) and how many tokens
of which sequence remain whole; repair.py mends from that.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from kvfs.allocator import Extent
from kvfs.block_owners import BlockOwners, NamedExtent, Owner, tail_record_lbas
from kvfs.files.file_check import FileExtent
from kvfs.metadata import Catalogue, SequenceRow
from kvfs.objects.object_extent import ObjectExtent
from kvfs.scrub import verify_all
from kvfs.sealing.derived_extent import DerivedExtent
from spdk_glue.flash_admin import FlashAdmin
from spdk_glue.identify import NOT_GIVEN
from spdk_glue.namespace import Namespace

AnyExtent = NamedExtent | FileExtent | ObjectExtent | DerivedExtent
Progress = Callable[[int, int], None]  # blocks verified, of how many


@dataclass(frozen=True)
class Problem:
    """kind: one word for scripts; is_damage: False for what was left over and costs space only."""

    kind: str
    text: str
    is_damage: bool = True


@dataclass
class Report:
    """What a check found.

    whole_tokens: by sequence id, how many tokens a damaged sequence still has whole
    not_theirs: what files name outside the data area, or another file or sequence names as well
    lost_objects, lost_segments: numbers of objects, or derived segments, whose bytes are not all there, or
    cannot
        be told
    leaked: LBAs on flash that nothing names; lost: LBAs that cannot be read
    """

    problems: list[Problem] = field(default_factory=list)
    whole_tokens: dict[int, int] = field(default_factory=dict)
    not_theirs: list[FileExtent] = field(default_factory=list)
    lost_objects: set[int] = field(default_factory=set)
    lost_segments: set[int] = field(default_factory=set)
    leaked: list[Extent] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)

    @property
    def is_damaged(self) -> bool:
        return any(problem.is_damage for problem in self.problems)

    def add(self, kind: str, text: str, is_damage: bool = True) -> None:
        self.problems.append(Problem(kind, text, is_damage))

    def give_up(self, extent: AnyExtent) -> None:
        """What an extent holds cannot be told."""
        if isinstance(extent, FileExtent):
            self.not_theirs.append(extent)
        elif isinstance(extent, ObjectExtent):
            self.lost_objects.add(extent.object_id)
        elif isinstance(extent, DerivedExtent):
            self.lost_segments.add(extent.segment_id)
        else:
            self.cut(_without(extent))

    def lose(self, owner: Owner) -> None:
        """A block cannot be read."""
        self.cut(owner.whole_tokens)
        if owner.object is not None:
            self.lost_objects.add(owner.object)
        if owner.segment is not None:
            self.lost_segments.add(owner.segment)

    def cut(self, whole_tokens: dict[int, int]) -> None:
        for sequence_id, num_tokens in whole_tokens.items():
            self.whole_tokens[sequence_id] = min(num_tokens, self.whole_tokens.get(sequence_id, num_tokens))


def check_flash(flash: FlashAdmin, owner: Callable[[int], Owner], report: Report) -> None:
    """What the drive says of its own map."""
    count, findings = flash.check()
    for finding in findings:
        facts = [
            f"{name} {finding[name]}"
            for name in ("superblock", "page", "lba", "expected", "found")
            if finding[name] != NOT_GIVEN
        ]
        lba = int(finding["lba"])
        whose = "" if lba == NOT_GIVEN else f": {owner(lba).text}"
        kind = finding["kind"].decode()
        report.add("flash", f"flash: {kind} ({', '.join(facts)}){whose}".replace("(lba", "(LBA"))
    if count > len(findings):
        report.add("flash", f"flash: {count - len(findings)} more findings that the drive did not list")


def check_parity(flash: FlashAdmin, report: Report) -> None:
    """Pages that were read with the help of parity, so far."""
    damaged = int(flash.health()["damaged_superblocks"])
    if damaged:
        text = f"{damaged} superblocks have pages that only parity gives back: scrub writes them anew"
        report.add("repairable", text, is_damage=False)


def check_payloads(
    namespace: Namespace, owner: Callable[[int], Owner], report: Report, progress: Progress | None = None
) -> None:
    """Every page on flash against its checksum."""
    for step in verify_all(namespace):
        for lba in step.lost:
            whose = owner(lba)
            report.lost.append(lba)
            report.add("lost", f"LBA {lba} is lost: {whose.text}", is_damage=whose.area != "nothing")
            report.lose(whose)
        if progress is not None:
            progress(step.num_lbas, step.total_lbas)


def check_catalogue(catalogue: Catalogue, owners: BlockOwners, report: Report) -> None:
    """The catalogue by itself. Raises what reading it raises."""
    for text in catalogue.problems():
        report.add("catalogue", text)
    for text in catalogue.prefixes.leftovers():
        report.add("prefixes", text, is_damage=False)
    for text in owners.files.problems():
        report.add("files", text)
    orphans = owners.files.orphans()
    if orphans:
        text = f"{orphans} files that were deleted while open: the next mount gives their blocks back"
        report.add("orphans", text, is_damage=False)
    for sequence_id, position in owners.broken_links:
        row = owners.sequences.get(sequence_id)
        name = repr(row.name) if row else f"number {sequence_id}, which does not exist,"
        report.add("catalogue", f"sequence {name} links a group at {position}, which does not exist")
    for extent in owners.extents:
        if isinstance(extent, DerivedExtent) and extent.layout is not None and not extent.fits:
            report.add(
                "derived", f"{extent} are {extent.num_lbas}, not the {extent.layout.num_lbas} that it takes"
            )
            report.lost_segments.add(extent.segment_id)
    for row in owners.sequences.values():
        if row.model_id in owners.bad_models:
            report.add("catalogue", f"sequence {row.name!r}: {owners.bad_models[row.model_id]}")
            continue
        whole = _whole_tokens(row, owners)
        if whole is not None:
            text = f"sequence {row.name!r} has {row.num_tokens} tokens, but blocks for {whole} only"
            report.add("catalogue", text)
            report.cut({row.id: whole})


def _whole_tokens(row: SequenceRow, owners: BlockOwners) -> int | None:
    """How many tokens a sequence's rows have blocks for, where that is not what they say."""
    layout = owners.layout(row)
    group_tokens = layout.geometry.group_tokens
    positions = {
        position: extent.num_lbas
        for extent in owners.extents_of(row.id)
        for share, position in extent.shares
        if share.id == row.id and position is not None
    }
    groups = 0
    wanted = -(-row.num_spilled // group_tokens)
    while positions.get(groups) == layout.group_lbas:
        groups += 1
    spilled = min(max(row.num_spilled, 0), groups * group_tokens)
    tail_lbas = tail_record_lbas(layout, row.num_tokens - row.num_spilled)
    is_whole = spilled == row.num_spilled <= row.num_tokens and wanted == len(positions)
    if is_whole and tail_lbas == row.tail_lbas:
        return None
    return spilled


def check_extents(
    namespace: Namespace,
    owners: BlockOwners,
    first_data_lba: int,
    in_memory: Iterable[Extent],
    report: Report,
) -> np.ndarray:
    """bool [num_lbas]: the blocks that something names.

    Named blocks lie in the data area, are nobody else's and are on flash; nothing else is.

    in_memory: extents that an open store has handed out or holds back, and no row names
    """
    mapped = np.zeros(namespace.num_lbas, bool)
    for first, count in namespace.allocated():
        mapped[first : first + count] = True
    named = np.zeros(namespace.num_lbas, bool)
    named[:first_data_lba] = True
    untold = [(extent.first_lba, extent.num_lbas) for extent in owners.untold]
    for first, count in [*in_memory, *owners.unlinked, *untold]:
        named[max(first, 0) : max(first + count, 0)] = True
    reached: AnyExtent | None = None  # the extent before that reaches furthest
    for extent in owners.extents:
        if not first_data_lba <= extent.first_lba < extent.stop_lba <= namespace.num_lbas:
            report.add("extent", f"{extent} lie outside the data area")
            report.give_up(extent)
            continue
        if reached is not None and extent.first_lba < reached.stop_lba:
            report.add("overlap", f"{extent} overlap {reached}: what they hold cannot be told")
            report.give_up(extent)
            report.give_up(reached)
        if reached is None or extent.stop_lba > reached.stop_lba:
            reached = extent
        named[extent.first_lba : extent.stop_lba] = True
        if not isinstance(extent, FileExtent):  # a file's blocks may be allocated and never written
            _check_mapped(extent, owners, mapped, report)
    report.leaked = _runs(mapped & ~named)
    count = sum(num_lbas for _, num_lbas in report.leaked)
    if count:
        text = f"{count} blocks on flash that nothing names, from LBA {report.leaked[0][0]} on"
        report.add("leak", f"{text}: an unflushed end left them, and the next opening gives them back", False)
    return named


def check_allocator(free: Iterable[Extent], named: np.ndarray, report: Report) -> None:
    """An open store's free blocks are those that nothing names."""
    is_free = np.zeros(len(named), bool)
    for first, count in free:
        is_free[first : first + count] = True
    for first, count in _runs(is_free & named):
        report.add("allocator", f"blocks {first} to {first + count - 1} are named, and free to be written")
    for first, count in _runs(~is_free & ~named):
        report.add("allocator", f"blocks {first} to {first + count - 1} are neither named nor free")


def _without(extent: NamedExtent) -> dict[int, int]:
    """Tokens that remain of each sequence without an extent."""
    group_tokens = extent.layout.geometry.group_tokens
    return {
        row.id: row.num_spilled if position is None else min(position * group_tokens, row.num_spilled)
        for row, position in extent.shares
    }


def _check_mapped(
    extent: NamedExtent | ObjectExtent | DerivedExtent, owners: BlockOwners, mapped: np.ndarray, report: Report
) -> None:
    missing = [
        lbas.start + position
        for lbas in extent.expected_pages()
        for position in np.flatnonzero(~mapped[lbas.start : lbas.stop]).tolist()
    ]
    if not missing:
        return
    owner = owners.owner(missing[0])
    report.add("unmapped", f"{len(missing)} of {extent} are not on flash, LBA {missing[0]} first: {owner.text}")
    for lba in missing:
        report.lose(owners.owner(lba))


def _runs(flags: np.ndarray) -> list[Extent]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return [(first, stop - first) for first, stop in edges.reshape(-1, 2).tolist()]
