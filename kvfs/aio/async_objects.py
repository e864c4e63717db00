"""A cache of objects whose calls are awaited. They take no turns: objects are whole or not there."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvfs.objects.counters import Miss, RequestMiss
from kvfs.objects.object_cache import ObjectCache, Usage

if TYPE_CHECKING:
    from kvfs.aio.async_store import AsyncStore


class AsyncObjectCache:
    """As kvfs.ObjectCache. Made by AsyncStore.object_cache."""

    def __init__(self, store: "AsyncStore", cache: ObjectCache):
        self._store = store
        self.cache = cache  # the ordinary one

    async def _call(self, function: Any, /, *arguments: Any) -> Any:
        return await self._store._call((), function, *arguments)

    @property
    def name(self) -> str:
        return self.cache.name

    async def put(self, keys: Sequence[bytes], objects: Sequence[Any]) -> list[bool]:
        """See kvfs.ObjectCache.put. The buffers are the call's until it returns, or raises."""
        return await self._call(self.cache.put, keys, objects)

    async def get(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> list[bool]:
        """See kvfs.ObjectCache.get. The buffers are the call's until it returns, or raises."""
        return await self._call(self.cache.get, keys, buffers)

    async def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return await self._call(self.cache.contains, keys)

    async def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        return await self._call(self.cache.sizes, keys)

    async def look_up(self, keys: Sequence[bytes]) -> list[Miss | None]:
        return await self._call(self.cache.look_up, keys)

    async def pin(self, keys: Sequence[bytes]) -> list[bool]:
        return await self._call(self.cache.pin, keys)

    async def unpin(self, keys: Sequence[bytes]) -> list[bool]:
        return await self._call(self.cache.unpin, keys)

    async def delete(self, keys: Sequence[bytes]) -> int:
        return await self._call(self.cache.delete, keys)

    async def keys(self) -> Iterator[bytes]:
        return await self._call(self.cache.keys)

    async def usage(self) -> Usage:
        return await self._call(self.cache.usage)

    async def count_request(
        self, tenant: str, model: str, wanted: int, found: int, miss: RequestMiss | None
    ) -> None:
        await self._call(self.cache.count_request, tenant, model, wanted, found, miss)

    async def set_capacity(self, capacity_bytes: int | str | None) -> None:
        await self._call(self.cache.set_capacity, capacity_bytes)
