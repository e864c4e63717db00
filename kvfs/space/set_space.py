"""Caps as a set of drives offers them: as a store does, for all drives together."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from kvfs.errors import ModelInUse
from kvfs.metadata import SequenceRow
from kvfs.sequence_attributes import OWNER
from kvfs.space.interface import SpaceStore
from kvfs.space.leftovers import Leftover, leftover_of
from kvfs.space.set_caps import SetCaps
from kvfs.space.space_usage import SpaceUsage


class SetSpace(SpaceStore):
    """A part of DriveSet. A drive never evicts a part: only whole sequences may be."""

    _space: SetCaps

    def space_usage(self) -> list[SpaceUsage]:
        """As Store.space_usage, of drives that are not lost."""
        with self._lock:
            self._check_open()
            found = []
            for member in self._live:
                with member.in_use("its space") as store:
                    found += store.space_usage()
            return found

    def sequence_counts(self) -> dict[str, int]:
        """As Store.sequence_counts, but all are looked at."""
        with self._lock:
            counts = Counter(row.model_id for row in self.catalogue_rows())
            return {model.name: counts[model.id] for model in self.models()}

    def leftovers(self) -> list[Leftover]:
        """As Store.leftovers, but all sequences are looked at, and none goes by itself. Whose process one was
        that has its first part on a lost drive, nobody can say: it is left out."""
        with self._lock:
            self._check_open()
            owners: dict[tuple[str, str], bytes] = {}  # by drive and name of a first part
            for member in self._live:
                with member.in_use("sequences of processes") as store, store._lock:
                    values = store._catalogue.values_of(OWNER)
                    for part in store._catalogue.sequences_with(OWNER):
                        owners[member.drive_id, part.name] = values[part.id]
            found = []
            for row in self.catalogue_rows():
                record = self._placed[row.name]
                owner = owners.get((record.parts[0].drive_id, record.of(0).member_name))
                if owner is not None:
                    found.append(leftover_of(row.name, row.num_tokens, owner))
            return [each for each in found if each is not None]

    def delete_model(self, name: str) -> None:
        """As Store.delete_model, from every drive. Raises DriveLost where one is missing, nothing deleted."""
        with self._lock:
            self.model(name)
            num_sequences = self.sequence_counts()[name]
            if num_sequences:
                raise ModelInUse(name, num_sequences)
            for member in self._members.values():  # one that is missing would bring it back
                with member.in_use(f"model {name!r}"):
                    pass
            for member in self._live:
                with member.in_use(f"model {name!r}") as store:
                    for part in [each.name for each in store.models()]:
                        if part == name or part.startswith(f"{name}/"):
                            store.delete_model(part)
            for quota in [each for each in self._space.quotas if each.model == name]:
                self._space.remove_quota(quota.model, quota.tenant)
            del self._models[name]

    def sequence_rows(
        self, after: str = "", limit: int = 1000, *, model: str | None = None
    ) -> Iterator[SequenceRow]:
        """As Store.sequence_rows, but all are looked at."""
        model_id = None if model is None else self.model(model).id
        rows = (row for row in self.catalogue_rows() if row.name > after and model_id in (None, row.model_id))
        return islice(rows, limit)
