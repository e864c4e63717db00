"""The store for programs on asyncio: the same interface, awaited.

    async with kvfs.aio.open("drive.kvfs") as store:
        sequence = await store.sequence("chat-42")
        await sequence.append(layer, keys, values)
        out, lse = await store.attend(layer, queries, [sequence])

The store itself is the ordinary one, of a drive, a mount or a set of drives; a few threads call it. Errors are
its errors. What this adds are turns, see kvfs.aio.turns.
"""

from kvfs.aio.async_objects import AsyncObjectCache
from kvfs.aio.async_sequence import AsyncSequence
from kvfs.aio.async_store import AsyncStore, open

__all__ = ["AsyncObjectCache", "AsyncSequence", "AsyncStore", "open"]
