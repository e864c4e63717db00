"""Caps of a store that another process owns: what crosses to it, and what the owner makes of it."""

from dataclasses import asdict

from kvfs.errors import NotPermitted
from kvfs.metadata import SequenceRow
from kvfs.space.background_policy import Background
from kvfs.space.caps import QuotaUsage
from kvfs.space.leftovers import Leftover
from kvfs.space.space_catalogue import Candidate
from kvfs.space.space_usage import SpaceUsage


class RemoteSpaceStore:
    """What RemoteStore adds for it; see SpaceStore. Caps are root's and whoever mounted's to change."""

    def set_quota(
        self,
        model: str = "",
        tenant: str = "",
        *,
        capacity_bytes: int,
        low_percent: int = 100,
        policy: str = "lru",
    ) -> None:
        """See Store.set_quota."""
        how = {"capacity_bytes": capacity_bytes, "low_percent": low_percent, "policy": policy}
        self._call("set_quota", model=model, tenant=tenant, **how)

    def remove_quota(self, model: str = "", tenant: str = "") -> None:
        """See Store.remove_quota."""
        self._call("remove_quota", model=model, tenant=tenant)

    def quotas(self) -> list[QuotaUsage]:
        """See Store.quotas."""
        return [QuotaUsage(**usage) for usage in self._call("quotas")]

    def evict(
        self, model: str = "", tenant: str = "", *, to_bytes: int | None = None, dry_run: bool = False
    ) -> list[Candidate]:
        """See Store.evict."""
        rows = self._call("evict", model=model, tenant=tenant, to_bytes=to_bytes, dry_run=dry_run)
        return [Candidate(**row) for row in rows]

    def set_background_eviction(
        self, *, expired: bool = False, high_percent: int | None = None, low_percent: int | None = None
    ) -> None:
        """See Store.set_background_eviction."""
        how = {"expired": expired, "high_percent": high_percent, "low_percent": low_percent}
        self._call("set_background_eviction", **how)

    def background_eviction(self) -> Background:
        """See Store.background_eviction."""
        return Background(**self._call("background_eviction"))

    def space_usage(self) -> list[SpaceUsage]:
        """See Store.space_usage."""
        return [SpaceUsage(**usage) for usage in self._call("space_usage")]

    def sequence_counts(self) -> dict[str, int]:
        """See Store.sequence_counts."""
        return self._call("sequence_counts")

    def leftovers(self) -> list[Leftover]:
        """See Store.leftovers."""
        return [Leftover(**each) for each in self._call("leftovers")]

    def delete_model(self, name: str) -> None:
        """See Store.delete_model. It is root's and whoever mounted's to do."""
        self._call("delete_model", name=name)

    def sequence_rows(
        self, after: str = "", limit: int = 1000, *, model: str | None = None
    ) -> list[SequenceRow]:
        """See Store.sequence_rows."""
        rows = self._call("sequence_rows", after=after, limit=limit, model=model)
        return [SequenceRow(**row) for row in rows]


# the owner's side: calls as in remote/calls.py


def set_quota(session, model, tenant, capacity_bytes, low_percent, policy) -> None:
    _check_administrator(session)
    how = {"capacity_bytes": capacity_bytes, "low_percent": low_percent, "policy": policy}
    session.store.set_quota(model, tenant, **how)


def remove_quota(session, model, tenant) -> None:
    _check_administrator(session)
    session.store.remove_quota(model, tenant)


def quotas(session) -> list[dict]:
    """Names of other tenants, and what they use, are not for everybody."""
    session.client.check_sees_others()
    return [asdict(usage) for usage in session.store.quotas()]


def evict(session, model, tenant, to_bytes, dry_run) -> list[dict]:
    _check_administrator(session)
    victims = session.store.evict(model, tenant, to_bytes=to_bytes, dry_run=bool(dry_run))
    return [asdict(each) for each in victims]


def set_background_eviction(session, expired, high_percent, low_percent) -> None:
    _check_administrator(session)
    how = {"expired": expired, "high_percent": high_percent, "low_percent": low_percent}
    session.store.set_background_eviction(**how)


def background_eviction(session) -> dict:
    return asdict(session.store.background_eviction())


def space_usage(session) -> list[dict]:
    return [asdict(usage) for usage in session.store.space_usage()]


def sequence_counts(session) -> dict[str, int]:
    return session.store.sequence_counts()


def leftovers(session) -> list[dict]:
    """Names of other users' sequences are not for everybody."""
    session.client.check_sees_others()
    return [asdict(each) for each in session.store.leftovers()]


def delete_model(session, name) -> None:
    _check_administrator(session)
    session.store.delete_model(name)


def sequence_rows(session, after, limit, model=None) -> list[dict]:
    return [asdict(row) for row in session.store.sequence_rows(after, limit, model=model)]


def _check_administrator(session) -> None:
    session.check_writable()
    if not session.client.is_administrator:
        raise NotPermitted(f"models, caps and evictions are not for user {session.client.uid} to change")


CALLS = (
    set_quota,
    remove_quota,
    quotas,
    evict,
    space_usage,
    sequence_counts,
    leftovers,
    delete_model,
    set_background_eviction,
    background_eviction,
    sequence_rows,
)
