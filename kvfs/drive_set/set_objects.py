"""Caches of objects over the drives of a set.

An object lies whole on one drive: the first, of those that take new ones, in an order of drives that its key
gives (rendezvous hashing), so a drive that comes or goes changes the place of few. It is looked for on every
drive: all have their keys in memory. A cache's cap is for all drives together, and each has an equal share.

Keys name content, so two drives that have a key have the same object, unless one was away when the object was
deleted. Every deletion is therefore noted until the drive has it durably. A drive that comes back gets what it
has missed before it is asked for anything; where a process has ended meanwhile all its objects go, which the
others remember (Membership.behind).
"""

import json
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from kvfs.drive_set.member import Member
from kvfs.drive_set.missed_deletions import EVERYTHING, Deletion, MissedDeletions
from kvfs.drive_set.set_object_cache import SetObjectCache
from kvfs.drive_set.spreading import ranked
from kvfs.errors import DriveLost
from kvfs.objects.counters import RequestCounters, sums
from kvfs.objects.identity import identity_text
from kvfs.objects.object_cache import ObjectCache, check_cache_name, check_capacity
from kvfs.objects.object_catalogue import CacheUsage
from kvfs.space.admission import check_admission
from kvfs.store import Store
from kvfs.tenant_counters import ByTenant

log = logging.getLogger(__name__)


class SetObjects:
    """Of a DriveSet, which is given.

    Locks, outermost first: the set's, `lock`, which is held for moments, those of the drives' stores.
    """

    def __init__(self, drive_set):
        self._set = drive_set
        self.lock = threading.RLock()
        self.missed = MissedDeletions()
        self._known: set[tuple[str, str]] = set()  # (cache, identity) whose doubles have been looked for
        self._misses: Counter[str] = Counter()  # of what lost drives may have, by cache
        self._requests: defaultdict[str, ByTenant[RequestCounters]] = defaultdict(
            lambda: ByTenant(RequestCounters)
        )
        self._unknown = set(drive_set.membership.behind)  # drives that missed what an earlier process deleted

    # drives

    def members(self) -> list[Member]:
        """Those that can be used, in the set's order."""
        return [member for member in list(self._set._members.values()) if member.lost is None]

    def takers(self) -> list[Member]:
        """Those that get new objects."""
        return [m for m in self.members() if m.drive_id not in self._set.membership.leaving]

    def may_be_lost(self, key: bytes) -> bool:
        """Whether the drive that would have a key cannot be asked."""
        membership = self._set.membership
        staying = [drive_id for drive_id in membership.drives if drive_id not in membership.leaving]
        return bool(staying) and self._set._members[ranked(key, staying)[0]].lost is not None

    def count_lost(self, cache: str, num_misses: int) -> None:
        with self.lock:
            self._misses[cache] += num_misses

    def count_request(self, cache: str, tenant: str, model: str, wanted: int, found: int, miss) -> None:
        with self.lock:
            self._requests[cache].of(tenant, model).count(wanted, found, miss)

    def share(self) -> None:
        """Each drive has an equal share of every cap."""
        for member in self.members():
            member.store._objects.share(len(self._set.membership.drives))

    # opening

    def take_up(self) -> None:
        """What is on the drives of a set that was opened: those that are behind have no objects any more."""
        self.share()
        behind = [member for member in self.members() if member.drive_id in self._unknown]
        for member in behind:
            self._forget_all(member.store)
            self._take_caps(member.store, [m for m in self.members() if m.drive_id not in self._unknown])
            member.store._sync_if_needed()
        self.caught_up([member.drive_id for member in behind])

    def _forget_all(self, store: Store) -> None:
        num_objects = store.drop_objects()
        if num_objects:
            log.warning("%s was away when objects were deleted: its %d objects go", store.path, num_objects)

    def _take_caps(self, store: Store, others: Sequence[Member]) -> None:
        """A drive has the caches and caps of the first of the others that knows them."""
        rows: dict[str, int | None] = {}
        for member in others:
            with member.in_use("caps of objects") as other, other._lock:
                for row in other._catalogue.objects.caches():
                    rows.setdefault(row.name, row.capacity_bytes)
        for name, capacity_bytes in rows.items():
            store.object_cache(name).set_capacity(capacity_bytes)

    def add(self, member: Member) -> None:
        """A drive is new in the set."""
        self._take_caps(member.store, [other for other in self.members() if other is not member])

    def caught_up(self, drive_ids: Iterable[str]) -> None:
        """These have nothing any more that was deleted. Called with the set's lock."""
        membership = self._set.membership
        behind = tuple(drive_id for drive_id in membership.behind if drive_id not in drive_ids)
        self._unknown.difference_update(drive_ids)
        if behind != membership.behind:
            self._set.drives._write(self._set.drives._next(behind=behind))

    def open(self, cache: SetObjectCache, capacity_bytes: int | None) -> None:
        """On all drives, with one cap. Called with the set's lock."""
        with self.lock:
            known = self._caps(cache.name, self.members())
            for member in self.members():
                cache.on(member)
            if (cache.name, cache.identity) not in self._known:
                self._resolve_doubles(cache)
                self._known.add((cache.name, cache.identity))
        capacity = capacity_bytes or (known[0] if known else None)
        if cache.capacities() != {capacity}:
            cache.set_capacity(capacity)

    def _caps(self, name: str, members: Sequence[Member]) -> list[int | None]:
        """Of a cache, as the drives that know it have it."""
        found = []
        for member in members:
            with member.in_use("caps of objects") as store, store._lock:
                row = store._catalogue.objects.cache(name)
            if row is not None:
                found.append(row.capacity_bytes)
        return found

    def _resolve_doubles(self, cache: SetObjectCache) -> None:
        """What two drives have, one keeps. Of two sizes nobody knows which came later."""
        of_key: dict[bytes, ObjectCache] = {}
        for part in [cache.on(member) for member in self.members()]:
            keys = [*part.keys()]
            for key, size in zip(keys, part.sizes(keys), strict=True):
                other = of_key.setdefault(key, part)
                if other is not part:
                    part.delete([key])
                    if other.sizes([key]) != [size]:
                        other.delete([key])

    # deletions

    def noted(self, member: Member) -> list[Deletion]:
        """What a flush of the drive that begins now makes durable there."""
        with self.lock:
            return self.missed.of(member.drive_id)

    def settled(self, member: Member, noted: Sequence[Deletion]) -> None:
        with self.lock:
            self.missed.settled(member.drive_id, noted)

    def make_durable(self, member: Member) -> None:
        """What a drive has of objects and caps. Raises DriveLost."""
        noted = self.noted(member)
        with member.in_use("objects") as store, store._lock:
            store._sync_if_needed()
        self.settled(member, noted)

    def claim(self, cache: SetObjectCache, targets: Sequence[tuple[bytes, str]]) -> None:
        """Before keys get new objects, on these drives: that they were deleted elsewhere is durable."""
        with self.lock:
            behind = self.missed.with_any(cache.name, cache.identity, targets)
        for member in [self._set._members[drive_id] for drive_id in behind if drive_id in self._set._members]:
            try:
                self.make_durable(member)
            except DriveLost:
                if member.drive_id not in self._set.membership.behind:
                    self.mark_behind()

    def mark_behind(self, all_lost: bool = False) -> None:
        """That lost drives have missed something the others know durably.

        all_lost: something that is no deletion
        """
        with self._set._lock, self.lock:
            known = self._set.membership.behind
            new = tuple(
                member.drive_id
                for member in self._set._members.values()
                if member.lost is not None
                and member.drive_id not in known
                and (all_lost or self.missed.of(member.drive_id))
            )
            if new:
                self._set.drives._write(self._set.drives._next(behind=(*known, *new)))

    def rejoin(self, member: Member, store: Store) -> None:
        """A drive comes back: before it is asked for anything it forgets what was deleted, and what another has
        now. Called with the set's lock and `lock`."""
        missed = self.missed.of(member.drive_id)
        store._objects.share(len(self._set.membership.drives))
        if member.drive_id in self._unknown or EVERYTHING in missed:
            self._forget_all(store)
        for deletion in missed:
            if deletion.key is not None:
                store.object_cache(deletion.cache, json.loads(deletion.identity)).delete([deletion.key])
            elif deletion.cache is not None:
                store.drop_objects(deletion.cache)
        others = self.members()
        for name, identity in sorted(self._known):
            facts = json.loads(identity)
            part = store.object_cache(name, facts)
            for other in others:
                part.delete([*({*part.keys()} & {*other.store.object_cache(name, facts).keys()})])
        self._take_caps(store, others)
        with store._lock:
            store._sync_if_needed()
        self.missed.settled(member.drive_id, missed)

    def drop(self, name: str | None) -> int:
        """See Store.drop_objects. Called with the set's lock."""
        with self.lock:
            num_objects = 0
            for member in list(self._set._members.values()):
                try:
                    with member.in_use("objects") as store:
                        num_objects += store.drop_objects(name)
                except DriveLost:
                    pass  # when it comes back
                self.missed.note(member.drive_id, Deletion(name))
            return num_objects

    # what can be seen

    def usage(self) -> list[CacheUsage]:
        """See Store.object_usage: of the drives that are there. Called with the set's lock."""
        found: dict[str, list] = {}
        for member in self.members():
            with member.in_use("objects") as store, store._lock:
                for usage in store.object_usage():
                    identities = set(store._catalogue.objects.identities(usage.name))
                    known = found.setdefault(usage.name, [usage.capacity_bytes, set(), 0, 0])
                    known[1] |= identities
                    known[2] += usage.objects
                    known[3] += usage.bytes
        return [
            CacheUsage(name, capacity, len(identities), *counts)
            for name, (capacity, identities, *counts) in sorted(found.items())
        ]

    def counters(self, of_drives: list[dict]) -> dict:
        """As Store.counters has them, of its drives' counters of objects."""
        rows: dict[str, dict] = {}
        for row in (row for counters in of_drives for row in counters["caches"]):
            known = rows.setdefault(row["cache"], dict.fromkeys(row, 0))
            for name, value in row.items():
                is_sum = name not in ("cache", "capacity_bytes")
                known[name] = known[name] + value if is_sum else value
        for name, row in rows.items():
            row["misses"] += self._misses[name]
            row["miss_drive_lost"] += self._misses[name]
        tenants = [
            {"cache": name, **row}
            for name, requests in sorted(self._requests.items())
            for row in requests.rows()
        ]
        return sums([rows[name] for name in sorted(rows)], tenants)

    def lost_misses(self, cache: str) -> int:
        return self._misses[cache]


class SetObjectStore:
    """A part of DriveSet; see ObjectStore."""

    _objects: SetObjects

    def object_cache(
        self,
        name: str,
        identity: Mapping[str, str | int | float | bool] | None = None,
        capacity_bytes: int | str | None = None,
        admission: str = "all",
    ) -> SetObjectCache:
        """See Store.object_cache. Each drive has an equal share of the cap, which an object has to fit into."""
        check_cache_name(name)
        text, capacity = identity_text(identity), check_capacity(capacity_bytes)
        with self._lock:
            self._check_open()
            cache = SetObjectCache(self, self._objects, name, text, check_admission(admission))
            self._objects.open(cache, capacity)
            return cache

    def object_usage(self) -> list[CacheUsage]:
        """See Store.object_usage."""
        with self._lock:
            self._check_open()
            return self._objects.usage()

    def drop_objects(self, name: str | None = None) -> int:
        """See Store.drop_objects."""
        with self._lock:
            self._check_open()
            return self._objects.drop(name)
