"""An asyncio server: conversations come and go, each step is one batch of attention over all that wait."""

import asyncio
import tempfile
from pathlib import Path

import numpy as np

import kvfs
import kvfs.aio

NUM_LAYERS, NUM_QUERY_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 8, 2, 64


class Batches:
    """Attention of many conversations: whatever has come while the drive was busy is the next call."""

    def __init__(self, store: kvfs.aio.AsyncStore):
        self._store = store
        self._waiting: asyncio.Queue = asyncio.Queue()
        self.sizes: list[int] = []

    async def attend(self, layer: int, query: np.ndarray, sequence: kvfs.aio.AsyncSequence) -> np.ndarray:
        answer = asyncio.get_running_loop().create_future()
        await self._waiting.put((layer, query, sequence, answer))
        return await answer

    async def run(self) -> None:
        while True:
            asked = [await self._waiting.get()]
            while not self._waiting.empty():
                asked.append(self._waiting.get_nowait())
            for layer in {item[0] for item in asked}:
                _, queries, sequences, answers = zip(*(i for i in asked if i[0] == layer), strict=True)
                out, _ = await self._store.attend(layer, np.stack(queries), sequences)
                self.sizes.append(len(sequences))
                for answer, row in zip(answers, out, strict=True):
                    answer.set_result(row)


async def converse(store: kvfs.aio.AsyncStore, batches: Batches, name: str, num_steps: int) -> None:
    """One user: a prompt, then tokens one by one. A real engine computes keys, values and queries."""
    random = np.random.default_rng(len(name))
    sequence = await store.create_sequence(await store.model("demo"), name)
    for num_tokens in (300, *[1] * num_steps):
        for layer in range(NUM_LAYERS):
            rows = random.standard_normal((2, num_tokens, NUM_KV_HEADS, HEAD_DIM), np.float32)
            await sequence.append(layer, *rows)
            query = random.standard_normal((1, NUM_QUERY_HEADS, HEAD_DIM), np.float32)
            await batches.attend(layer, query, sequence)
    await sequence.flush()


async def serve(drive: Path) -> None:
    async with kvfs.aio.open(drive) as store:
        shape = {"num_layers": NUM_LAYERS, "num_query_heads": NUM_QUERY_HEADS, "num_kv_heads": NUM_KV_HEADS}
        await store.add_model("demo", head_dim=HEAD_DIM, **shape)
        batches = Batches(store)
        batching = asyncio.create_task(batches.run())
        async with asyncio.timeout(60), asyncio.TaskGroup() as users:
            for number in range(6):
                users.create_task(converse(store, batches, f"user-{number}", num_steps=4))
        batching.cancel()
        print(f"{len(await store.sequences())} conversations, batches of up to {max(batches.sizes)}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kvfs.format(Path(folder, "drive.kvfs"), size="64MiB")
        asyncio.run(serve(Path(folder, "drive.kvfs")))
