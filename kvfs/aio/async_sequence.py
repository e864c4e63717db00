"""A sequence whose calls are awaited."""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfs.aio.turns import Turn
from kvfs.arrays import Array, Pair
from kvfs.derived import DerivedSegment
from kvfs.head_pieces import HeadRows
from kvfs.model import Model
from kvfs.sequence import Sequence
from kvfs.sequence_version import Version
from spdk_glue.vendor_command import Derive

if TYPE_CHECKING:
    from kvfs.aio.async_store import AsyncStore


class AsyncSequence:
    """As kvfs.Sequence; what that has as properties, but its model, is awaited, too. Made by AsyncStore."""

    def __init__(self, store: "AsyncStore", sequence: Sequence):
        self._store = store
        self.sequence = sequence  # the ordinary one
        self._turn = Turn()

    def __repr__(self) -> str:
        return f"<AsyncSequence of {self.model.name!r}>"

    async def _call(self, function: Any, /, *arguments: Any, **options: Any) -> Any:
        return await self._store._call((self,), function, *arguments, **options)

    async def _fact(self, name: str) -> Any:
        return await self._call(getattr, self.sequence, name)

    # facts

    @property
    def store(self) -> "AsyncStore":
        return self._store

    @property
    def model(self) -> Model:
        return self.sequence.model

    async def id(self) -> int:
        return await self._fact("id")

    async def name(self) -> str:
        return await self._fact("name")

    async def created_ns(self) -> int:
        return await self._fact("created_ns")

    async def changed_ns(self) -> int:
        return await self._fact("changed_ns")

    async def is_deleted(self) -> bool:
        return await self._fact("is_deleted")

    async def num_tokens(self) -> int:
        """Tokens that every layer has."""
        return await self._fact("num_tokens")

    async def num_token_ids(self) -> int:
        return await self._fact("num_token_ids")

    async def tokens(self) -> np.ndarray:
        """uint32 [any number]: token ids given to append_tokens."""
        return await self._fact("tokens")

    async def layer_tokens(self, layer: int) -> int:
        return await self._call(self.sequence.layer_tokens, layer)

    async def version(self) -> Version:
        return await self._call(self.sequence.version)

    async def holds(self, version: Version) -> bool:
        return await self._call(self.sequence.holds, version)

    # growing and reading

    async def append(self, layer: int, keys: Array, values: Array) -> None:
        """See kvfs.Sequence.append. The arrays are not to be changed before it returns, or raises."""
        await self._call(self.sequence.append, layer, keys, values)

    async def append_tokens(self, token_ids: Array) -> None:
        await self._call(self.sequence.append_tokens, token_ids)

    async def read(
        self, layer: int, start: int = 0, stop: int | None = None, out: Pair | None = None
    ) -> tuple[Any, Any]:
        return await self._call(self.sequence.read, layer, start, stop, out)

    async def read_heads(self, pieces: Items[HeadRows]) -> memoryview:
        return await self._call(self.sequence.read_heads, pieces)

    # attributes

    async def attributes(self) -> dict[str, bytes]:
        return await self._call(self.sequence.attributes)

    async def set_attribute(self, name: str, value: bytes) -> None:
        await self._call(self.sequence.set_attribute, name, value)

    async def remove_attribute(self, name: str) -> None:
        await self._call(self.sequence.remove_attribute, name)

    # durability, shortening and sharing

    async def flush(self) -> None:
        await self._call(self.sequence.flush)

    async def truncate(self, num_tokens: int) -> None:
        await self._call(self.sequence.truncate, num_tokens)

    async def fork(self, name: str) -> "AsyncSequence":
        return self._store._of(await self._call(self.sequence.fork, name))

    async def compact(self) -> None:
        await self._call(self.sequence.compact)

    async def publish(self, tenant: str | None = None, settings: Mapping[str, Any] | None = None) -> int:
        return await self._call(self.sequence.publish, tenant, settings)

    # sealing

    async def derived_segments(self, derive: str | Derive) -> list[DerivedSegment]:
        return await self._call(self.sequence.derived_segments, derive)

    async def seal(self, derive: str | Derive = "sketch") -> int:
        """See kvfs.Sequence.seal. Calls of this sequence do not wait for it."""
        return await self._store._call((), self.sequence.seal, derive)

    async def reseal(self, derive: str | Derive | None = None) -> int:
        """See kvfs.Sequence.reseal. Calls of this sequence do not wait for it."""
        return await self._store._call((), self.sequence.reseal, derive)
