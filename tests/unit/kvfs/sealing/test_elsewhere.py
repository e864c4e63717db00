"""Sealing through a mount, over several drives, over NVMe/TCP, and awaited."""

import asyncio
import threading

import numpy as np
import pytest

import kvfs
import kvfs.aio
from kvfs.errors import InvalidArgument, NotPermitted
from kvfs.remote.rights import Client
from kvfs.serving import serve
from kvfs.telemetry.metrics import metrics_text

from ..conftest import random_queries
from ..remote.owner import Served
from .conftest import FULL, GROUP, append, check_fast, small_model, spans

OPTIONS = {"cache_bytes": "8MiB", "num_workers": 1, "worker": "reference"}

pytestmark = pytest.mark.usefixtures("fast_encoders")


@pytest.fixture
def served(path, tmp_path):
    with kvfs.open(path, **OPTIONS) as store, Served(store, tmp_path / "mount") as served:
        yield served


def test_through_a_mount(served):
    """As in the owner's process; both see the same."""
    store = served.store
    with served.open() as client:
        model = small_model(client, seal=["sketch"])
        assert client.sealing(model) == store.sealing(store.model("small")) == ("sketch",)
        client.set_sealing(model, ())
        assert client.sealing(model) == ()
        sequence = client.create_sequence(model, "s")
        append(sequence, (FULL + 1) * GROUP)
        assert sequence.seal() == (FULL + 1) * GROUP
        assert sequence.seal("channel_major_keys") == (FULL + 1) * GROUP
        sequence.flush()
        ours = store.sequence("s")
        assert sequence.derived_segments("sketch") == ours.derived_segments("sketch") != []
        check_fast(store, ours)
        assert client.derived_usage() == store.derived_usage()
        assert sequence.reseal() == 0
        assert client.counters()["sealing"]["segments"] == store.counters()["sealing"]["segments"]
        assert b"kvfs_sketch_bytes" in metrics_text(client.telemetry())
        assert client.drop_derived("small", "sketch") == 2 and spans(sequence) == []
        for wrong in (lambda: sequence.seal("x"), lambda: client.set_sealing(model, ["x"])):
            with pytest.raises(InvalidArgument):
                wrong()


def test_users_of_a_mount(served, monkeypatch):
    """A user has own sequences sealed; what all have is not a user's to change."""
    store = served.store
    small_model(store)
    monkeypatch.setattr(Client, "is_administrator", property(lambda client: False))
    with served.open() as client:
        mine = client.model("small")
        assert small_model(client, name="new", seal=["sketch"]).name == "new"
        assert small_model(client, seal=[]) is mine
        sequence = client.create_sequence(mine, "s")
        append(sequence, GROUP)
        assert sequence.seal() == GROUP
        for call in (
            lambda: client.set_sealing(mine, ["sketch"]),
            lambda: small_model(client, seal=["sketch"]),
            client.drop_derived,
        ):
            with pytest.raises(NotPermitted):
                call()


def test_over_several_drives(tmp_path):
    """Each drive seals the heads that it has; what is asked of the set is said to all, and to new parts."""
    locations = [str(tmp_path / f"{name}.kvfs") for name in "ab"]
    kvfs.format(locations, "48MiB")
    with kvfs.open(locations, **{**OPTIONS, "cache_bytes": "24MiB"}) as drives:
        model = small_model(
            drives, num_kv_heads=4, num_query_heads=4, head_dim=128, seal=["channel_major_keys"]
        )
        assert drives.sealing(model) == ("channel_major_keys",)
        sequence = drives.create_sequence(model, "s")
        append(sequence, 5 * GROUP + 3)
        assert sequence.seal() == 5 * GROUP
        assert spans(sequence) == [(0, 5)]
        for part in sequence._parts:
            assert part.store.sealing(part.model) == ("channel_major_keys",)
            check_fast(part.store, part)
        [wanted, sketch] = drives.derived_usage()
        assert (wanted.derive, wanted.is_wanted, sketch.num_segments) == ("channel_major_keys", True, 2)
        assert drives.counters()["sealing"]["segments"] == 2
        assert sequence.reseal() == 0
        fork = sequence.fork("f")
        assert spans(fork) == [(0, 5)]
        drives.set_sealing(model, [])
        assert {part.store.sealing(part.model) for part in sequence._parts} == {()}
        assert drives.drop_derived("small") == 2 and spans(fork) == []
        assert drives.check() == []


def policies(drives):
    """Of a set's model "small" and its parts: by location, what each drive that is there seals."""
    return {
        member.location[-6]: {known.name: member.store.sealing(known) for known in member.store.models()}
        for member in drives._live
    }


def test_a_drive_that_was_away_seals_as_the_others(tmp_path):
    """Told while it is lost, over a restart, and when it is added: else its heads are read dense for ever."""
    locations = [str(tmp_path / f"{name}.kvfs") for name in "abc"]
    kvfs.format(locations[:2], "48MiB")
    kvfs.format(locations[2], "48MiB")
    options = {**OPTIONS, "cache_bytes": "24MiB"}
    with kvfs.open(locations[:2], **options) as drives:
        model = small_model(drives, num_kv_heads=2, num_query_heads=2, head_dim=128, seal=["sketch"])
        append(drives.create_sequence(model, "s"), GROUP)
        drives.flush()
        lost = next(member for member in drives._members.values() if member.location == locations[1])
        lost.lose("no route to it")
        drives.set_sealing(model, ["channel_major_keys"])
        drives.drives.bring_back(locations[1])
        expected = {"small": ("channel_major_keys",), "small/1": ("channel_major_keys",)}
        assert policies(drives) == {"a": expected, "b": expected}
    away = tmp_path / "away"
    (tmp_path / "b.kvfs").rename(away)
    with kvfs.open(locations[:2], degraded=True, **options) as drives:
        drives.set_sealing(drives.model("small"), ["sketch"])
    away.rename(tmp_path / "b.kvfs")
    with kvfs.open(locations[1::-1], **options) as drives:
        expected = {"small": ("sketch",), "small/1": ("sketch",)}
        assert policies(drives) == {"a": expected, "b": expected}
        drives.drives.add(locations[2])
        assert policies(drives)["c"] == {"small": ("sketch",)}


def test_on_a_drive_elsewhere(path):
    """Over NVMe/TCP the drive seals where it is; reads go on beside it on the same connection."""
    with (
        serve(path, "127.0.0.1:0", cache_bytes="8MiB", num_workers=1) as (server, subsystems),
        kvfs.open(f"nvme+tcp://127.0.0.1:{server.address[1]}/{subsystems.nqn}") as store,
    ):
        sequence = store.create_sequence(small_model(store, seal=["sketch"]), "s")
        append(sequence, (FULL + 1) * GROUP)
        sealing = threading.Thread(target=sequence.seal)
        sealing.start()
        for layer in range(sequence.model.num_layers):
            store.attend(layer, random_queries(num_heads=1, head_dim=256), sequence)
        sealing.join()
        assert spans(sequence) == [(0, FULL), (FULL, 1)]
        check_fast(store, sequence)
        assert sequence.reseal() == 0 and store.check() == []


def test_awaited(path):
    """Others use the sequence while it is sealed."""

    async def main():
        async with kvfs.aio.open(path, **OPTIONS) as store:
            model = await store.add_model(
                "m", num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=256, group_tokens=GROUP, seal=[]
            )
            sequence = await store.create_sequence(model, "s")
            rows = np.ones((3 * GROUP, 1, 256), np.float32)
            await sequence.append(0, rows, rows)
            sealed, _ = await asyncio.gather(sequence.seal(), sequence.append(0, rows, rows))
            assert sealed >= 3 * GROUP
            assert await sequence.derived_segments("sketch")
            assert await sequence.reseal() == 0
            await store.set_sealing(model, ["sketch"])
            assert await store.sealing(model) == ("sketch",)
            assert len(await store.derived_usage()) == 1
            assert await store.drop_derived() >= 1

    asyncio.run(main())
