"""Prefix reuse of a store that another process owns: what crosses to it, and what the owner makes of it.

Users of a mount are tenants of their own: names of tenants count within a user, but for root and whoever
mounted.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfs.arrays import Array, token_id_array
from kvfs.errors import InvalidArgument
from kvfs.model import Model
from kvfs.prefix.counters import sums
from kvfs.prefix.hashing import settings_text
from kvfs.prefix.match import Miss, PrefixMatch, check_tenant
from kvfs.prefix.prefix_catalogue import Usage
from kvfs.sequence_attributes import TENANT, check_attribute

if TYPE_CHECKING:
    from kvfs.remote.remote_sequence import RemoteSequence

BYTES_AS_TEXT = "latin-1"
_TOKEN_ID = np.dtype("<u4")


class RemotePrefixReuse:
    """What RemoteStore adds for it; see PrefixReuse."""

    def find_prefix(
        self,
        model: Model,
        token_ids: Array,
        tenant: str = "",
        settings: Mapping[str, Any] | None = None,
        verify: bool = False,
    ) -> PrefixMatch:
        """See Store.find_prefix. The prompt has to fit into the shared memory, at four bytes a token."""
        settings_text(settings)
        check_tenant(tenant)
        prompt = token_id_array(token_ids)
        self._check_own(model)
        asked = {
            "model": model.name,
            "tenant": tenant,
            "settings": dict(settings or {}),
            "verify": bool(verify),
        }
        with self._connection as connection:
            found = connection.call("find_prefix", **asked, **_place(connection, prompt))
        miss = found["miss"] and Miss(found["miss"])
        return PrefixMatch(model, tenant, dict(settings or {}), prompt[: found["num_tokens"]].copy(), miss)

    def restore_prefix(
        self, match: PrefixMatch, name: str, attributes: Mapping[str, bytes] | None = None
    ) -> "RemoteSequence":
        """See Store.restore_prefix."""
        if not isinstance(match, PrefixMatch):
            raise InvalidArgument(f"{match!r} is nothing that find_prefix has found")
        self._check_own(match.model)
        values = {}
        for attribute, value in (attributes or {}).items():
            check_attribute(attribute, value)
            values[attribute] = value.decode(BYTES_AS_TEXT)
        asked = {"model": match.model.name, "tenant": match.tenant, "settings": dict(match.settings)}
        with self._connection as connection:
            asked.update(_place(connection, match.token_ids))
            return self._named(connection.call("restore_prefix", name=name, attributes=values, **asked))

    def prefix_usage(self) -> list[Usage]:
        """See Store.prefix_usage; of other users' only for root and whoever mounted."""
        return [Usage(**usage) for usage in self._call("prefix_usage")]

    def drop_prefixes(self, tenant: str | None = None, model: str | None = None) -> int:
        """See Store.drop_prefixes; of other users' only for root and whoever mounted."""
        return self._call("drop_prefixes", tenant=tenant, model=model)

    def _check_own(self, model: Model) -> None:
        self._connection.check_open()
        if not isinstance(model, Model) or self._models.get(model.name) is not model:
            raise InvalidArgument(f"{model!r} is not a model of this store: use store.model or add_model")


class RemotePublishedSequence:
    """What RemoteSequence adds for it; see PublishedSequence."""

    def publish(self, tenant: str | None = None, settings: Mapping[str, Any] | None = None) -> int:
        """See Sequence.publish."""
        settings_text(settings)
        return self._call("publish", tenant=tenant, settings=dict(settings or {}))


def _place(connection, tokens: np.ndarray) -> dict:
    offset = connection.place(tokens.nbytes)
    connection.memory.array(offset, tokens.shape, _TOKEN_ID)[:] = tokens
    return {"offset": offset, "count": len(tokens)}


# the owner's side: calls as in remote/calls.py


def find_prefix(session, model, tenant, settings: dict, verify, offset, count) -> dict:
    tokens = session.memory.array(offset, (count,), _TOKEN_ID).copy()
    store = session.store
    match = store.find_prefix(store.model(model), tokens, _own(session, tenant), settings, bool(verify))
    return {"num_tokens": match.num_tokens, "miss": match.miss}


def restored(session, model, tenant, settings: dict, offset, count, name, attributes: Mapping[str, bytes]):
    """The sequence. attributes: besides the tenant's."""
    store = session.store
    tokens = session.memory.array(offset, (count,), _TOKEN_ID).copy()
    match = PrefixMatch(store.model(model), _own(session, tenant), settings, tokens, None)
    own = {TENANT: tenant.encode()} if tenant else {}
    return store._restore_prefix(match, name, {**own, **attributes})


def prefix_usage(session) -> list[dict]:
    """Of those tenants that the client may name, by the names that it knows them by."""
    usages = [asdict(usage) for usage in session.store.prefix_usage()]
    return [
        {**usage, "tenant": name}
        for usage in usages
        if (name := session.client.known_name(usage["tenant"])) is not None
    ]


def drop_prefixes(session, tenant, model) -> int:
    session.check_writable()
    return sum(
        session.store.drop_prefixes(_own(session, usage["tenant"]), usage["model"])
        for usage in {(u["tenant"], u["model"]): u for u in prefix_usage(session)}.values()
        if tenant in (None, usage["tenant"]) and model in (None, usage["model"])
    )


def publish(session, handle, tenant, settings: dict) -> int:
    sequence = session.writable(handle)
    if tenant is None:
        tenant = sequence.attributes().get(TENANT, b"").decode()
    return sequence.publish(_own(session, tenant), settings)


def counters(session) -> dict:
    """The store's, but of tenants only those that the client may name."""
    found = session.store.counters()
    rows = [
        {**row, "tenant": name}
        for row in found["prefix"]["tenants"]
        if (name := session.client.known_name(row["tenant"])) is not None
    ]
    return {**found, "prefix": sums(rows)}


def _own(session, tenant: str) -> str:
    """The tenant as the store knows it. A user's differ from those of the drive's owner by a leading number."""
    check_tenant(tenant)
    return session.client.own_name(tenant)
