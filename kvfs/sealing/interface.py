"""Sealing as users see it: what Store and Sequence add for it."""

from collections.abc import Iterable

from kvfs.derived import DerivedSegment
from kvfs.model import Model
from kvfs.sealing.derived_catalogue import DerivedUsage
from kvfs.sealing.policy import DERIVES, derive_of, name_of
from kvfs.sealing.sealing import Outcome
from spdk_glue.vendor_command import Derive


def derives_of(names: Iterable[str | Derive]) -> list[Derive]:
    """Raises InvalidArgument."""
    if isinstance(names, (str, Derive)):
        names = [names]
    return sorted({derive_of(name) for name in names})


def names_of(derives: Iterable[Derive]) -> list[str]:
    return [name_of(derive) for derive in derives]


class SealingStore:
    """What Store adds for it."""

    def set_sealing(self, model: Model, seal: Iterable[str]) -> None:
        """What the drive is to make of a model's token groups from here on, in the background.

        seal: of "sketch" and "channel_major_keys"; () for nothing: what is there stays. Groups that are there
        already are sealed too. Durable after the next flush. Raises InvalidArgument.
        """
        derives = derives_of(seal)
        with self._lock:
            self._check_open()
            self._check_own(model)
            self._sealing.set_wanted(model.id, derives)
            if derives and self._sealer is not None:
                self._sealer.look_at_all([model.id])
                for sequence in self._sequences.values():  # which may have more than is stored
                    self._spilled(sequence)

    def sealing(self, model: Model) -> tuple[str, ...]:
        """What `set_sealing` has asked for."""
        with self._lock:
            self._check_open()
            self._check_own(model)
            return tuple(names_of(self._sealing.wanted.get(model.id, ())))

    def derived_usage(self) -> list[DerivedUsage]:
        """What derived data take, by model and layout. Reads all segments' rows."""
        with self._lock:
            self._check_open()
            return self._sealing.usage()

    def drop_derived(self, model: str | None = None, derive: str | None = None) -> int:
        """Give up derived data, of one model's name or one layout only if they are given; how many segments.

        Attention reads the tokens' own pages from then on. Where a model's sealing asks for it, it is made
        again as sequences grow.
        """
        kind = None if derive is None else derive_of(derive)
        with self._lock:
            self._check_open()
            return self._sealing.drop_of(None if model is None else self.model(model).id, kind)


class SealedSequence:
    """What Sequence adds for it."""

    def derived_segments(self, derive: str | Derive) -> list[DerivedSegment]:
        """What of a layout there is, in token order; none overlap. Tokens that none holds are read dense."""
        derive = derive_of(derive)
        with self._store._lock:
            self._check_usable()
            changes, found = self._known_segments
            if changes != self._store._sealing.changes:
                changes, found = self._known_segments = (self._store._sealing.changes, {})
            if derive not in found:
                found[derive] = self._store._sealing.longest(self, derive)
            return found[derive]

    def seal(self, derive: str | Derive = "sketch") -> int:
        """Have the drive derive what sparse attention reads of all complete groups, and wait for it.

        derive: "sketch" or "channel_major_keys". What is there already stays as it is. Others use the store
        meanwhile. Durable after the next flush. Returns how many tokens have it now: fewer than there are in
        complete groups where the drive is full, or keys or values are not finite.

        Raises InvalidArgument, NvmeStatusError.
        """
        derive = derive_of(derive)
        sealing = self._store._sealing
        with self._store._lock:
            self._check_usable()
            if self._layers is not None:
                self._wait_for_spills()
        outcome = Outcome.MADE
        while outcome not in (Outcome.COMPLETE, Outcome.NO_ROOM):
            outcome = sealing.seal_next(self, derive, at_once=True)
        group_tokens = self.model.geometry.group_tokens
        return sum(one.num_groups for one in self.derived_segments(derive)) * group_tokens

    def reseal(self, derive: str | Derive | None = None) -> int:
        """Verify what was derived, of one layout or of all, and make anew what is damaged; how many segments
        were.

        Raises InvalidArgument, NvmeStatusError.
        """
        derives = [*DERIVES.values()] if derive is None else [derive_of(derive)]
        damaged = [self._drop_damaged(each) for each in derives]
        for each, count in zip(derives, damaged, strict=True):
            if count:
                self.seal(each)
        return sum(damaged)

    def _drop_damaged(self, derive: Derive | None) -> int:
        """Verify segments, of one layout or of all, and give up those that are damaged; how many."""
        with self._store._lock:
            self._check_usable()
            sealing = self._store._sealing
            segments = [one for one in sealing.segments(self) if derive in (None, one.derive)]
            extents = [(one.base_lba, sealing.num_lbas(self, one)) for one in segments]
        lost = [self._store._namespace.lost(*extent) for extent in extents]
        with self._store._lock:
            self._check_usable()
            still_there = set(sealing.segments(self))
            damaged = [one for one, lbas in zip(segments, lost, strict=True) if lbas and one in still_there]
            sealing.drop(self, damaged)
            sealing.counters.damaged += len(damaged)
            return len(damaged)

    def _drop_derived(self, segment: DerivedSegment) -> None:
        """The drive calls it damaged: give it up, and have it made anew if the model's sealing asks for it."""
        with self._store._lock:
            if segment in self._store._sealing.segments(self):
                self._store._sealing.drop(self, [segment])
                self._store._sealing.counters.damaged += 1
                self._store._spilled(self)

    def _num_whole_groups(self) -> int:
        """That are complete on flash, in all layers."""
        if self._layers is None:
            num_spilled = self._row.num_spilled
        else:
            for layer in range(self.model.geometry.num_layers):
                self._end_finished_spills(layer)
            num_spilled = min(tail.num_spilled for tail in self._layers)
        return num_spilled // self.model.geometry.group_tokens

    @property
    def _has_spills(self) -> bool:
        return self._layers is not None and any(tail.spills for tail in self._layers)
