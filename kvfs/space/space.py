"""Caps that hold at every instant: who wants blocks is charged before it takes them.

A sequence is charged the groups it refers to and the tail record that its tokens may need; see DESIGN.md for
what counts to whom, and caps.py for who goes.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfs.layout import GroupLayout
from kvfs.model import Model
from kvfs.space.background_policy import OFF, Background
from kvfs.space.caps import MOST_USES, Caps, Fullness
from kvfs.space.space_catalogue import Account, Candidate, Quota, SpaceCatalogue

if TYPE_CHECKING:
    from kvfs.sequence import Sequence
    from kvfs.store import Store

log = logging.getLogger(__name__)

NOTED_USES = 4096  # in memory; then they become rows, in one transaction


@dataclass
class Charge:
    account: Account
    lbas: int


class Space(Caps):
    """Called with the store's lock. clock: time in ns."""

    def __init__(
        self,
        store: "Store",
        catalogue: SpaceCatalogue,
        is_part: bool = False,
        clock: Callable[[], int] = time.time_ns,
    ):
        """is_part: of a set of drives, which has the caps and evicts whole sequences only."""
        self._store = store
        self._catalogue = catalogue
        self._is_part = is_part
        self.clock = clock  # type: ignore[method-assign]
        self.block_bytes = store._namespace.block_bytes
        self._uses: dict[int, list[int]] = {}  # by sequence: when last, how often since it was a row
        self.load()

    def load(self) -> None:
        """Read caps, what is evicted without them, and what counts towards both."""
        self.quotas = [] if self._is_part else self._catalogue.quotas()
        self.background = OFF if self._is_part else self._catalogue.background()
        self._count(bool(self.quotas) or self.background.is_on)

    def _count(self, is_counting: bool) -> None:
        self.is_counting = is_counting
        self._charges: dict[int, Charge] = {}  # of sequences in memory
        self.accounts: dict[Account, int] = {}
        if not is_counting:
            return
        layouts = {model.id: model.layout for model in self._store._models.values()}
        for row in self._catalogue.accounts():
            if row.model_id in layouts:
                lbas = row.num_groups * layouts[row.model_id].group_lbas + row.tail_lbas
                self.accounts[row.model_id, row.tenant] = lbas
        for sequence in self._store._sequences.values():
            charge = self.charge_of(sequence)
            more = charged_lbas(sequence) - charge.lbas
            if more > 0:  # what was cut off is on flash until that is stored
                charge.lbas += more
                self._add(charge.account, more)

    def set_quota(self, quota: Quota) -> None:
        """Evict what is above it, then set it: a power cut leaves no cap with more than that."""
        self._catalogue.make()
        if not self.is_counting:
            self._count(True)
        self.evict(quota, quota.capacity_bytes)
        self._catalogue.set_quota(quota)
        self.load()

    def remove_quota(self, model: str, tenant: str) -> bool:
        """Whether there was one."""
        was_there = self._catalogue.remove_quota(model, tenant)
        self.load()
        return was_there

    def set_background(self, background: Background) -> None:
        self._catalogue.make()
        self._catalogue.set_background(background)
        self.load()

    # charging

    def charge_of(self, sequence: "Sequence") -> Charge:
        charge = self._charges.get(sequence.id)
        if charge is None:
            row, layout = sequence._row, sequence.model.layout
            num_groups = -(-row.num_spilled // layout.geometry.group_tokens)
            account = sequence.model.id, self._catalogue.tenant_of(sequence.id)
            charge = Charge(account, num_groups * layout.group_lbas + row.tail_lbas)
            self._charges[sequence.id] = charge
        return charge

    def reserve(self, sequence: "Sequence", num_groups: int, layer_tokens: list[int]) -> None:
        """Charge a sequence that is to have so many groups, and so many tokens in each layer.

        Raises QuotaExceeded with nothing evicted and nothing charged.
        """
        if self.is_counting:
            charge = self.charge_of(sequence)
            lbas = blocks_of(sequence.model.layout, num_groups, layer_tokens, sequence._row.tail_lbas)
            self._reserve(charge, lbas, sequence.id)

    def reserve_new(self, model: Model, tenant: str, num_tokens: int, parent_id: int) -> None:
        """Make room for a sequence that begins with tokens of another, which stays. It is charged when it is
        there. Raises QuotaExceeded."""
        if self.is_counting:
            lbas = blocks_of(model.layout, num_tokens // model.group_tokens, [num_tokens])
            self.make_room((model.id, tenant), lbas, {parent_id})

    def reserve_move(self, sequence: "Sequence", tenant: str) -> None:
        """Make room where a sequence is to become another tenant's. Raises QuotaExceeded."""
        if self.is_counting:
            charge = self.charge_of(sequence)
            self.make_room((sequence.model.id, tenant), charge.lbas, {sequence.id}, leaving=charge.account)

    def _reserve(self, charge: Charge, lbas: int, keep: int) -> None:
        more = lbas - charge.lbas
        if more <= 0:
            return
        self.make_room(charge.account, more, {keep})
        charge.lbas = lbas
        self._add(charge.account, more)

    def settle(self, sequence: "Sequence") -> None:
        """Charge a sequence what it has now: it has come, or is stored. Before that a power cut may bring back
        what was cut off."""
        if self.is_counting:
            charge, lbas = self.charge_of(sequence), charged_lbas(sequence)
            self._add(charge.account, lbas - charge.lbas)
            charge.lbas = lbas

    def moved(self, sequence: "Sequence") -> None:
        """It may be another tenant's now."""
        if self.is_counting:
            charge = self.charge_of(sequence)
            self._add(charge.account, -charge.lbas)
            charge.account = sequence.model.id, self._catalogue.tenant_of(sequence.id)
            self._add(charge.account, charge.lbas)

    def begin(self, sequence: "Sequence") -> None:
        """A new sequence: all that it has is charged from now on."""
        if self.is_counting:
            account = sequence.model.id, self._catalogue.tenant_of(sequence.id)
            self._charges[sequence.id] = Charge(account, 0)
            self.settle(sequence)

    def forget(self, sequence: "Sequence") -> None:
        """It is about to be deleted."""
        self._uses.pop(sequence.id, None)
        if self.is_counting:
            charge = self.charge_of(sequence)
            del self._charges[sequence.id]
            self._add(charge.account, -charge.lbas)

    # what Caps asks for

    def _model_id(self, name: str) -> int | None:
        model = self._store._models.get(name)
        return model and model.id

    def _oldest(self, account: Account) -> Iterator[Candidate]:
        return self._catalogue.oldest(account)

    def _in_use(self) -> set[int]:
        return {each.id for each in self._store._attended}

    def _account_of(self, candidate: Candidate) -> Account:
        charge = self._charges.get(candidate.id)
        return charge.account if charge else (candidate.model_id, self._catalogue.tenant_of(candidate.id))

    def _lbas(self, candidate: Candidate) -> int:
        charge = self._charges.get(candidate.id)
        if charge is not None:
            return charge.lbas
        model = next(model for model in self._store._models.values() if model.id == candidate.model_id)
        return candidate.num_groups * model.layout.group_lbas + candidate.tail_lbas

    def _reprieve(self, rows: Iterable[tuple[int, int, int]]) -> None:
        self._catalogue.reprieve(rows)

    def _expired(self, limit: int) -> list[Candidate]:
        return self._catalogue.expired(self.clock(), limit) if self._catalogue.exists else []

    def _delete(self, victims: list[Candidate]) -> None:
        for victim in victims:
            log.info("sequence %s of %d tokens is evicted", victim.name, victim.num_tokens)
        self._store.delete_sequences(victim.name for victim in victims)

    def make_durable(self) -> None:
        self._store._sync_if_needed()

    def fullness(self) -> list[Fullness]:
        store = self._store
        capacity = store._num_data_lbas
        free = store._allocator.free_lbas + store._sealing.num_lbas_in_all
        unnamed = sum(
            group.num_lbas
            for sequence in store._sequences.values()
            for group in sequence._groups
            if group.id is None
        )
        return [Fullness(None, capacity - free, self._catalogue.sequence_lbas() + unnamed, capacity)]

    # recency

    def used(self, sequence_id: int, is_new_use: bool = False) -> None:
        """Note a use; it is durable with some later sync. is_new_use: it was looked for by name."""
        if not self.is_counting:
            return
        entry = self._uses.setdefault(sequence_id, [0, 0])
        entry[0] = self.clock()
        entry[1] += is_new_use
        if len(self._uses) >= NOTED_USES and not self._store._catalogue.is_in_transaction:
            self.write_uses()

    def write_uses(self) -> None:
        if self._uses:
            rows = [(when, count, number) for number, (when, count) in self._uses.items()]
            self._catalogue.write_uses(rows, MOST_USES)
            self._uses.clear()


def charged_lbas(sequence: "Sequence") -> int:
    """What a sequence, or a part of one, has now."""
    layout = sequence.model.layout
    if sequence._layers is None:
        return len(sequence._groups) * layout.group_lbas + sequence._row.tail_lbas
    counts = [tail.num_tokens for tail in sequence._layers]
    return blocks_of(layout, len(sequence._groups), counts, sequence._row.tail_lbas)


def blocks_of(layout: GroupLayout, num_groups: int, layer_tokens: list[int], stored_tail_lbas: int = 0) -> int:
    """Of flash, at most: groups, and the record of tokens that fill none, whichever layer is behind.

    stored_tail_lbas: of the record that there is until the next one is stored
    """
    group_tokens = layout.geometry.group_tokens
    rest = max(count % group_tokens for count in layer_tokens)
    tail_lbas = -(-rest * layout.geometry.token_bytes // layout.page_size)
    return num_groups * layout.group_lbas + max(tail_lbas, stored_tail_lbas)
