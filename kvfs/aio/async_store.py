"""A store whose calls are awaited."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from typing import Any

from kvfs import opening
from kvfs.aio.async_objects import AsyncObjectCache
from kvfs.aio.async_sequence import AsyncSequence
from kvfs.aio.turns import Threads
from kvfs.arrays import Array, Pair
from kvfs.drive_set.locations import Location
from kvfs.errors import InvalidArgument, StoreClosed
from kvfs.metadata import SequenceRow
from kvfs.model import Model
from kvfs.objects.object_catalogue import CacheUsage
from kvfs.prefix.match import PrefixMatch
from kvfs.prefix.prefix_catalogue import Usage
from kvfs.sealing.derived_catalogue import DerivedUsage
from kvfs.sequence import Sequence
from kvfs.space.background_policy import Background
from kvfs.space.caps import QuotaUsage
from kvfs.space.leftovers import Leftover
from kvfs.space.space_catalogue import Candidate
from kvfs.space.space_usage import SpaceUsage
from kvfs.sparse import PageCounts
from kvfs.store import Store

NUM_THREADS = 4  # enough to have flash read for some while others wait for the store


def open(path: Location | Items[Location], *, num_threads: int = NUM_THREADS, **options: Any) -> "AsyncStore":
    """As kvfs.open, for `async with`: the drive is opened when that is entered.

    num_threads: calls under way at once; options: of kvfs.open, which raises what it raises when it is entered.
    """
    return AsyncStore(lambda: opening.open(path, **options), num_threads)


class AsyncStore:
    """As kvfs.Store, of one event loop. Use with `async with`, once; in the end it is flushed and closed."""

    def __init__(self, open_store: Callable[[], Store], num_threads: int = NUM_THREADS):
        """open_store: called in a thread. Raises InvalidArgument."""
        if num_threads < 1:
            raise InvalidArgument(f"num_threads is at least 1, not {num_threads}")
        self._open_store = open_store
        self._num_threads = num_threads
        self._opened: Store | None = None
        self._threads: Threads | None = None
        # by the id of the ordinary sequence, which they keep: one object, and one turn, for a sequence
        self._sequences: weakref.WeakValueDictionary[int, AsyncSequence] = weakref.WeakValueDictionary()

    def _open(self) -> None:
        self._opened = self._open_store()

    async def __aenter__(self) -> "AsyncStore":
        if self._threads is not None:
            raise InvalidArgument("a store of kvfs.aio is entered once: open another")
        self._threads = Threads(self._num_threads)
        try:
            await self._threads.call((), self._open)
        except BaseException:  # cancelled, perhaps, when it was open already
            await self.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def store(self) -> Store:
        """The ordinary store. Raises StoreClosed before it is opened."""
        if self._opened is None:
            raise StoreClosed
        return self._opened

    @property
    def path(self) -> str:
        return self.store.path

    async def _call(
        self, sequences: Iterable[AsyncSequence], function: Any, /, *arguments: Any, **options: Any
    ) -> Any:
        """In the turn of these sequences."""
        if self._threads is None:
            raise StoreClosed
        turns = [sequence._turn for sequence in sequences]
        return await self._threads.call(turns, function, *arguments, **options)

    def _of(self, sequence: Sequence) -> AsyncSequence:
        found = self._sequences.get(id(sequence))
        if found is None:
            found = self._sequences[id(sequence)] = AsyncSequence(self, sequence)
        return found

    async def flush(self) -> None:
        """Every append to any sequence that has returned survives a kill or a power cut from here on."""
        await self._call((), self.store.flush)

    async def close(self) -> None:
        """Flush and let go of the drive, once what is under way has ended. Closing twice is allowed."""
        if self._threads is not None and not self._threads.is_closed:
            await self._threads.close(lambda: None if self._opened is None else self._opened.close())

    # models

    async def add_model(
        self,
        name: str,
        *,
        num_layers: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str = "float16",
        group_tokens: int | None = None,
        seal: Iterable[str] | None = None,
    ) -> Model:
        return await self._call(
            (),
            self.store.add_model,
            name,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            group_tokens=group_tokens,
            seal=seal,
        )

    async def model(self, name: str) -> Model:
        return await self._call((), self.store.model, name)

    async def models(self) -> list[Model]:
        return await self._call((), self.store.models)

    # sequences

    async def create_sequence(
        self, model: Model, name: str, attributes: Mapping[str, bytes] | None = None
    ) -> AsyncSequence:
        return self._of(await self._call((), self.store.create_sequence, model, name, attributes))

    async def sequence(self, name: str) -> AsyncSequence:
        return self._of(await self._call((), self.store.sequence, name))

    async def sequences(self) -> list[AsyncSequence]:
        return [self._of(sequence) for sequence in await self._call((), self.store.sequences)]

    async def catalogue_rows(self) -> list[SequenceRow]:
        return await self._call((), lambda: list(self.store.catalogue_rows()))

    async def delete_sequence(self, name: str) -> None:
        await self.delete_sequences([name])

    async def delete_sequences(self, names: Iterable[str]) -> None:
        await self._call((), self.store.delete_sequences, names)

    async def rename_sequence(self, old_name: str, new_name: str) -> None:
        await self._call((), self.store.rename_sequence, old_name, new_name)

    # prefix reuse

    async def find_prefix(
        self,
        model: Model,
        token_ids: Array,
        tenant: str = "",
        settings: Mapping[str, Any] | None = None,
        verify: bool = False,
    ) -> PrefixMatch:
        return await self._call((), self.store.find_prefix, model, token_ids, tenant, settings, verify)

    async def restore_prefix(
        self, match: PrefixMatch, name: str, attributes: Mapping[str, bytes] | None = None
    ) -> AsyncSequence:
        return self._of(await self._call((), self.store.restore_prefix, match, name, attributes))

    async def set_quota(
        self,
        model: str = "",
        tenant: str = "",
        *,
        capacity_bytes: int,
        low_percent: int = 100,
        policy: str = "lru",
    ) -> None:
        how = {"capacity_bytes": capacity_bytes, "low_percent": low_percent, "policy": policy}
        return await self._call((), self.store.set_quota, model, tenant, **how)

    async def remove_quota(self, model: str = "", tenant: str = "") -> None:
        return await self._call((), self.store.remove_quota, model, tenant)

    async def quotas(self) -> list[QuotaUsage]:
        return await self._call((), self.store.quotas)

    async def evict(
        self, model: str = "", tenant: str = "", *, to_bytes: int | None = None, dry_run: bool = False
    ) -> list[Candidate]:
        how = {"to_bytes": to_bytes, "dry_run": dry_run}
        return await self._call((), self.store.evict, model, tenant, **how)

    async def set_background_eviction(
        self, *, expired: bool = False, high_percent: int | None = None, low_percent: int | None = None
    ) -> None:
        how = {"expired": expired, "high_percent": high_percent, "low_percent": low_percent}
        return await self._call((), self.store.set_background_eviction, **how)

    async def background_eviction(self) -> Background:
        return await self._call((), self.store.background_eviction)

    async def space_usage(self) -> list[SpaceUsage]:
        return await self._call((), self.store.space_usage)

    async def sequence_counts(self) -> dict[str, int]:
        return await self._call((), self.store.sequence_counts)

    async def leftovers(self) -> list[Leftover]:
        return await self._call((), self.store.leftovers)

    async def delete_model(self, name: str) -> None:
        await self._call((), self.store.delete_model, name)

    async def sequence_rows(
        self, after: str = "", limit: int = 1000, *, model: str | None = None
    ) -> list[SequenceRow]:
        return await self._call((), lambda: list(self.store.sequence_rows(after, limit, model=model)))

    async def prefix_usage(self) -> list[Usage]:
        return await self._call((), self.store.prefix_usage)

    async def drop_prefixes(self, tenant: str | None = None, model: str | None = None) -> int:
        return await self._call((), self.store.drop_prefixes, tenant, model)

    # objects

    async def object_cache(
        self,
        name: str,
        identity: Mapping[str, str | int | float | bool] | None = None,
        capacity_bytes: int | str | None = None,
        admission: str = "all",
    ) -> AsyncObjectCache:
        cache = await self._call((), self.store.object_cache, name, identity, capacity_bytes, admission)
        return AsyncObjectCache(self, cache)

    async def object_usage(self) -> list[CacheUsage]:
        return await self._call((), self.store.object_usage)

    async def drop_objects(self, name: str | None = None) -> int:
        return await self._call((), self.store.drop_objects, name)

    # sealing

    async def set_sealing(self, model: Model, seal: Iterable[str]) -> None:
        await self._call((), self.store.set_sealing, model, seal)

    async def sealing(self, model: Model) -> tuple[str, ...]:
        return await self._call((), self.store.sealing, model)

    async def derived_usage(self) -> list[DerivedUsage]:
        return await self._call((), self.store.derived_usage)

    async def drop_derived(self, model: str | None = None, derive: str | None = None) -> int:
        return await self._call((), self.store.drop_derived, model, derive)

    # attention

    async def attend(
        self,
        layer: int,
        queries: Array,
        sequences: AsyncSequence | Items[AsyncSequence],
        *,
        causal: bool = True,
        token_ranges: Array | None = None,
        window: int | None = None,
        sink_tokens: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Array | None = None,
        query_positions: Array | None = None,
        sinks: Array | None = None,
        compression: float | None = None,
        target_error: float | None = None,
        sparf: tuple[int, int] | None = None,
        exact_if_cached: bool = True,
        counts: PageCounts | None = None,
        out: Pair | None = None,
    ) -> tuple[Any, Any]:
        """See kvfs.Store.attend. The arrays are the call's until it returns, or raises."""
        asked = [sequences] if isinstance(sequences, AsyncSequence) else list(sequences)
        for sequence in asked:
            if not isinstance(sequence, AsyncSequence):
                raise InvalidArgument(f"{sequence!r} is not a sequence of this store")
        return await self._call(
            asked,
            self.store.attend,
            layer,
            queries,
            [sequence.sequence for sequence in asked],
            causal=causal,
            token_ranges=token_ranges,
            window=window,
            sink_tokens=sink_tokens,
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            query_positions=query_positions,
            sinks=sinks,
            compression=compression,
            target_error=target_error,
            sparf=sparf,
            exact_if_cached=exact_if_cached,
            counts=counts,
            out=out,
        )

    # what can be seen

    async def counters(self) -> dict[str, Any]:
        return await self._call((), self.store.counters)

    async def check(self) -> list[str]:
        return await self._call((), self.store.check)

    async def telemetry(self) -> dict[str, Any]:
        return await self._call((), self.store.telemetry)

    async def drive_map(self) -> list[dict[str, Any]]:
        return await self._call((), self.store.drive_map)

    async def newest_sequences(self, limit: int = 100) -> list[dict[str, Any]]:
        return await self._call((), self.store.newest_sequences, limit)

    async def events(self, after: int = 0) -> list[dict[str, Any]]:
        return await self._call((), self.store.events, after)

    async def start_trace(self) -> None:
        await self._call((), self.store.start_trace)

    async def stop_trace(self) -> dict[str, Any]:
        return await self._call((), self.store.stop_trace)
