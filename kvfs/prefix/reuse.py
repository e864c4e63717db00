"""Prefix reuse as a store and its sequences offer it."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from kvfs.arrays import Array, token_id_array
from kvfs.errors import CatalogueDamaged, InvalidArgument, NvmeStatusError
from kvfs.model import Model
from kvfs.prefix.hashing import settings_text
from kvfs.prefix.index import PrefixIndex
from kvfs.prefix.match import PrefixMatch, check_tenant
from kvfs.prefix.prefix_catalogue import Usage
from kvfs.sequence_attributes import TENANT
from kvfs.telemetry.requests import request

if TYPE_CHECKING:
    from kvfs.sequence import Sequence

Method = TypeVar("Method", bound=Callable[..., Any])


class PrefixReuse:
    """What Store adds for it. Expects a store's lock, catalogue, models and sequences, and `_prefixes`."""

    _prefixes: PrefixIndex

    @request("find_prefix")
    def find_prefix(
        self,
        model: Model,
        token_ids: Array,
        tenant: str = "",
        settings: Mapping[str, Any] | None = None,
        verify: bool = False,
    ) -> PrefixMatch:
        """The longest prefix of a prompt that this tenant's published sequences of the model hold on flash.

        token_ids: integers [any number]; whole groups of them are found
        settings: what keys and values depend on beside model and tokens (rotary settings, an adapter), as given
            to Sequence.publish
        verify: have the drive read the groups first, which takes as long as reading them. Without it a damaged
            group is noticed when it is read, an error then, and not found from then on.

        Raises InvalidArgument.
        """
        settings_json = settings_text(settings)
        check_tenant(tenant)
        prompt = token_id_array(token_ids)
        with self._lock:
            self._check_open()
            self._check_own(model)
            found, miss = self._prefixes.find(model, tenant, settings_json, prompt, verify, self._sequences)
            tokens = prompt[: found * model.geometry.group_tokens].copy()
            return PrefixMatch(model, tenant, dict(settings or {}), tokens, miss)

    @request("restore_prefix")
    def restore_prefix(
        self, match: PrefixMatch, name: str, attributes: Mapping[str, bytes] | None = None
    ) -> "Sequence":
        """A new sequence that begins with what was found: its groups are shared, nothing is copied.

        It has the match's token ids and tenant; attributes: as for create_sequence. Go on with the prompt at
        its `num_tokens`: less than the match's where sequences were deleted since, 0 for an empty match. It
        publishes nothing by itself. Raises SequenceExists, InvalidArgument.
        """
        if not isinstance(match, PrefixMatch):
            raise InvalidArgument(f"{match!r} is nothing that find_prefix has found")
        tenant = {TENANT: match.tenant.encode()} if match.tenant else {}
        return self._restore_prefix(match, name, {**tenant, **(attributes or {})})

    def _restore_prefix(self, match: PrefixMatch, name: str, attributes: Mapping[str, bytes]):
        """As restore_prefix, with these attributes and no others."""
        with self._lock:
            self._check_open()
            self._check_own(match.model)
            settings = settings_text(match.settings)
            num_groups, source_id = self._prefixes.source(match.model, match.tenant, settings, match.token_ids)
            if source_id is None:
                return self.create_sequence(match.model, name, attributes)
            return self._begin_with(match.model, name, attributes, source_id, num_groups)

    def _begin_with(
        self, model: Model, name: str, attributes: Mapping[str, bytes], source_id: int, num_groups: int
    ) -> "Sequence":
        """A new sequence that has another's first groups. Called with the lock."""
        num_tokens = num_groups * model.geometry.group_tokens
        tenant = attributes.get(TENANT, b"").decode()
        self._space.reserve_new(model, tenant, num_tokens, source_id)
        with self._catalogue.transaction():
            sequence = self.create_sequence(model, name, attributes)
            try:
                shared = self._catalogue.prefixes.share(sequence.id, source_id, num_groups, num_tokens)
                if shared != num_groups:
                    raise CatalogueDamaged(f"sequence number {source_id} lacks groups that it is found by")
            finally:
                del self._sequences[name]  # it was empty when it was made
        sequence = self.sequence(name)
        self._space.settle(sequence)
        return sequence

    def prefix_usage(self) -> list[Usage]:
        """What can be found, by tenant, model and settings. Reads all entries."""
        with self._lock:
            self._check_open()
            return self._prefixes.usage()

    def drop_prefixes(self, tenant: str | None = None, model: str | None = None) -> int:
        """Let nothing be found any more, of one tenant or one model's name only if they are given.

        Sequences stay; their groups are freed with them. Returns how many groups were dropped.
        """
        with self._lock:
            self._check_open()
            return self._prefixes.drop(
                lambda usage: tenant in (None, usage.tenant) and model in (None, usage.model)
            )

    def _check_own(self, model: Model) -> None:
        if not isinstance(model, Model) or self._models.get(model.name) is not model:
            raise InvalidArgument(f"{model!r} is not a model of this store: use store.model or add_model")


class PublishedSequence:
    """What Sequence adds for it."""

    def publish(self, tenant: str | None = None, settings: Mapping[str, Any] | None = None) -> int:
        """Let prompts that begin with this sequence's tokens begin with its keys and values, from here on.

        What is found are whole groups, stored in every layer, whose token ids are known (append_tokens). Those
        that come later follow when they are stored: with a flush. Who publishes promises that token ids, model
        and settings say all that keys and values depend on: not so with padding on the left, or images.

        tenant: who may find it; by default the sequence's attribute user.kvfs.tenant, or else the users who
            name none
        settings: see Store.find_prefix

        A fork publishes what it appends only if it is told to. Returns how many tokens can be found now.
        Durable after the next flush. Raises InvalidArgument.
        """
        settings_json = settings_text(settings)
        with self._store._lock:
            self._check_usable()
            if tenant is None:
                tenant = self.attributes().get(TENANT, b"").decode()
            check_tenant(tenant)
            return self._publish(tenant, settings_json)

    def _publish(self, tenant: str, settings: str) -> int:
        """settings: JSON. Called with the store's lock."""
        catalogue = self._store._catalogue
        if self._dirty:
            self._use()
            self._store_state()
        with catalogue.transaction():
            catalogue.prefixes.set_publication(self._row.id, tenant, self.model.id, settings)
            num_groups = catalogue.prefixes.publish(self._row.id, self._tokens)
        return num_groups * self._geometry.group_tokens


def suspecting(method: Method) -> Method:
    """A store's or sequence's method that reads: what the drive cannot give back is not found any more."""

    @functools.wraps(method)
    def reading(self, *arguments, **options):
        try:
            return method(self, *arguments, **options)
        except NvmeStatusError as error:
            if error.lba is not None:
                store = getattr(self, "_store", self)
                with store._lock:
                    store._prefixes.suspect(error.lba)
            raise

    return reading  # type: ignore[return-value]
