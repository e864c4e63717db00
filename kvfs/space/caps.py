"""Which sequences go so that no cap is exceeded: of a store and of a set of drives alike.

Who wants blocks is charged before it takes them. What would be above a cap has others that the cap counts
evicted first, or is refused with nothing evicted. What a sequence is charged, and in which order they were
used, is said by who derives from this.
"""

import heapq
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from kvfs.errors import InvalidArgument, NoSuchQuota, QuotaExceeded
from kvfs.space.space_catalogue import Account, Candidate, Quota

MOST_USES = 3  # two bits, as S3-FIFO has them: more would keep what was popular once
MOST_REPRIEVES = 4096  # looked at in one eviction
POLICIES = ("lru", "clock")


@dataclass(frozen=True)
class QuotaUsage:
    """used_bytes: what the cap counts now."""

    model: str
    tenant: str
    capacity_bytes: int
    low_percent: int
    policy: str
    used_bytes: int


@dataclass(frozen=True)
class Fullness:
    """Of a drive: blocks in use, of these by sequences, and all. drive: None for a store's only one."""

    drive: str | None
    used_lbas: int
    sequence_lbas: int
    capacity_lbas: int


class Caps:
    """Called with the store's lock. accounts: blocks charged; block_bytes: of each."""

    quotas: list[Quota]
    accounts: dict[Account, int]
    block_bytes: int
    evictions = 0  # of all causes
    expired = 0  # of these for their time to live, unasked
    watermark_evictions = 0
    refusals = 0

    # what the two have of their own

    def clock(self) -> int:
        """Time in ns."""
        raise NotImplementedError

    def _model_id(self, name: str) -> int | None:
        raise NotImplementedError

    def _oldest(self, account: Account) -> Iterator[Candidate]:
        """What of an account may be evicted, used longest ago first."""
        raise NotImplementedError

    def _in_use(self) -> Collection[int]:
        """Sequences that an attention under way reads."""
        raise NotImplementedError

    def _account_of(self, candidate: Candidate) -> Account:
        raise NotImplementedError

    def _lbas(self, candidate: Candidate) -> int:
        """What is charged for it now."""
        raise NotImplementedError

    def _reprieve(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """(time in ns, number of uses from now on, sequence) each."""
        raise NotImplementedError

    def _expired(self, limit: int) -> list[Candidate]:
        raise NotImplementedError

    def _delete(self, victims: list[Candidate]) -> None:
        raise NotImplementedError

    def make_durable(self) -> None:
        """What was deleted, and the blocks free."""
        raise NotImplementedError

    def fullness(self) -> list[Fullness]:
        """Of each drive; what can be derived again counts as free."""
        raise NotImplementedError

    def _is_on(self, candidate: Candidate, drive: str) -> bool:
        """Of a set: whether it has a part on a drive."""
        raise NotImplementedError

    def write_uses(self) -> None:
        """Have the order of use be that of this moment."""

    def counters(self) -> dict[str, int]:
        return {
            "evictions": self.evictions,
            "expired": self.expired,
            "watermark_evictions": self.watermark_evictions,
            "refusals": self.refusals,
        }

    # what a cap counts

    def used_lbas(self, quota: Quota) -> int:
        return sum(self.accounts[account] for account in self._accounts_of(quota))

    def usages(self) -> list[QuotaUsage]:
        return [
            QuotaUsage(**vars(quota), used_bytes=self.used_lbas(quota) * self.block_bytes)
            for quota in self.quotas
        ]

    def _accounts_of(self, quota: Quota) -> list[Account]:
        if quota.model and quota.tenant:
            account = (self._model_id(quota.model) or 0, quota.tenant)
            return [account] if account in self.accounts else []
        return [account for account in self.accounts if self._counts(quota, account)]

    def _counts(self, quota: Quota, account: Account) -> bool:
        is_model = not quota.model or self._model_id(quota.model) == account[0]
        return is_model and quota.tenant in ("", account[1])

    def _add(self, account: Account, lbas: int) -> None:
        self.accounts[account] = self.accounts.get(account, 0) + lbas

    # eviction

    def make_room(self, account: Account, more: int, keep: set[int], leaving: Account | None = None) -> None:
        """keep: sequences that want the blocks, or are their source; leaving: who had them before.

        Raises QuotaExceeded with nothing evicted.
        """
        victims: dict[int, Candidate] = {}
        for quota in self.quotas:
            if not self._counts(quota, account) or (leaving and self._counts(quota, leaving)):
                continue
            capacity = quota.capacity_bytes // self.block_bytes
            chosen = [each for each in victims.values() if self._counts(quota, self._account_of(each))]
            used = self.used_lbas(quota) + more - sum(map(self._lbas, chosen))
            if used <= capacity:
                continue
            found, used = self._choose(quota, used, capacity, {*victims, *keep})
            if used > capacity:
                self.refusals += 1
                raise QuotaExceeded(
                    quota.model,
                    quota.tenant,
                    more * self.block_bytes,
                    quota.capacity_bytes,
                    used * self.block_bytes,
                )
            victims.update((each.id, each) for each in found)
        self._evict([*victims.values()])

    def _choose(self, quota: Quota, used: int, capacity: int, taken: set[int]) -> tuple[list[Candidate], int]:
        """(victims, what is used without them)."""
        self.write_uses()
        low = min(capacity, capacity * quota.low_percent // 100)
        found: list[Candidate] = []
        reprieved: list[Candidate] = []
        taken.update(self._in_use())
        for each in self._by_age(self._accounts_of(quota)):
            if used <= low or len(reprieved) >= MOST_REPRIEVES:
                break
            if each.id in taken:
                continue
            if quota.policy == "clock" and each.num_uses:
                reprieved.append(each)
                continue
            found.append(each)
            used -= self._lbas(each)
        # all were used again and again: then those that were the least, which sorting keeps in order of age
        reprieved.sort(key=lambda each: each.num_uses)
        kept = 0
        while kept < len(reprieved) and used > capacity:
            found.append(reprieved[kept])
            used -= self._lbas(reprieved[kept])
            kept += 1
        now = self.clock()
        rows = [(now + place, each.num_uses - 1, each.id) for place, each in enumerate(reprieved[kept:])]
        if rows and used <= capacity:
            self._reprieve(rows)
        return found, used

    def _by_age(self, accounts: Iterable[Account]) -> Iterator[Candidate]:
        queues = [self._oldest(account) for account in accounts]
        return heapq.merge(*queues, key=lambda each: (each.last_use_ns, each.id))

    def _evict(self, victims: list[Candidate]) -> None:
        if victims:
            self._delete(victims)
            self.evictions += len(victims)

    def evict_to(self, model: str, tenant: str, to_bytes: int | None, dry_run: bool) -> list[Candidate]:
        """See Store.evict. Raises NoSuchQuota, InvalidArgument."""
        if to_bytes is None:
            return self.evict_expired(dry_run)
        if not isinstance(to_bytes, int) or to_bytes < 0:
            raise InvalidArgument(f"to_bytes is a number of bytes, not {to_bytes!r}")
        for quota in self.quotas:
            if (quota.model, quota.tenant) == (model, tenant):
                return self.evict(quota, to_bytes, dry_run)
        raise NoSuchQuota(model, tenant)

    def evict_expired(self, dry_run: bool = False, limit: int = 1024) -> list[Candidate]:
        """Delete sequences whose time to live is over; at most so many."""
        self.write_uses()
        in_use = self._in_use()
        return self._evict_all([each for each in self._expired(limit) if each.id not in in_use], dry_run)

    def evict(self, quota: Quota, num_bytes: int, dry_run: bool = False) -> list[Candidate]:
        """Delete the oldest that a cap counts, until it counts no more than so many bytes."""
        goal = num_bytes // self.block_bytes
        return self._evict_oldest(self._accounts_of(quota), self.used_lbas(quota) - goal, dry_run)

    def evict_from(self, drive: str | None, num_lbas: int, limit: int) -> list[Candidate]:
        """Delete the oldest on a drive, until they were charged so many blocks together; at most so many."""
        return self._evict_oldest([*self.accounts], num_lbas, False, limit, drive)

    def _evict_oldest(
        self,
        accounts: Iterable[Account],
        num_lbas: int,
        dry_run: bool,
        limit: int | None = None,
        drive: str | None = None,
    ) -> list[Candidate]:
        self.write_uses()
        in_use, victims = self._in_use(), []
        for each in self._by_age(accounts) if num_lbas > 0 else ():
            if each.id not in in_use and (drive is None or self._is_on(each, drive)):
                victims.append(each)
                num_lbas -= self._lbas(each)
            if num_lbas <= 0 or len(victims) == limit:
                break
        return self._evict_all(victims, dry_run)

    def _evict_all(self, victims: list[Candidate], dry_run: bool) -> list[Candidate]:
        if not dry_run:
            self._evict(victims)
        return victims
