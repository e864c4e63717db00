"""A cache of objects of a set of drives as its user has it: calls cut into what each drive does."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING

from kvfs.drive_set.member import Member
from kvfs.drive_set.missed_deletions import Deletion
from kvfs.drive_set.spreading import ranked
from kvfs.errors import DriveLost, InvalidArgument, StoreClosed
from kvfs.objects.counters import Miss, RequestMiss
from kvfs.objects.object_cache import (
    ObjectCache,
    Usage,
    check_capacity,
    check_keys,
    check_request,
    distinct,
)
from kvfs.objects.object_data import byte_array
from kvfs.telemetry.requests import request

if TYPE_CHECKING:
    from kvfs.drive_set.drive_set import DriveSet
    from kvfs.drive_set.set_objects import SetObjects


class SetObjectCache:
    """As kvfs.ObjectCache. Made by DriveSet.object_cache; valid until the set closes."""

    def __init__(self, drive_set: "DriveSet", objects: "SetObjects", name: str, identity: str, admission: str):
        """identity: JSON"""
        self._set = drive_set
        self._objects = objects
        self._name = name
        self.identity = identity
        self.admission = admission
        self._parts: dict[str, ObjectCache] = {}  # by drive

    def __repr__(self) -> str:
        return f"<SetObjectCache {self.name!r}>"

    @property
    def name(self) -> str:
        return self._name

    # drives

    def on(self, member: Member) -> ObjectCache:
        """A drive's part; another one when it has been away. Raises DriveLost."""
        with self._objects.lock:
            part, store = self._parts.get(member.drive_id), member.store
            if part is None or part._store is not store:
                with member.in_use(f"objects of cache {self.name!r}"):
                    facts = json.loads(self.identity)
                    part = store.object_cache(self.name, facts, admission=self.admission)
                self._parts[member.drive_id] = part
            return part

    def _there(self) -> dict[Member, ObjectCache]:
        """The parts that can be used."""
        self._set._check_open()
        parts = {}
        for member in self._objects.members():
            try:
                parts[member] = self.on(member)
            except DriveLost:
                continue  # found lost by it
        return parts

    def _call(self, member: Member, job: Callable[[ObjectCache], list]) -> list:
        """Raises DriveLost, of a drive that has left the set too; StoreClosed."""
        with member.in_use(f"objects of cache {self.name!r}"):
            try:
                return job(self.on(member))
            except StoreClosed:
                if not self._set._closed and self._set._members.get(member.drive_id) is member:
                    raise
        self._set._check_open()
        raise DriveLost(member.location, f"objects of cache {self.name!r}", "it has left the set")

    # objects

    @request("put_objects", of="_set")
    def put(self, keys: Sequence[bytes], objects: Sequence) -> list[bool]:
        """See ObjectCache.put: a batch of writes for each drive. What is for one that is lost others store."""
        return self._put(keys, objects, may_change=False)

    def _put(self, keys: Sequence[bytes], objects: Sequence, may_change: bool) -> list[bool]:
        arrays = distinct(keys, objects)
        stored: dict[bytes, bool] = {}
        while len(stored) < len(arrays):
            batches: dict[Member, list[bytes]] = {}
            left = {key: data.nbytes for key, data in arrays.items() if key not in stored}
            for key, member in self._targets(left).items():
                batches.setdefault(member, []).append(key)
            if not batches:
                break  # no drive takes any

            def put(member: Member, batch: list[bytes]) -> dict[bytes, bool]:
                data = [arrays[key] for key in batch]
                try:
                    done = self._call(member, lambda part: part._put(batch, data, may_change))
                    return dict(zip(batch, done, strict=True))
                except DriveLost:
                    return {}

            jobs = [lambda each=each, put=put: put(*each) for each in batches.items()]
            for done in self._set._at_once(jobs):
                stored.update(done)
        return [stored.get(key, False) for key in keys]

    def _targets(self, sizes: dict[bytes, int]) -> dict[bytes, Member]:
        """Which drive each object goes to: the one that has it, in any size, else the first by its key.

        So one that is replaced is so on its drive, in one transaction. What others have of another size is gone
        for good when this returns.
        """
        keys, targets = [*sizes], {}
        with self._objects.lock:
            parts = self._there()
            takers = {m.drive_id: m for m in self._objects.takers() if m in parts}
            found = {member: part.sizes(keys) for member, part in parts.items()}
            for position, key in enumerate(keys if takers else ()):
                exact = [member for member in parts if found[member][position] == sizes[key]]
                having = [member for member in parts if found[member][position] is not None]
                targets[key] = (exact or having or [takers[ranked(key, takers)[0]]])[0]
                for member, part in parts.items():
                    if member is not targets[key] and found[member][position] not in (None, sizes[key]):
                        part.delete([key])
                        self._note_deleted(member.drive_id, key)
        self._objects.claim(self, [(key, member.drive_id) for key, member in targets.items()])
        return targets

    @request("get_objects", of="_set")
    def get(self, keys: Sequence[bytes], buffers: Sequence) -> list[bool]:
        """See ObjectCache.get: one batch of reads for each drive. What is on a lost drive is a miss."""
        check_keys(keys, buffers)
        arrays = [byte_array(buffer, writable=True) for buffer in buffers]
        batches: dict[Member, list[int]] = {}
        num_lost = 0
        for position, member in enumerate(self._holders(keys, [data.nbytes for data in arrays])):
            if member is None:
                num_lost += 1
            else:
                batches.setdefault(member, []).append(position)

        def get(member: Member, positions: list[int]) -> list[bool] | None:
            wanted = [keys[p] for p in positions], [arrays[p] for p in positions]
            try:
                return self._call(member, lambda part: part.get(*wanted))
            except DriveLost:
                return None

        found = [False] * len(keys)
        answers = self._set._at_once([lambda each=each: get(*each) for each in batches.items()])
        for positions, answer in zip(batches.values(), answers, strict=True):
            num_lost += len(positions) if answer is None else 0
            for position, is_hit in zip(positions, answer or (), strict=answer is not None):
                found[position] = is_hit
        if num_lost:
            self._objects.count_lost(self.name, num_lost)
        return found

    def _holders(self, keys: Sequence[bytes], sizes: Sequence[int]) -> list[Member | None]:
        """Which drive to read each object from, or to say why it is not there; None for a lost one."""
        parts = self._there()
        found = {member: part.sizes(keys) for member, part in parts.items()}
        chosen = []
        for position, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            having = [member for member in parts if found[member][position] is not None]
            exact = [member for member in having if found[member][position] == size]
            if not having:
                having = [member for member, part in parts.items() if part._is_of_other(key)]
            if not having and not self._objects.may_be_lost(key):
                having = [*parts]
            chosen.append((exact or having or [None])[0])
        return chosen

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See ObjectCache.contains."""
        return [size is not None for size in self.sizes(keys)]

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """See ObjectCache.sizes."""
        check_keys(keys)
        found = [part.sizes(keys) for part in self._there().values()]
        return [next((part[i] for part in found if part[i] is not None), None) for i in range(len(keys))]

    def look_up(self, keys: Sequence[bytes]) -> list[Miss | None]:
        """See ObjectCache.look_up. Each miss is counted once."""
        parts = self._there()
        missing = [size is None for size in self.sizes(keys)]
        return [self._miss(parts, key) if is_miss else None for key, is_miss in zip(keys, missing, strict=True)]

    def _miss(self, parts: dict[Member, ObjectCache], key: bytes) -> Miss | None:
        """Count that no drive has an object; None: one has it by now."""
        others = [part for part in parts.values() if part._is_of_other(key)]
        if not others and (not parts or self._objects.may_be_lost(key)):
            self._objects.count_lost(self.name, 1)
            return Miss.DRIVE_LOST
        return (others or [*parts.values()])[0].look_up([key])[0]

    def pin(self, keys: Sequence[bytes]) -> list[bool]:
        """See ObjectCache.pin. A pin ends when the drive is lost."""
        check_keys(keys)
        parts = self._there()
        pinned = []
        for key in keys:
            part = next((part for part in parts.values() if part.contains([key])[0]), None)
            if part is None:
                self._miss(parts, key)
            pinned.append(part is not None and part.pin([key])[0])
        return pinned

    def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        """See ObjectCache.unpin."""
        check_keys(keys)
        parts = self._there().values()
        return [any(part.unpin([key])[0] for part in parts) for key in keys]

    def delete(self, keys: Sequence[bytes]) -> int:
        """See ObjectCache.delete. What is on a lost drive goes before that is used again."""
        check_keys(keys)
        keys = [*dict.fromkeys(keys)]
        deleted = set()
        with self._objects.lock:
            parts = self._there()
            for member, part in parts.items():
                here = [key for key, size in zip(keys, part.sizes(keys), strict=True) if size is not None]
                part.delete(here)
                deleted.update(here)
                for key in here:
                    self._note_deleted(member.drive_id, key)
            for member in list(self._set._members.values()):
                if member not in parts:
                    for key in keys:
                        self._note_deleted(member.drive_id, key)
        return len(deleted)

    def _note_deleted(self, drive_id: str, key: bytes) -> None:
        self._objects.missed.note(drive_id, Deletion(self.name, self.identity, key))

    def keys(self) -> Iterator[bytes]:
        """See ObjectCache.keys."""
        return iter(dict.fromkeys(chain.from_iterable(part.keys() for part in self._there().values())))

    def usage(self) -> Usage:
        """See ObjectCache.usage: of the drives that are there."""
        found = [part.usage() for part in self._there().values()]
        misses = {str(why): sum(usage.misses[why] for usage in found) for why in Miss}
        misses[Miss.DRIVE_LOST] += self._objects.lost_misses(self.name)
        return Usage(
            sum(usage.objects for usage in found),
            sum(usage.bytes for usage in found),
            found[0].capacity if found else None,
            sum(usage.hits for usage in found),
            misses,
            sum(usage.evictions for usage in found),
        )

    def count_request(self, tenant: str, model: str, wanted: int, found: int, miss: RequestMiss | None) -> None:
        """See ObjectCache.count_request."""
        check_request(tenant, model, wanted, found, miss)
        self._set._check_open()
        self._objects.count_request(self.name, tenant, model, wanted, found, miss and RequestMiss(miss))

    def capacities(self) -> set[int | None]:
        """What the drives take for the cap."""
        return {part.usage().capacity for part in self._there().values()}

    def set_capacity(self, capacity_bytes: int | str | None) -> None:
        """See ObjectCache.set_capacity: for all drives together."""
        capacity = check_capacity(capacity_bytes)
        with self._set._lock:
            self._set._check_open()
            before = {member: part.usage().capacity for member, part in self._there().items()}
            try:
                for member in before:
                    self._call(member, lambda part: [part.set_capacity(capacity)])
            except InvalidArgument:
                for member, known in before.items():
                    self._call(member, lambda part, known=known: [part.set_capacity(known)])
                raise
            for member in before:  # or a crash could leave objects on one drive that another's cap evicts
                with suppress(DriveLost):
                    self._objects.make_durable(member)
            self._objects.mark_behind(all_lost=True)
