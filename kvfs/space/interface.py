"""Caps as a store offers them."""

from collections.abc import Iterator

from kvfs.errors import InvalidArgument, ModelInUse, NoSuchQuota
from kvfs.metadata import SequenceRow
from kvfs.prefix.match import check_tenant
from kvfs.space.background import BackgroundEvictor
from kvfs.space.background_policy import Background, checked_background
from kvfs.space.caps import POLICIES, QuotaUsage
from kvfs.space.leftovers import Leftover, leftovers_of
from kvfs.space.set_caps import SetCaps
from kvfs.space.space import Space
from kvfs.space.space_catalogue import Candidate, Quota
from kvfs.space.space_usage import SpaceUsage, space_usage

MOST_ROWS = 100_000  # of one page


class SpaceStore:
    """What Store and DriveSet add for it. Expects a store's lock and models."""

    _space: Space | SetCaps
    _evictor: BackgroundEvictor

    def set_quota(
        self,
        model: str = "",
        tenant: str = "",
        *,
        capacity_bytes: int,
        low_percent: int = 100,
        policy: str = "lru",
    ) -> None:
        """Let sequences of a model, of a tenant, or of both, take so many bytes of flash together, at most.

        model, tenant: empty: all of them together
        low_percent: of the cap: an eviction goes on until no more than that is used
        policy: who goes first: "lru", or "clock": those that were looked for again get another turn

        What is above the cap is evicted at once; if pinned sequences alone are, nothing new is taken. Durable
        after the next flush. Raises InvalidArgument.
        """
        quota = checked_quota(model, tenant, capacity_bytes, low_percent, policy)
        with self._lock:
            self._check_open()
            if model:
                self.model(model)
            self._space.set_quota(quota)

    def remove_quota(self, model: str = "", tenant: str = "") -> None:
        """Raises NoSuchQuota."""
        with self._lock:
            self._check_open()
            if not self._space.remove_quota(model, tenant):
                raise NoSuchQuota(model, tenant)

    def quotas(self) -> list[QuotaUsage]:
        """Caps and what they count."""
        with self._lock:
            self._check_open()
            return self._space.usages()

    def evict(
        self, model: str = "", tenant: str = "", *, to_bytes: int | None = None, dry_run: bool = False
    ) -> list[Candidate]:
        """Delete what a cap counts, used longest ago first, until `to_bytes` are left; None: what has outlived
        its time to live, of all. Returns what is, or with dry_run would be, deleted. Raises NoSuchQuota."""
        with self._lock:
            self._check_open()
            return self._space.evict_to(model, tenant, to_bytes, dry_run)

    def set_background_eviction(
        self, *, expired: bool = False, high_percent: int | None = None, low_percent: int | None = None
    ) -> None:
        """Have the process that has the drive open evict unasked; nothing, by default.

        expired: what has outlived its time to live (attribute user.kvfs.ttl, in seconds since the last use)
        high_percent: of the drive: where it is fuller, sequences used longest ago go until `low_percent` are in
            use (by default 10 less). What can be derived again counts as free; objects and files count as in
            use, and none of them goes.

        Never what is pinned or in use. Durable after the next flush. Raises InvalidArgument.
        """
        background = checked_background(expired, high_percent, low_percent)
        with self._lock:
            self._check_open()
            self._space.set_background(background)
        self._evictor.begin()

    def background_eviction(self) -> Background:
        """What is evicted unasked."""
        with self._lock:
            self._check_open()
            return self._space.background

    def space_usage(self) -> list[SpaceUsage]:
        """What each drive's flash is taken by. Reads sums, no rows of sequences."""
        with self._lock:
            self._check_open()
            return [space_usage(self)]

    def sequence_counts(self) -> dict[str, int]:
        """How many sequences of each model there are. Reads sums, no rows of sequences."""
        with self._lock:
            self._check_open()
            counts = self._catalogue.row_totals.sequences()
            return {model.name: counts[model.id].num_rows for model in self.models()}

    def leftovers(self) -> list[Leftover]:
        """Sequences that were to go with processes (attribute user.kvfs.owner) which do not run here any more.

        Those that are certain to be nobody's go by themselves when the drive is opened.
        """
        with self._lock:
            self._check_open()
            return leftovers_of(self._catalogue)

    def delete_model(self, name: str) -> None:
        """Forget a model without sequences, with its caps. Durable after the next flush. Raises NoSuchModel,
        ModelInUse."""
        with self._lock:
            model = self.model(name)
            num_sequences = self._catalogue.row_totals.sequences()[model.id].num_rows
            if num_sequences:
                raise ModelInUse(name, num_sequences)
            self._catalogue.delete_model(model.id)
            del self._models[name]
            self._sealing.load_wanted()
            self._space.load()

    def sequence_rows(
        self, after: str = "", limit: int = 1000, *, model: str | None = None
    ) -> Iterator[SequenceRow]:
        """A page of catalogue_rows: those with names behind `after`, in order of names, at most `limit`, of one
        model if it is named. Raises InvalidArgument, NoSuchModel."""
        if not isinstance(after, str) or type(limit) is not int or not 1 <= limit <= MOST_ROWS:
            raise InvalidArgument(f"a page is of 1 to {MOST_ROWS} rows behind a name, not {limit!r}, {after!r}")
        with self._lock:
            self._check_open()
            model_id = None if model is None else self.model(model).id
            return self._catalogue.sequences(after, limit, model_id)


def checked_quota(model: str, tenant: str, capacity_bytes: int, low_percent: int, policy: str) -> Quota:
    """Raises InvalidArgument."""
    is_size = isinstance(capacity_bytes, int) and not isinstance(capacity_bytes, bool)
    if not is_size or not 0 < capacity_bytes < 1 << 62:
        raise InvalidArgument(f"a cap is a number of bytes above zero, not {capacity_bytes!r}")
    if not isinstance(low_percent, int) or not 1 <= low_percent <= 100:
        raise InvalidArgument(f"low_percent is 1 to 100, not {low_percent!r}")
    if policy not in POLICIES:
        raise InvalidArgument(f"a policy is one of {', '.join(POLICIES)}, not {policy!r}")
    check_tenant(tenant)
    return Quota(model, tenant, capacity_bytes, low_percent, policy)
