"""Sealing over several drives: each derives what its heads' parts need.

A model's policy is noted on every drive, with the model and with its parts. A drive that is away when it
changes takes it from the others when it is back: the change is a generation of the set, so it is known who was.
"""

from collections.abc import Iterable

from kvfs.derived import DerivedSegment
from kvfs.errors import InvalidArgument
from kvfs.model import Model
from kvfs.sealing.derived_catalogue import DerivedUsage
from kvfs.sealing.interface import derives_of, names_of
from kvfs.sealing.policy import derive_of
from spdk_glue.vendor_command import Derive


class SetSealing:
    """As SealingStore; a part of DriveSet."""

    def set_sealing(self, model: Model, seal: Iterable[str]) -> None:
        """See Store.set_sealing. A drive that is lost is told when it is back."""
        names = names_of(derives_of(seal))
        with self._lock:
            self._check_open()
            self._check_model(model)
            for member in self._live:
                with member.in_use(f"model {model.name!r}") as store:
                    for part in _with_parts(store, model):
                        store.set_sealing(part, names)
            if len(self._live) < len(self._members):
                self.drives._write(self.drives._next())

    def sealing(self, model: Model) -> tuple[str, ...]:
        """What `set_sealing` has asked for."""
        with self._lock:
            self._check_open()
            self._check_model(model)
            with self._live[0].in_use(f"model {model.name!r}") as store:
                return store.sealing(store.model(model.name))

    def derived_usage(self) -> list[DerivedUsage]:
        """See Store.derived_usage: sums over the drives, tokens once for each part."""
        found: dict[tuple[str, str], list] = {}
        with self._lock:
            self._check_open()
            for member in self._live:
                with member.in_use("derived data") as store:
                    for usage in store.derived_usage():
                        counts = found.setdefault(
                            (usage.model.partition("/")[0], usage.derive), [False, 0, 0, 0, 0]
                        )
                        counts[0] |= usage.is_wanted
                        for at, name in enumerate(
                            ("num_segments", "num_tokens", "num_bytes", "dense_bytes"), 1
                        ):
                            counts[at] += getattr(usage, name)
        return [DerivedUsage(*key, *counts) for key, counts in sorted(found.items())]

    def drop_derived(self, model: str | None = None, derive: str | None = None) -> int:
        """See Store.drop_derived."""
        count = 0
        with self._lock:
            self._check_open()
            wanted = None if model is None else self.model(model)
            for member in self._live:
                with member.in_use("derived data") as store:
                    names = [None] if wanted is None else [part.name for part in _with_parts(store, wanted)]
                    count += sum(store.drop_derived(name, derive) for name in names)
        return count

    def _check_model(self, model: Model) -> None:
        if not isinstance(model, Model) or self._models.get(model.name) is not model:
            raise InvalidArgument(f"{model!r} is not a model of this store: use store.model or add_model")


def _with_parts(store, model: Model) -> list[Model]:
    """What a drive knows of a model: itself, and its parts of any number of heads."""
    return [known for known in store.models() if known.name.partition("/")[0] == model.name]


def take_policies(store, source) -> None:
    """A drive that was away, or is new in the set, is to seal what another drive's store says."""
    for model in source.models():
        if "/" not in model.name:
            names = source.sealing(model)
            store._add_model(model.name, model.geometry)
            for known in _with_parts(store, model):
                if store.sealing(known) != names:
                    store.set_sealing(known, names)


class SealedSetSequence:
    """As SealedSequence; a part of SetSequence."""

    def derived_segments(self, derive: str | Derive) -> list[DerivedSegment]:
        """See Sequence.derived_segments: what all parts have; blocks are the first part's, and have no id."""
        with self._store._lock:
            self._use()
            first, *others = [part.derived_segments(derive) for part in self._parts]
        common = set.intersection(*({_groups(one) for one in found} for found in (first, *others)))
        return [
            DerivedSegment(one.derive, one.first_group, one.num_groups, one.base_lba)
            for one in first
            if _groups(one) in common
        ]

    def seal(self, derive: str | Derive = "sketch") -> int:
        """See Sequence.seal: all drives at once. How many tokens all parts have it of."""
        return min(self._seal_parts(lambda part: part.seal(derive), derive))

    def reseal(self, derive: str | Derive | None = None) -> int:
        """See Sequence.reseal: how many segments of parts were damaged."""
        return sum(self._seal_parts(lambda part: part.reseal(derive), derive))

    def _seal_parts(self, job, derive: str | Derive | None) -> list[int]:
        """What a job gives for every part. The set is free for others meanwhile."""
        if derive is not None:
            derive_of(derive)
        with self._store._lock:
            self._use()
            parts = list(zip(self._parts, self._record.parts, strict=True))

        def run(part, place) -> int:
            with self._store._member(place).in_use(self._holding(place)):
                return job(part)

        return self._store._at_once([lambda pair=pair: run(*pair) for pair in parts])


def _groups(segment: DerivedSegment) -> tuple[int, int]:
    return segment.first_group, segment.num_groups
