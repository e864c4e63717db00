"""The store for asyncio: the same interface, appends in order, bounded, and safe to cancel."""

import asyncio
import contextlib
import inspect
import threading

import numpy as np
import pytest

import kvfs
import kvfs.aio
from kvfs.errors import InvalidArgument, NoSuchSequence, NotADrive, StoreClosed

from .conftest import HEAD_DIM, NUM_KV_HEADS, random_kv, random_queries
from .remote.owner import Served

MODEL = {"num_layers": 2, "num_query_heads": 8, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM}


def rows(number, num_tokens=1):
    """float16 tokens that say which append they are of."""
    return np.full((num_tokens, NUM_KV_HEADS, HEAD_DIM), number, np.float16)


@pytest.fixture(params=["store", "client"])
def open_store(request, path, tmp_path):
    """open_store(**options): of a drive's file, and of a drive that is served by another owner."""
    if request.param == "store":
        yield lambda **options: kvfs.aio.open(path, cache_bytes="8MiB", num_workers=1, **options)
        return
    with (
        kvfs.open(path, cache_bytes="8MiB", num_workers=1) as owner,
        Served(owner, tmp_path / "mount", memory_bytes=1 << 20) as served,
    ):
        yield lambda **options: kvfs.aio.open(served.invite(), **options)


def public(kind):
    return {name for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("ours", "theirs", "more"),
    [
        (kvfs.aio.AsyncStore, kvfs.Store, {"path", "store"}),
        (kvfs.aio.AsyncSequence, kvfs.Sequence, {"sequence", "model"}),
        (kvfs.aio.AsyncObjectCache, kvfs.ObjectCache, {"cache"}),
    ],
)
def test_same_interface(ours, theirs, more):
    """A method that only the ordinary store has makes its users go past the turns of the others."""
    assert public(ours) - more == public(theirs) - more
    for name, member in inspect.getmembers(theirs, inspect.isfunction):
        if not name.startswith("_"):
            wanted = [(p.name, p.kind, p.default) for p in inspect.signature(member).parameters.values()]
            found = inspect.signature(getattr(ours, name)).parameters.values()
            assert [(p.name, p.kind, p.default) for p in found] == wanted, name


def test_use(open_store):
    """A conversation's life, awaited: what is stored and attended is what an ordinary store says."""

    async def main():
        async with open_store() as store:
            model = await store.add_model("m", **MODEL)
            sequence = await store.create_sequence(model, "s", {"user.a": b"b"})
            keys, values = random_kv(300)
            for layer in range(2):
                await sequence.append(layer, keys, values)
            await sequence.append_tokens(range(300))
            assert await sequence.num_tokens() == 300 and await sequence.name() == "s"
            out = np.empty((1, 1, 8, HEAD_DIM), np.float32), np.empty((1, 1, 8), np.float32)
            found = await store.attend(1, random_queries(), sequence, out=out)
            assert found[0] is out[0] and np.isfinite(out[1]).all()
            assert await sequence.publish() == 256
            match = await store.find_prefix(model, range(280))
            other = await store.restore_prefix(match, "t")
            assert await other.num_tokens() == 256
            fork = await sequence.fork("u")
            await fork.truncate(10)
            cache = await store.object_cache("pages", {"model": "m"}, "1MiB")
            assert await cache.put([b"key"], [keys]) == [True] and list(await cache.keys()) == [b"key"]
            target = np.empty_like(keys)
            assert await cache.get([b"key"], [target]) == [True] and (target == keys).all()
            assert (await store.object_usage())[0].name == "pages" and await store.drop_objects() == 1
            await store.flush()
            assert await store.sequence("s") is sequence and await sequence.attributes() == {"user.a": b"b"}
            names = [await each.name() for each in await store.sequences()]
            with pytest.raises(NoSuchSequence):
                await store.sequence("x")
            with pytest.raises(InvalidArgument):
                await store.attend(0, random_queries(), [sequence.sequence])
            return names, out, sequence

    names, out, sequence = asyncio.run(main())
    assert names == ["s", "t", "u"]
    with pytest.raises(StoreClosed):
        asyncio.run(sequence.num_tokens())

    async def again():
        async with open_store() as store:
            sequence = await store.sequence("s")
            return await store.attend(1, random_queries(), [sequence])

    np.testing.assert_allclose(asyncio.run(again())[0], out[0], rtol=1e-5, atol=1e-6)


def test_order_of_appends(open_store):
    """Many appends begun at once to several sequences: each gets its own in the order of their begin."""

    async def main():
        async with open_store(num_threads=3) as store:
            model = await store.add_model("m", **MODEL)
            sequences = [await store.create_sequence(model, f"s{i}") for i in range(4)]
            work = [s.append(0, rows(number), rows(-number)) for number in range(50) for s in sequences]
            await asyncio.gather(*work)
            for sequence in sequences:
                keys, values = await sequence.read(0)
                assert keys[:, 0, 0].tolist() == list(range(50)) and values[:, 1, 1].tolist() == list(
                    range(0, -50, -1)
                )

    asyncio.run(main())


async def until(condition):
    """Waits until it holds, and a moment longer for what should not follow."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.03)


class Gate:
    """Holds a store's appends back until it is opened, and counts those that have begun."""

    def __init__(self, monkeypatch, kind=kvfs.Sequence):
        self.open, self.begun, self.most, self._now = threading.Event(), 0, 0, 0
        append, lock = kind.append, threading.Lock()

        def held(sequence, *arguments):
            with lock:
                self.begun += 1
                self._now += 1
                self.most = max(self.most, self._now)
            self.open.wait(20)
            try:
                return append(sequence, *arguments)
            finally:
                with lock:
                    self._now -= 1

        monkeypatch.setattr(kind, "append", held)


def test_bounded(path, monkeypatch):
    """However many calls are begun, no more than the threads are under way: memory stays bounded."""

    async def main():
        async with kvfs.aio.open(path, num_workers=1, num_threads=2) as store:
            model = await store.add_model("m", **MODEL)
            sequences = [await store.create_sequence(model, f"s{i}") for i in range(6)]
            gate = Gate(monkeypatch)
            work = asyncio.gather(*(s.append(0, rows(1), rows(1)) for s in sequences))
            await until(lambda: gate.begun >= 2)
            assert gate.begun == 2
            gate.open.set()
            await work
            assert gate.begun == 6 and gate.most <= 2

    asyncio.run(main())


def test_cancelled(path, monkeypatch):
    """Before its turn a cancelled append is not done; under way it is waited for: it reads an array."""

    async def main():
        async with kvfs.aio.open(path, num_workers=1) as store:
            model = await store.add_model("m", **MODEL)
            sequence = await store.create_sequence(model, "s")
            gate = Gate(monkeypatch)
            tasks = [asyncio.create_task(sequence.append(0, rows(n), rows(n))) for n in range(4)]
            await until(lambda: gate.begun >= 1)
            assert gate.begun == 1
            tasks[2].cancel()  # waits for its turn
            with pytest.raises(asyncio.CancelledError):
                await tasks[2]
            tasks[0].cancel()  # is under way
            tasks[0].cancel()
            await asyncio.sleep(0.05)
            assert not tasks[0].done() and gate.begun == 1
            gate.open.set()
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            await asyncio.gather(tasks[1], tasks[3])
            keys, _ = await sequence.read(0)
            assert keys[:, 0, 0].tolist() == [0, 1, 3]

            gate.open.clear()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    asyncio.get_running_loop().call_later(0.2, gate.open.set)
                    await sequence.append(0, rows(4), rows(4))
            with pytest.raises(InvalidArgument):  # and errors go on as they are
                await sequence.append(0, rows(4)[0], rows(4))
            assert await sequence.layer_tokens(0) == 4

    asyncio.run(main())


def test_failure_of_what_was_cancelled(path, monkeypatch):
    """An error that nobody waits for any more is the cause of the cancellation, not lost."""

    async def main():
        async with kvfs.aio.open(path, num_workers=1) as store:
            model = await store.add_model("m", **MODEL)
            sequence = await store.create_sequence(model, "s")
            gate = Gate(monkeypatch)
            task = asyncio.create_task(sequence.append(7, rows(1), rows(1)))
            await until(lambda: gate.begun)
            task.cancel()
            gate.open.set()
            try:
                await task
            except asyncio.CancelledError as error:
                assert isinstance(error.__cause__, InvalidArgument)

    asyncio.run(main())


def test_attention_on_crossing_sequences(open_store):
    """Calls about the same sequences in different orders do not wait for each other for ever."""

    async def main():
        async with open_store(num_threads=2) as store:
            model = await store.add_model("m", **MODEL)
            one, two = [await store.create_sequence(model, name) for name in "ab"]
            for sequence in (one, two):
                await sequence.append(0, *random_kv(5))
            queries = random_queries(num_sequences=2)
            calls = [store.attend(0, queries, pair) for pair in ([one, two], [two, one]) * 10]
            async with asyncio.timeout(20):
                answers = await asyncio.gather(*calls, one.append(0, *random_kv(1)))
            assert len(answers) == 21

    asyncio.run(main())


def test_opening_and_closing(path, tmp_path):
    """Errors of opening come from entering; a cancelled one lets go of the drive; calls after the end fail."""

    async def main():
        with pytest.raises(NotADrive):
            async with kvfs.aio.open(tmp_path):
                raise AssertionError("entered")
        with pytest.raises(StoreClosed):
            await kvfs.aio.open(path).models()
        with pytest.raises(InvalidArgument):
            kvfs.aio.open(path, num_threads=0)

        opening = asyncio.create_task(kvfs.aio.open(path, num_workers=1).__aenter__())
        await asyncio.sleep(0.01)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            store = await opening
            await store.close()

        async with kvfs.aio.open(path, num_workers=1) as store:  # nobody has it
            model = await store.add_model("m", **MODEL)
            await store.close()
            await store.close()
            with pytest.raises(StoreClosed):
                await store.create_sequence(model, "s")
        with pytest.raises(InvalidArgument, match="entered once"):
            async with store:
                raise AssertionError("entered")

    asyncio.run(main())
