"""A typed program over all that kvfs exports, checked by mypy --strict and not run (see test_typing.py).

What is wrong on purpose is marked; were it accepted, the mark would be an unused one, which is an error, too.
"""

import asyncio
from typing import Any, assert_type

import numpy as np

import kvfs
import kvfs.aio
from kvfs.arrays import DLPackArray


def program(tensor: DLPackArray) -> None:
    kvfs.format("drive.kvfs", size="1GiB", geometry=None, parity=True)
    kvfs.format(["a.kvfs", "b.kvfs"], 1 << 30)
    with kvfs.open("drive.kvfs", cache_bytes="64MiB", num_workers=1) as store:
        assert_type(store, kvfs.Store)
        model = store.add_model(
            "m", num_layers=2, num_query_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16"
        )
        assert_type(model, kvfs.Model)
        sequence = store.create_sequence(model, "s", {"user.note": b"value"})
        assert_type(sequence, kvfs.Sequence)
        assert_type(sequence.store, kvfs.Store)
        assert_type(sequence.num_tokens, int)
        sequence.append(0, np.zeros((1, 2, 64), np.float16), tensor)
        sequence.append(0, memoryview(b""), [[[0.0]]])
        sequence.append_tokens([1, 2, 3])
        assert_type(sequence.publish("tenant", {"rope": 1e6}), int)
        keys, _ = sequence.read(0, 0, 1, out=(tensor, tensor))
        out, lse = store.attend(0, tensor, [sequence], window=128, out=(keys, tensor))
        store.attend(0, tensor, sequence, token_ranges=np.zeros((1, 1, 2), np.int64), sinks=out)
        assert_type(lse, Any)
        match = store.find_prefix(model, range(300), tenant="tenant")
        assert_type(match, kvfs.PrefixMatch)
        assert_type(match.num_tokens, int)
        assert_type(store.restore_prefix(match, "t"), kvfs.Sequence)
        assert_type(sequence.fork("u"), kvfs.Sequence)
        assert_type([row.num_tokens for row in store.catalogue_rows()], list[int])
        assert_type(store.check(), list[str])
        cache = store.object_cache("pages", {"model": "m", "layers": 2}, capacity_bytes="1GiB")
        assert_type(cache, kvfs.ObjectCache)
        assert_type(cache.put([b"key"], [b"bytes"]), list[bool])
        assert_type(cache.get([b"key"], [bytearray(5)]), list[bool])
        assert_type(cache.usage().misses, dict[str, int])
        cache.put(["key"], [b"bytes"])  # type: ignore[list-item]
        try:
            store.flush()
        except kvfs.NvmeStatusError as error:
            assert_type(error.lba, int | None)
        except kvfs.errors.OutOfSpace as error:
            assert_type(error.wanted_bytes, int)
        store.attend(0, tensor, ["s"])  # type: ignore[list-item]
        store.sequence(7)  # type: ignore[arg-type]
        store.add_model("m", layers=2)  # type: ignore[call-arg]
        sequence.append(0, keys)  # type: ignore[call-arg]
        sequence.num_tokens = 3  # type: ignore[misc]
    kvfs.open(["a.kvfs", "b.kvfs"], degraded=True).close()
    kvfs.open("drive.kvfs", cache="64MiB")  # type: ignore[call-arg]


async def asynchronous(queries: np.ndarray[Any, np.dtype[np.float16]]) -> None:
    async with kvfs.aio.open("drive.kvfs", num_threads=2, cache_bytes="64MiB") as store:
        assert_type(store, kvfs.aio.AsyncStore)
        assert_type(store.store, kvfs.Store)
        sequence = await store.sequence("s")
        assert_type(sequence, kvfs.aio.AsyncSequence)
        assert_type(await sequence.num_tokens(), int)
        await asyncio.gather(sequence.append(0, queries, queries), sequence.flush())
        out, _ = await store.attend(0, queries, [sequence])
        assert_type(await store.models(), list[kvfs.Model])
        assert_type(await (await store.object_cache("pages")).contains([b"key"]), list[bool])
        await store.attend(0, out, [sequence.sequence])  # type: ignore[list-item]
        sequence.append(0, queries, queries)  # type: ignore[unused-coroutine]
