"""Caps of a set of drives: a sequence is charged what its parts have on all drives together.

A drive never evicts a part by itself: its own caps are out of force while it is one of a set. What a set's
caps are is said by the set's record, which every drive has. Charges are in memory, as the places of all
sequences are; the order of use goes to the drive of each first part, into the tables that a drive alone has.

A part on a lost drive stays charged as it was known, or as its tokens need where it was never seen. What has
such a part is not evicted: its blocks would not be free. When a drive comes back, what is above a cap goes
before anything else happens.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvfs.layout import GroupLayout
from kvfs.model import Model
from kvfs.sequence_attributes import IMPORTING, PINNED, TENANT, TTL
from kvfs.space.background_policy import OFF, Background
from kvfs.space.caps import MOST_USES, Caps, Fullness
from kvfs.space.space import blocks_of, charged_lbas
from kvfs.space.space_catalogue import Account, Candidate, Quota

if TYPE_CHECKING:
    from kvfs.drive_set.drive_set import DriveSet
    from kvfs.drive_set.member import Member
    from kvfs.drive_set.part_record import Layout, PartRecord
    from kvfs.drive_set.set_sequence import SetSequence

log = logging.getLogger(__name__)
NS = 1_000_000_000
NOTED_USES = 4096  # in memory; then they become rows


@dataclass
class SetCharge:
    """Of one sequence. num_tokens: roughly; ttl_s: None: for ever."""

    name: str
    account: Account
    lbas: int
    num_tokens: int
    last_use_ns: int
    num_uses: int = 0
    is_kept: bool = False
    ttl_s: int | None = None


class SetCaps(Caps):
    """Of a DriveSet, which is given. Called with its lock. clock: time in ns."""

    def __init__(self, drive_set: "DriveSet", clock: Callable[[], int] = time.time_ns):
        self._set = drive_set
        self.clock = clock  # type: ignore[method-assign]
        self.quotas = []
        self.background = OFF
        self._evicted: list[set[str]] = []  # of each victim, since room was asked for, the drives it was on
        self._forget_all()

    def _forget_all(self) -> None:
        self.is_counting = False
        self._charges: dict[int, SetCharge] = {}  # by uid
        self._queues: defaultdict[Account, dict[int, None]] = defaultdict(dict)  # uids, used longest ago first
        self._noted: set[int] = set()  # uids whose last use is no row yet
        self.accounts = {}

    # caps

    def load(self) -> None:
        """What the set's record says, and what counts towards it; what is above a cap goes."""
        self._take(self._set.membership.quotas, self._set.membership.background)
        for quota in self.quotas:
            self.evict(quota, quota.capacity_bytes)

    def _take(self, quotas: Iterable[Quota], background: Background) -> None:
        self.quotas, self.background = list(quotas), background
        is_counting, known = bool(self.quotas) or background.is_on, self._charges
        self._forget_all()
        if is_counting:
            self._count(known)

    def set_quota(self, quota: Quota) -> None:
        """Evict what is above it, then set it: a power cut leaves no cap with more than that."""
        key = quota.model, quota.tenant
        quotas = [each for each in self.quotas if (each.model, each.tenant) != key] + [quota]
        quotas.sort(key=lambda each: (each.model, each.tenant))
        if not self.is_counting:
            self._forget_all()
            self._count({})
        self.evict(quota, quota.capacity_bytes)
        self._sync(self._set._members)
        self._write(tuple(quotas), self.background)

    def remove_quota(self, model: str, tenant: str) -> bool:
        quotas = tuple(each for each in self.quotas if (each.model, each.tenant) != (model, tenant))
        was_there = len(quotas) < len(self.quotas)
        if was_there:
            self._write(quotas, self.background)
        return was_there

    def set_background(self, background: Background) -> None:
        self._write(tuple(self.quotas), background)

    def _write(self, quotas: tuple[Quota, ...], background: Background) -> None:
        drives = self._set.drives
        drives._write(drives._next(quotas=quotas, background=background))
        self._take(quotas, background)

    # counting what there is

    def _count(self, known: dict[int, SetCharge]) -> None:
        """known: what was charged before: lost drives may tell nothing of it any more."""
        self.is_counting = True
        self.block_bytes = self._set._block_bytes
        stored = {member.drive_id: _stored(member) for member in self._set._live}
        charges = []
        for record in self._set._placed.values():
            charge = self._charge_of(record, stored)
            before = known.get(record.uid)
            if before is not None:
                charge.last_use_ns = max(charge.last_use_ns, before.last_use_ns)
                if record.parts[0].drive_id not in stored:  # whose it is, nobody else says
                    charge.account, charge.is_kept = before.account, before.is_kept
                    charge.ttl_s = before.ttl_s
            charges.append((record.uid, charge))
        for uid, charge in sorted(charges, key=lambda pair: (pair[1].last_use_ns, pair[0])):
            self._enter(uid, charge)

    def _charge_of(self, record: "PartRecord", stored: dict[str, "Stored"]) -> SetCharge:
        rows = []
        for index, place in enumerate(record.parts):
            of_drive = stored.get(place.drive_id)
            rows.append(of_drive and of_drive.rows.get(record.of(index).member_name))
        there = [row for row in rows if row is not None]
        num_tokens = min((row.num_tokens for row in there), default=0)
        model = self._set._models[record.model]
        lbas = 0
        for row, place in zip(rows, record.parts, strict=True):
            layout = self._layout(model, place.stop_head - place.first_head)
            if row is None:
                lbas += blocks_of(layout, num_tokens // model.group_tokens, [num_tokens])
            else:
                lbas += -(-row.num_spilled // model.group_tokens) * layout.group_lbas + row.tail_lbas
        open_one = self._set._sequences.get(record.name)
        if open_one is not None and None not in open_one._parts:
            lbas = max(lbas, _lbas_now(open_one))  # what was cut off is on flash until that is stored
        last_use = max((row.changed_ns for row in there), default=0)
        charge = SetCharge(record.name, (model.id, ""), lbas, num_tokens, last_use)
        if rows[0] is not None:
            first = stored[record.parts[0].drive_id]
            _take_attributes(charge, {name: values.get(rows[0].id) for name, values in first.values.items()})
            used_ns, charge.num_uses = first.uses.get(rows[0].id, (0, 0))
            charge.last_use_ns = max(charge.last_use_ns, used_ns)
        return charge

    def _layout(self, model: Model, num_heads: int) -> GroupLayout:
        heads = {"num_kv_heads": num_heads, "num_query_heads": num_heads * model.geometry.gqa_group_size}
        return GroupLayout(replace(model.geometry, **heads), self.block_bytes)

    def _enter(self, uid: int, charge: SetCharge) -> None:
        self._charges[uid] = charge
        self._queues[charge.account][uid] = None
        self._add(charge.account, charge.lbas)

    def _leave(self, uid: int) -> SetCharge | None:
        charge = self._charges.pop(uid, None)
        if charge is not None:
            del self._queues[charge.account][uid]
            self._add(charge.account, -charge.lbas)
        return charge

    # charging

    def reserve(self, sequence: "SetSequence", layer: int, num_tokens: int) -> None:
        """Charge a sequence that is to have so many more tokens in a layer. Raises QuotaExceeded, with nothing
        evicted and nothing charged."""
        if not self.is_counting:
            return
        wanted = 0
        for part in sequence._parts:
            counts = [part.layer_tokens(each) for each in range(part._geometry.num_layers)]
            counts[layer] += num_tokens
            num_groups = max(len(part._groups), part._groups_of(counts[layer]))
            wanted += blocks_of(part._layout, num_groups, counts, part._row.tail_lbas)
        self._reserve(sequence, wanted + _copy_lbas(sequence))

    def reserve_cut(self, sequence: "SetSequence", num_tokens: int) -> None:
        """The record of what is left of a group may be larger than the group, of quantized models."""
        if self.is_counting:
            num_groups = num_tokens // sequence.model.group_tokens
            wanted = sum(
                blocks_of(part._layout, num_groups, [num_tokens], part._row.tail_lbas)
                for part in sequence._parts
            )
            self._reserve(sequence, wanted + _copy_lbas(sequence))

    def reserve_copy(self, sequence: "SetSequence", copy, layer_tokens: Sequence[int]) -> None:
        """A part is copied to another drive, as far as so many tokens of each layer: it is there twice."""
        if self.is_counting:
            num_groups = max(copy._groups_of(count) for count in layer_tokens)
            parts = sum(map(charged_lbas, sequence._parts))
            self._reserve(sequence, parts + blocks_of(copy._layout, num_groups, list(layer_tokens)))

    def _reserve(self, sequence: "SetSequence", lbas: int) -> None:
        charge = self._charges[sequence.id]
        more = lbas - charge.lbas
        if more > 0:
            drives = {place.drive_id for place in sequence._record.parts}
            self._make_room_on(drives, charge.account, more, {sequence.id})
            charge.lbas = lbas
            self._add(charge.account, more)

    def reserve_new(
        self, model: Model, layout: "Layout", tenant: str, num_tokens: int, parents: set[int]
    ) -> None:
        """Make room for a sequence that begins with tokens of others. Raises QuotaExceeded."""
        if self.is_counting:
            lbas = 0
            for place in layout:
                part = self._layout(model, place.stop_head - place.first_head)
                lbas += blocks_of(part, num_tokens // model.group_tokens, [num_tokens])
            self._make_room_on({place.drive_id for place in layout}, (model.id, tenant), lbas, parents)

    def reserve_move(self, sequence: "SetSequence", tenant: str) -> None:
        """Make room where a sequence is to become another tenant's. Raises QuotaExceeded."""
        if self.is_counting:
            charge = self._charges[sequence.id]
            account = charge.account[0], tenant
            drives = {sequence._record.parts[0].drive_id}
            self._make_room_on(drives, account, charge.lbas, {sequence.id}, leaving=charge.account)

    def _make_room_on(self, drives: set[str], *arguments, **options) -> None:
        """drives: where the blocks are wanted. A victim without a part there is durably gone before: else a
        power cut could bring it back beside what has taken its room."""
        self._evicted.clear()
        self.make_room(*arguments, **options)
        self._sync(set().union(*(places for places in self._evicted if not places & drives)))

    def _sync(self, drive_ids: Iterable[str]) -> None:
        for member in self._set._live:
            if member.drive_id in drive_ids:
                with member.in_use("sequences that were evicted") as store, store._lock:
                    store._sync_if_needed()

    def settle(self, sequence: "SetSequence") -> None:
        """Charge a sequence what it has now: it has come, or all its parts are stored."""
        charge = self._charges.get(sequence.id)
        if charge is not None and None not in sequence._parts:
            lbas = _lbas_now(sequence)
            self._add(charge.account, lbas - charge.lbas)
            charge.lbas, charge.num_tokens = lbas, sequence.num_tokens

    def begin(self, sequence: "SetSequence") -> None:
        """A new sequence: all that it has is charged from now on."""
        if self.is_counting:
            account = sequence.model.id, ""
            self._enter(sequence.id, SetCharge(sequence.name, account, 0, 0, self.clock()))
            self.note_attributes(sequence)
            self.settle(sequence)

    def note_attributes(self, sequence: "SetSequence") -> None:
        """Whose a sequence is, and how long it is kept, may have changed."""
        charge = self._leave(sequence.id)
        if charge is not None:
            _take_attributes(charge, sequence._parts[0].attributes())
            self._enter(sequence.id, charge)

    def rename(self, uid: int, name: str) -> None:
        if uid in self._charges:
            self._charges[uid].name = name

    def forget(self, uid: int) -> None:
        """It is deleted."""
        self._leave(uid)
        self._noted.discard(uid)

    # recency

    def used(self, uid: int, is_new_use: bool = False) -> None:
        charge = self._charges.get(uid)
        if charge is None:
            return
        charge.last_use_ns = max(charge.last_use_ns, self.clock())
        charge.num_uses = min(charge.num_uses + is_new_use, MOST_USES)
        queue = self._queues[charge.account]
        queue[uid] = queue.pop(uid, None)
        self._noted.add(uid)
        if len(self._noted) >= NOTED_USES:
            self.store_uses()

    def store_uses(self) -> None:
        """Have the drives of first parts know the order of use; durable with their next flush."""
        by_drive: dict[str, list[tuple[int, int, str]]] = {}
        for uid in self._noted & self._charges.keys():
            charge = self._charges[uid]
            record = self._set._placed[charge.name]
            row = (charge.last_use_ns, charge.num_uses, record.member_name)
            by_drive.setdefault(record.parts[0].drive_id, []).append(row)
        self._noted.clear()
        for member in self._set._live:
            rows = by_drive.get(member.drive_id)
            if rows:
                with member.in_use("the order in which sequences were used") as store, store._lock:
                    store._catalogue.space.make()
                    store._catalogue.space.note_uses(rows)

    # what Caps asks for

    def _model_id(self, name: str) -> int | None:
        model = self._set._models.get(name)
        return model and model.id

    def _oldest(self, account: Account) -> Iterator[Candidate]:
        for uid in list(self._queues[account]):
            charge = self._charges[uid]
            if not charge.is_kept and self._is_there(charge):
                yield self._candidate(uid, charge)

    def _is_there(self, charge: SetCharge) -> bool:
        """Whether all drives with its parts can be used."""
        return all(self._set._member(place).lost is None for place in self._set._placed[charge.name].parts)

    def _candidate(self, uid: int, charge: SetCharge) -> Candidate:
        facts = charge.num_tokens, charge.last_use_ns, charge.num_uses
        return Candidate(uid, charge.name, charge.account[0], *facts, 0, charge.lbas)

    def _in_use(self) -> tuple:
        return ()  # an attention has the set's lock

    def _account_of(self, candidate: Candidate) -> Account:
        return self._charges[candidate.id].account

    def _lbas(self, candidate: Candidate) -> int:
        return self._charges[candidate.id].lbas

    def _reprieve(self, rows: Iterable[tuple[int, int, int]]) -> None:
        for when, num_uses, uid in rows:
            self.used(uid)
            self._charges[uid].last_use_ns, self._charges[uid].num_uses = when, num_uses

    def _expired(self, limit: int) -> list[Candidate]:
        now, found = self.clock(), []
        for uid, charge in self._charges.items():
            end_ns = None if charge.ttl_s is None else charge.last_use_ns + charge.ttl_s * NS
            if end_ns is not None and end_ns <= now and not charge.is_kept and self._is_there(charge):
                found.append((end_ns, uid))
        return [self._candidate(uid, self._charges[uid]) for _, uid in sorted(found)[:limit]]

    def _delete(self, victims: list[Candidate]) -> None:
        for victim in victims:
            log.info("sequence %s of %d tokens is evicted", victim.name, victim.num_tokens)
            self._evicted.append({place.drive_id for place in self._set._placed[victim.name].parts})
        self._set.delete_sequences(victim.name for victim in victims)

    def make_durable(self) -> None:
        self._sync(self._set._members)

    def fullness(self) -> list[Fullness]:
        found = []
        for member in self._set._live:
            if member.drive_id not in self._set.membership.leaving:
                with member.in_use("free space") as store, store._lock:
                    found += [replace(each, drive=member.location) for each in store._space.fullness()]
        return found

    def _is_on(self, candidate: Candidate, drive: str) -> bool:
        return any(
            self._set._member(place).location == drive for place in self._set._placed[candidate.name].parts
        )


@dataclass(frozen=True)
class Stored:
    """What a drive says of parts. rows: by name; values, uses: by the ids of the rows."""

    rows: dict
    values: dict[str, dict[int, bytes]]
    uses: dict[int, tuple[int, int]]


def _stored(member: "Member") -> Stored:
    with member.in_use("sequences") as store, store._lock:
        catalogue = store._catalogue
        values = {name: catalogue.values_of(name) for name in (TENANT, TTL, PINNED, IMPORTING)}
        uses = catalogue.space.uses() if catalogue.space.exists else ()
        rows = {row.name: row for row in catalogue.sequences()}
        return Stored(rows, values, {number: (when, count) for number, when, count in uses})


def _take_attributes(charge: SetCharge, attributes) -> None:
    """attributes: a first part's, by name."""
    charge.account = charge.account[0], (attributes.get(TENANT) or b"").decode()
    charge.is_kept = attributes.get(PINNED) == b"1" or attributes.get(IMPORTING) is not None
    ttl = attributes.get(TTL)
    charge.ttl_s = None if ttl is None else int(ttl)


def _copy_lbas(sequence: "SetSequence") -> int:
    """Of a part that is being moved: what its copy has."""
    return 0 if sequence._move is None else charged_lbas(sequence._move.copy)


def _lbas_now(sequence: "SetSequence") -> int:
    return sum(map(charged_lbas, sequence._parts)) + _copy_lbas(sequence)
