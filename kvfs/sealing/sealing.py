"""Sealing: which segments a store has, making the next one, and giving them up.

A segment is made without the store's lock: its groups are immutable, and its blocks nobody's but this module's
until it is named. Before it is named it is made sure that the sequence still has these groups; what was read of
groups that were given up meanwhile is thrown away. A segment whose groups no flush has named yet waits in the
sequence, as its groups do, and gets its row with theirs.

What is derived can be made again. So sealing is what gives way: it takes no space that is short, its blocks are
given up before anything is refused for want of space, and it fails without an error for anybody.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from kvfs.allocator import Extent
from kvfs.derived import DerivedSegment
from kvfs.sealing.commands import derived_layout, seal_commands
from kvfs.sealing.derived_catalogue import ROW_BYTES, DerivedCatalogue, DerivedUsage
from kvfs.sealing.policy import DERIVES, name_of, next_segment
from spdk_glue.derived_layout import groups_per_segment
from spdk_glue.status import NvmeStatusError, Status
from spdk_glue.vendor_command import DTYPE_OF_NAME, Derive

if TYPE_CHECKING:
    from kvfs.model import Model
    from kvfs.sequence import Sequence
    from kvfs.store import Store

log = logging.getLogger(__name__)

KEPT_FREE = 16  # of the drive, one part in so many: in the background sealing leaves it free
PLACEMENT_SHORT_LIVED = 1  # of segments that longer ones replace: with tail records
# not finite, or damaged: nothing can be made of it
_NOT_SEALABLE = (Status.CANNOT_BE_SEALED, Status.UNRECOVERED_READ_ERROR, Status.DEALLOCATED_BLOCK)
MAX_REFUSED = 4096  # segments of which it is remembered that they cannot be sealed


@dataclass
class SealingCounters:
    """Since the store was opened. Bytes are whole blocks.

    segments, bytes_written: made; bytes_read: of the groups they were made of
    replaced: given up for longer ones; dropped: given up by request; made_room: given up because space was
    short
    gave_way: not made for want of space, or because the catalogue was full; overtaken: made of groups that were
    given up meanwhile; refused: that stay dense, since keys or values are not finite; damaged: found damaged,
    and given up
    """

    segments: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    replaced: int = 0
    dropped: int = 0
    made_room: int = 0
    gave_way: int = 0
    overtaken: int = 0
    refused: int = 0
    damaged: int = 0


class Outcome(Enum):
    MADE = auto()
    COMPLETE = auto()  # nothing is left to be made
    NO_ROOM = auto()
    REFUSED = auto()  # this one stays dense
    OVERTAKEN = auto()  # the sequence has changed


@dataclass(frozen=True)
class _Work:
    """A segment to be made. epoch: of the sequence when it was chosen."""

    sequence: "Sequence"
    derive: Derive
    first: int
    count: int
    bases: tuple[int, ...]
    base_lba: int
    num_lbas: int
    epoch: int
    placement_id: int


class Sealing:
    """Of one store. Methods are called with the store's lock unless they say otherwise."""

    def __init__(self, store: "Store", catalogue: DerivedCatalogue):
        self._store = store
        self._catalogue = catalogue
        self._making = threading.Lock()  # one segment at a time; taken before the store's lock
        self._under_way: Extent | None = None
        self._refused: OrderedDict[tuple, None] = OrderedDict()
        self.wanted = catalogue.wanted()  # layouts, by model id
        self.changes = 0  # of what there is: lists of segments made before are old
        self.counters = SealingCounters()

    # policy

    def set_wanted(self, model_id: int, derives: list[Derive]) -> None:
        self._catalogue.set_wanted(model_id, derives)
        self.load_wanted()

    def load_wanted(self) -> None:
        """Read what is to be made of which model."""
        self.wanted = self._catalogue.wanted()

    # what there is

    def rows_of(self, model_id: int) -> list[tuple[int, str, int, "Model"]]:
        """Arguments of `lacks` of a model's sequences, as they are stored."""
        model = next((model for model in self._store._models.values() if model.id == model_id), None)
        return [] if model is None else [(*row, model) for row in self._catalogue.sequences_of(model_id)]

    def lacks(self, sequence_id: int, name: str, num_groups: int, model: "Model") -> bool:
        """Whether a sequence of so many whole groups has less than its model's policy wants."""
        rows = self._catalogue.segments(sequence_id)
        for derive in self.wanted.get(model.id, ()):
            have = {row.first_group: row.num_groups for row in rows if row.derive == derive}
            if next_segment(num_groups, self.full_groups(model, derive), have, derive, at_once=False):
                return True
        return False

    @staticmethod
    def full_groups(model: "Model", derive: Derive) -> int:
        """Of a full segment."""
        geometry, dtype = model.geometry, DTYPE_OF_NAME[model.geometry.dtype]
        return groups_per_segment(
            derive, model.layout.page_size, geometry.head_dim, dtype, geometry.group_tokens
        )

    def segments(self, sequence: "Sequence") -> list[DerivedSegment]:
        """All that the sequence has, in the order of their last groups; they may overlap."""
        groups = sequence._groups
        found = [
            DerivedSegment(row.derive, row.first_group, row.num_groups, row.base_lba, row.id)
            for row in self._catalogue.segments(sequence.id)
            # rows may be of groups that a truncation, not stored yet, has given up
            if row.position < len(groups) and groups[row.position].id == row.group_id
        ]
        return sorted(found + sequence._unnamed_segments, key=lambda one: one.first_group + one.num_groups)

    def longest(self, sequence: "Sequence", derive: Derive) -> list[DerivedSegment]:
        """In token order, of those that begin together the longest: none overlap."""
        by_first = {one.first_group: one for one in self.segments(sequence) if one.derive == derive}
        return [by_first[first] for first in sorted(by_first)]

    # making

    def seal_next(
        self,
        sequence: "Sequence",
        derive: Derive,
        at_once: bool,
        before_command: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Make the next segment that a sequence lacks, if it lacks one. Without the store's lock.

        at_once: also a short one, and if space is short; before_command: called before each command, to wait
        or, by raising, to stop

        Raises NvmeStatusError, StoreClosed, InvalidArgument.
        """
        with self._making:
            with self._store._lock:
                work = self._begin(sequence, derive, at_once)
                if isinstance(work, Outcome):
                    return work
                layout = derived_layout(sequence.model.layout, derive, work.count)
                self._under_way = (work.base_lba, work.num_lbas)
            try:
                for command in seal_commands(
                    sequence.model.layout, layout, work.bases, work.base_lba, work.placement_id
                ):
                    before_command()
                    self._store._namespace.seal_groups(command)
            except BaseException as error:
                with self._store._lock:
                    self._give_back()
                    return self._failed(work, error)
            with self._store._lock:
                return self._end(work)

    def _begin(self, sequence: "Sequence", derive: Derive, at_once: bool) -> "_Work | Outcome":
        sequence._check_usable()
        have = {one.first_group: one.num_groups for one in self.longest(sequence, derive)}
        full, num_groups = self.full_groups(sequence.model, derive), sequence._num_whole_groups()
        chosen = next_segment(
            num_groups,
            full,
            have,
            derive,
            at_once,
            lambda first, count: (sequence._history.epoch, derive, first, count) in self._refused,
        )
        if chosen is None:
            return Outcome.COMPLETE
        first, count = chosen
        allocator = self._store._allocator
        num_lbas = derived_layout(sequence.model.layout, derive, count).num_lbas
        kept_free = 0 if at_once else self._store._num_data_lbas // KEPT_FREE
        base_lba = None
        if allocator.free_lbas >= num_lbas + kept_free:
            base_lba = allocator.allocate(num_lbas)
            if base_lba is None and at_once and self._store._may_free:
                self._store._sync()
                base_lba = allocator.allocate(num_lbas)
        if base_lba is None:
            self.counters.gave_way += 1
            return Outcome.NO_ROOM
        bases = tuple(group.base_lba for group in sequence._groups[first : first + count])
        placement_id = sequence._placement_id if count == full else PLACEMENT_SHORT_LIVED
        epoch = sequence._history.epoch
        return _Work(sequence, derive, first, count, bases, base_lba, num_lbas, epoch, placement_id)

    def _give_back(self) -> None:
        """What was being made is not to be."""
        if self._under_way is not None:
            self._store._allocator.hold(*self._under_way)
            self._under_way = None

    def _failed(self, work: _Work, error: BaseException) -> Outcome:
        if isinstance(error, NvmeStatusError):
            if not self._is_current(work):  # what was given up meanwhile may read as anything
                self.counters.overtaken += 1
                return Outcome.OVERTAKEN
            if error.status in _NOT_SEALABLE:
                self._note_refusal(work, error)
                return Outcome.REFUSED
            if error.status == Status.CAPACITY_EXCEEDED:
                self.counters.gave_way += 1
                return Outcome.NO_ROOM
        raise error

    def _is_current(self, work: _Work) -> bool:
        """Whether the sequence still has the groups that were read."""
        sequence = work.sequence
        return not (self._store._closed or sequence.is_deleted) and sequence._history.epoch == work.epoch

    def _end(self, work: _Work) -> Outcome:
        if not self._is_current(work):
            self._give_back()
            self.counters.overtaken += 1
            return Outcome.OVERTAKEN
        segment = DerivedSegment(work.derive, work.first, work.count, work.base_lba)
        if not self._name(work.sequence, segment, work.num_lbas):
            self._give_back()
            self.counters.gave_way += 1
            return Outcome.NO_ROOM
        self._under_way = None
        block_bytes = self._store._namespace.block_bytes
        group_lbas = work.sequence.model.layout.group_lbas
        self.counters.segments += 1
        self.counters.bytes_read += work.count * group_lbas * block_bytes
        self.counters.bytes_written += work.num_lbas * block_bytes
        return Outcome.MADE

    def _name(self, sequence: "Sequence", segment: DerivedSegment, num_lbas: int) -> bool:
        """A row where the last group has one; else it waits for that in the sequence."""
        last = sequence._groups[segment.first_group + segment.num_groups - 1]
        if last.id is None:
            shorter = [
                one
                for one in sequence._unnamed_segments
                if (one.derive, one.first_group) == (segment.derive, segment.first_group)
            ]
            self._forget_unnamed(sequence, shorter)
            self.counters.replaced += len(shorter)
            sequence._unnamed_segments.append(segment)
        elif not self._add_row(last.id, segment, num_lbas):
            return False
        self.changes += 1
        return True

    def _add_row(self, group_id: int, segment: DerivedSegment, num_lbas: int) -> bool:
        """False: the catalogue has no room to spare."""
        catalogue = self._store._catalogue
        if catalogue.batch.free_bytes < ROW_BYTES:
            return False
        with catalogue.transaction():
            replaced = self._catalogue.add(
                group_id, segment.derive, segment.num_groups, segment.base_lba, num_lbas
            )
        self.counters.replaced += len(replaced)
        for extent in replaced:
            self._store._allocator.hold(*extent)
        return True

    def groups_stored(self, sequence: "Sequence") -> None:
        """Groups have got rows: what was made of them gets rows too, as long as the catalogue has room."""
        if not sequence._unnamed_segments or self._store._catalogue.is_in_transaction:
            return
        waiting = []
        for segment in sequence._unnamed_segments:
            last = sequence._groups[segment.first_group + segment.num_groups - 1]
            if last.id is None or not self._add_row(last.id, segment, self.num_lbas(sequence, segment)):
                waiting.append(segment)
        sequence._unnamed_segments[:] = waiting
        self.changes += 1

    @staticmethod
    def num_lbas(sequence: "Sequence", segment: DerivedSegment) -> int:
        return derived_layout(sequence.model.layout, segment.derive, segment.num_groups).num_lbas

    # what cannot be sealed

    def _note_refusal(self, work: _Work, error: NvmeStatusError) -> None:
        self.counters.refused += 1
        log.warning(
            "sequence %r: groups %d to %d stay dense, no %s can be made of them: %s",
            work.sequence.name,
            work.first,
            work.first + work.count - 1,
            name_of(work.derive),
            error,
        )
        self._refused[work.epoch, work.derive, work.first, work.count] = None
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    # giving up

    def groups_dropped(self, sequence: "Sequence", num_groups: int) -> None:
        """A sequence has only its first groups left. Rows go with those of the groups."""
        gone = [one for one in sequence._unnamed_segments if one.first_group + one.num_groups > num_groups]
        self._forget_unnamed(sequence, gone)
        self.changes += 1

    def _forget_unnamed(self, sequence: "Sequence", segments: list[DerivedSegment]) -> None:
        for segment in segments:
            sequence._unnamed_segments.remove(segment)
            self._store._allocator.hold(segment.base_lba, self.num_lbas(sequence, segment))

    def drop(self, sequence: "Sequence", segments: list[DerivedSegment]) -> None:
        """Give up segments of a sequence, and of those that share them."""
        self._forget_unnamed(sequence, [one for one in segments if one in sequence._unnamed_segments])
        self._hold(self._catalogue.drop([one.id for one in segments if one.id is not None]))

    def drop_of(self, model_id: int | None, derive: Derive | None) -> int:
        """Give up all of a model and a layout, or of any; how many."""
        dropped = self._forget_all_unnamed(model_id, derive)
        dropped += self._hold(self._catalogue.drop_of(model_id, derive))
        self.counters.dropped += dropped
        return dropped

    def make_room(self, num_lbas: int) -> bool:
        """Give up segments of so many blocks, those made longest ago first; False: there are none.

        The blocks can be had once the catalogue is durable.
        """
        if self._store._catalogue.is_in_transaction:
            return False  # it might be taken back
        wanted = max(num_lbas, self._store._num_data_lbas // KEPT_FREE)
        given_up = self._hold(self._catalogue.drop_oldest(wanted)) or self._forget_all_unnamed(None, None)
        self.counters.made_room += given_up
        return given_up > 0

    @property
    def num_lbas_in_all(self) -> int:
        """Blocks that `make_room` can free in the end."""
        return sum(self._num_lbas_of_each().values())

    @property
    def num_lbas_under_way(self) -> int:
        """Of the segment that is being made."""
        return self._under_way[1] if self._under_way else 0

    def _num_lbas_of_each(self) -> dict[Derive, int]:
        found = {derive: self._catalogue.num_lbas(derive) for derive in DERIVES.values()}
        for sequence in self._store._sequences.values():
            for segment in sequence._unnamed_segments:
                found[segment.derive] += self.num_lbas(sequence, segment)
        return found

    def _forget_all_unnamed(self, model_id: int | None, derive: Derive | None) -> int:
        count = 0
        for sequence in self._store._sequences.values():
            if model_id in (None, sequence.model.id):
                chosen = [one for one in sequence._unnamed_segments if derive in (None, one.derive)]
                self._forget_unnamed(sequence, chosen)
                count += len(chosen)
        self.changes += 1
        return count

    def _hold(self, extents: list[Extent]) -> int:
        for extent in extents:
            self._store._allocator.hold(*extent)
        self.changes += 1
        return len(extents)

    # what can be seen

    def extents_in_memory(self) -> list[Extent]:
        """That are taken, and named by no row."""
        return [self._under_way] * (self._under_way is not None) + [
            (segment.base_lba, self.num_lbas(sequence, segment))
            for sequence in self._store._sequences.values()
            for segment in sequence._unnamed_segments
        ]

    def usage(self) -> list[DerivedUsage]:
        """Of every model and layout that is there or wanted."""
        found = {(model_id, derive): counts for model_id, derive, *counts in self._catalogue.usage()}
        block_bytes = self._store._namespace.block_bytes
        rows = []
        for model in self._store._models.values():
            for name, derive in DERIVES.items():
                is_wanted = derive in self.wanted.get(model.id, ())
                num_segments, num_groups, num_lbas = found.get((model.id, derive), (0, 0, 0))
                for sequence in self._store._sequences.values():
                    if sequence.model.id == model.id:
                        for one in sequence._unnamed_segments:
                            if one.derive == derive:
                                num_segments, num_groups = num_segments + 1, num_groups + one.num_groups
                                num_lbas += self.num_lbas(sequence, one)
                if num_segments or is_wanted:
                    tokens = num_groups * model.geometry.group_tokens
                    dense = num_groups * model.layout.group_lbas * block_bytes
                    rows.append(
                        DerivedUsage(
                            model.name, name, is_wanted, num_segments, tokens, num_lbas * block_bytes, dense
                        )
                    )
        return sorted(rows, key=lambda row: (row.model, row.derive))

    def as_dict(self) -> dict:
        """For counters: what was done, and the bytes of each layout."""
        block_bytes = self._store._namespace.block_bytes
        extra = {
            f"{name_of(derive)}_bytes": num_lbas * block_bytes
            for derive, num_lbas in self._num_lbas_of_each().items()
        }
        return {**asdict(self.counters), **extra}
