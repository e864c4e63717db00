"""Prefix reuse over the drives of a set.

Every drive finds, in its own catalogue, how many groups of a prompt it has for some of the KV heads; together
they have as many as the one that has fewest. Which heads a part's groups are of is said by its settings, so
that parts of other heads, which another layout has put on the same drive, are never found for these. Which
drives are asked is told by the layouts of the sequences that there are.

Parts found need not be of one sequence: whoever publishes says that model, settings and token ids tell all.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from kvfs.drive_set.member import Member
from kvfs.drive_set.part_record import Layout, PartPlace, PartRecord, new_uid
from kvfs.drive_set.part_settings import part_settings, whole_of
from kvfs.drive_set.set_sequence import SetSequence
from kvfs.errors import DriveLost
from kvfs.model import Model
from kvfs.prefix.counters import PrefixCounters
from kvfs.prefix.hashing import settings_text
from kvfs.prefix.index import LookUp, difference
from kvfs.prefix.match import Miss, PrefixMatch
from kvfs.prefix.prefix_catalogue import Usage
from kvfs.prefix.reuse import PrefixReuse
from kvfs.sequence_attributes import SET_PART, TENANT, check_attribute


class Found(NamedTuple):
    """A layout that has the most groups of a prompt: None where no drive has anything of the model.

    parts: what its drives have; miss: what is wrong with more of it; ends: places that have no more than that
    """

    num_groups: int
    layout: Layout | None
    parts: list[LookUp]
    miss: Miss | None
    num_dropped: int
    ends: list[PartPlace]


class SetPrefixes:
    """As PrefixIndex, of a DriveSet, which is given. Used under its lock."""

    def __init__(self, drive_set):
        self._set = drive_set
        self.counters = PrefixCounters()
        self._missed: dict[str, list[Callable[[Usage], bool]]] = {}  # what lost drives have not dropped

    def find(
        self, model: Model, tenant: str, settings: str, prompt: np.ndarray, verify: bool, sequences
    ) -> tuple[int, Miss | None]:
        """(groups found, why no more), counted."""
        group_tokens = model.geometry.group_tokens
        wanted = len(prompt) // group_tokens
        tokens = prompt[: wanted * group_tokens]
        while True:
            found = self._longest(model, tenant, settings, tokens, compare=verify, verify=verify)
            miss = found.miss if wanted else Miss.TOO_SHORT
            if found.num_groups == wanted or miss is not None:
                break
            try:
                miss = self._why(model, tenant, settings, prompt, found)
                break
            except DriveLost:
                continue  # found lost by it, and so no part of any answer
        counters = self.counters.of(tenant, model.name)
        counters.groups_dropped += found.num_dropped
        counters.count(wanted * group_tokens, found.num_groups * group_tokens, miss)
        return found.num_groups, miss

    def source(self, model: Model, tenant: str, settings: str, tokens: np.ndarray) -> Found:
        """What there is of these tokens, compared with those stored."""
        found = self._longest(model, tenant, settings, tokens, compare=True)
        self.counters.of(tenant, model.name).compared(found.miss, found.num_dropped)
        return found

    def _longest(self, model: Model, tenant: str, settings: str, tokens: np.ndarray, **how: bool) -> Found:
        """how: see PrefixIndex.look_up."""
        layouts = self._set._layouts_of(model)
        places = dict.fromkeys(place for layout in layouts for place in layout)
        parts = {place: self._look_up(place, model, tenant, settings, tokens, how) for place in places}
        found = {place: part for place, part in parts.items() if part is not None}
        whole = [layout for layout in layouts if all(place in found for place in layout)]
        leaving = self._set.membership.leaving

        def worth(layout: Layout) -> tuple[int, bool]:
            is_staying = not any(place.drive_id in leaving for place in layout)
            return min(found[place].num_groups for place in layout), is_staying

        best = max(whole, key=worth, default=None)
        num_groups = worth(best)[0] if best else 0
        ends = [place for place in found if found[place].num_groups == num_groups]
        miss = next((found[place].miss for place in best or () if place in ends and found[place].miss), None)
        if miss is None and any(_may_have_more(layout, parts, num_groups) for layout in layouts):
            miss = Miss.DRIVE_LOST if num_groups < len(tokens) // model.geometry.group_tokens else None
        num_dropped = sum(part.num_dropped for part in found.values())
        return Found(num_groups, best, [found[place] for place in best or ()], miss, num_dropped, ends)

    def _look_up(
        self, place: PartPlace, model: Model, tenant: str, settings: str, tokens: np.ndarray, how: dict
    ) -> LookUp | None:
        """What a drive has of some heads; None if it is lost."""
        member = self._set._member(place)
        if member.lost is not None:
            return None
        try:
            with member.in_use("stored prefixes") as store, store._lock:
                part_model = self._set._part_model(member, model, place)
                return store._prefixes.look_up(
                    part_model, tenant, part_settings(place, settings), tokens, **how
                )
        except DriveLost:
            return None

    def _why(self, model: Model, tenant: str, settings: str, prompt: np.ndarray, found: Found) -> Miss:
        """As PrefixIndex has it."""
        for place in found.ends:
            member = self._set._member(place)
            with member.in_use("stored prefixes") as store, store._lock:
                asked = self._set._part_model(member, model, place), tenant, part_settings(place, settings)
                if store._prefixes.is_on_its_way(*asked, prompt, found.num_groups, store._sequences):
                    return Miss.NOT_ON_FLASH
        if found.num_groups:
            return Miss.UNKNOWN
        for member in self._set._live:
            with member.in_use("stored prefixes") as store, store._lock:
                for scope in store._prefixes.others(tenant, prompt):
                    other = whole_of(scope.model, scope.settings)
                    if (other.model, other.settings) != (model.name, settings):
                        geometry = self._set._models[other.model].geometry
                        return difference(model.name, model.geometry, other.model, geometry)
        return Miss.UNKNOWN

    def uids_of(self, found: Found) -> set[int]:
        """The sequences that parts are of."""
        uids = set()
        for place, part in zip(found.layout, found.parts, strict=True):
            with self._set._member(place).in_use("stored prefixes") as store, store._lock:
                record = store._catalogue.attributes(part.sequence_id)[SET_PART]
            uids.add(PartRecord.decode(record).uid)
        return uids

    # what administrators see

    def usage(self) -> list[Usage]:
        """See Store.prefix_usage: of the drives that are there. A sequence has one part with head 0."""
        sums: dict[tuple[str, str, str], list[int]] = {}
        for member in self._set._live:
            with member.in_use("stored prefixes") as store, store._lock:
                for part in store._prefixes.usage():
                    whole = whole_of(part.model, part.settings)
                    if whole.first_head == 0:
                        counts = sums.setdefault((part.tenant, whole.model, whole.settings), [0, 0])
                        counts[0] += part.num_groups
                        counts[1] += part.num_sequences
        return [Usage(number, *key, *counts) for number, (key, counts) in enumerate(sorted(sums.items()))]

    def drop(self, is_chosen: Callable[[Usage], bool]) -> int:
        """As PrefixIndex.drop, durable. A lost drive drops them when it comes back to this process."""
        num_groups = sum(usage.num_groups for usage in self.usage() if is_chosen(usage))
        for member in list(self._set._members.values()):
            try:
                with member.in_use("stored prefixes") as store:
                    self._drop_on(store, is_chosen)
            except DriveLost:
                self._missed.setdefault(member.drive_id, []).append(is_chosen)
        return num_groups

    def _drop_on(self, store, is_chosen: Callable[[Usage], bool]) -> None:
        def is_part_of_chosen(part: Usage) -> bool:
            model, _, settings = whole_of(part.model, part.settings)
            whole = Usage(0, part.tenant, model, settings, part.num_groups, part.num_sequences)
            return is_chosen(whole)

        with store._lock:
            store._prefixes.drop(is_part_of_chosen)
            store._sync_if_needed()

    def catch_up(self, member: Member) -> None:
        """A drive has come back."""
        with member.in_use("stored prefixes") as store:
            for is_chosen in self._missed.pop(member.drive_id, ()):
                self._drop_on(store, is_chosen)


def _may_have_more(layout: Layout, parts: Mapping[PartPlace, LookUp | None], num_groups: int) -> bool:
    """Whether a layout with lost drives may have more of a prompt than that, as far as the others tell."""
    there = [part.num_groups for place in layout if (part := parts[place]) is not None]
    return len(there) < len(layout) and min(there, default=math.inf) > num_groups


class SetPrefixReuse(PrefixReuse):
    """A part of DriveSet."""

    _prefixes: SetPrefixes

    def _restore_prefix(self, match: PrefixMatch, name: str, attributes: Mapping[str, bytes]) -> SetSequence:
        """As restore_prefix, with these attributes and no others."""
        for attribute, value in attributes.items():
            check_attribute(attribute, value)
        with self._lock:
            self._check_open()
            self._check_own(match.model)
            self._check_new_name(name)
            settings = settings_text(match.settings)
            while True:
                found = self._prefixes.source(match.model, match.tenant, settings, match.token_ids)
                if not found.num_groups:
                    return self.create_sequence(match.model, name, attributes)
                try:
                    return self._begin_with_parts(match.model, name, attributes, found)
                except DriveLost:
                    continue  # found lost by it: what there is without that drive

    def _begin_with_parts(
        self, model: Model, name: str, attributes: Mapping[str, bytes], found: Found
    ) -> SetSequence:
        record = PartRecord(new_uid(), name, model.name, 0, 0, found.layout)
        tenant = attributes.get(TENANT, b"").decode()
        num_tokens = found.num_groups * model.group_tokens
        self._space.reserve_new(model, found.layout, tenant, num_tokens, self._prefixes.uids_of(found))

        def restore(index: int, part_record: PartRecord):
            noted = {SET_PART: part_record.encode(), **(attributes if index == 0 else {})}
            place = found.layout[index]
            member, source_id = self._member(place), found.parts[index].sequence_id
            with member.store._lock:
                part_model = self._part_model(member, model, place)
                begin_with = member.store._begin_with
                return begin_with(part_model, part_record.member_name, noted, source_id, found.num_groups)

        return self._make(model, record, restore)
