"""SGLang's HiCache on kvfs, through its factory and host pools: right pages after a restart, or misses."""

import hashlib
import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang", reason="sglang is not installed: make test-engines ENGINES=sglang")

from .engine import NUM_HEADS, PAGE_SIZE, heads_of, host_pool, slots  # isort: skip  before what needs torchvision

import torch
from sglang.srt.managers.cache_controller import HiCacheController

import kvfs
from kvfs.engines.errors import UnsupportedOption
from kvfs.errors import NotADrive

from ...unit.kvfs.remote.owner import Served

KEYS = [hashlib.sha256(bytes([page])).hexdigest() for page in range(6)]


@pytest.mark.parametrize("layout", ["page_head", "page_first", "page_first_direct"])
def test_pages_after_a_restart(drive, backend, layout):
    """Pages that were stored come back bit by bit into other slots of another process's pool."""
    pool = host_pool(layout)
    storage = backend(drive, pool)
    assert storage.batch_exists(KEYS) == 0
    assert storage.batch_set_v1(KEYS[:4], slots(0, 1, 2, 3)) == [True] * 4
    wanted = [heads_of(pool, page) for page in range(4)]
    storage.close()

    pool = host_pool(layout)
    storage = backend(drive, pool)
    assert storage.batch_exists(KEYS) == 4 and storage.exists(KEYS[3]) and not storage.exists(KEYS[5])
    before = [heads_of(pool, page) for page in range(8)]
    assert storage.batch_get_v1([*KEYS[2:4], KEYS[5], KEYS[0]], slots(7, 6, 2, 0)) == [True, True, False, True]
    for page, stored in {7: 2, 6: 3, 0: 0}.items():
        assert torch.equal(heads_of(pool, page), wanted[stored])
    for page in (1, 2, 3, 4, 5):
        assert torch.equal(heads_of(pool, page), before[page])
    assert storage.usage().misses["absent"] == 2 * (NUM_HEADS if layout == "page_head" else 1)


@pytest.mark.parametrize("tp_lcm_size", [None, 4])
def test_other_tensor_parallel_sizes(drive, backend, tp_lcm_size):
    """What two ranks stored one rank finds, and four do: the heads of each, under the model's numbering."""
    pages = []
    for rank in range(2):
        pool = host_pool(tp_size=2)
        storage = backend(drive, pool, tp=(rank, 2), tp_lcm_size=tp_lcm_size)
        assert all(storage.batch_set_v1(KEYS[:2], slots(0, 1)))
        pages.append(torch.stack([heads_of(pool, 0), heads_of(pool, 1)]))
        if rank == 0:
            assert storage.batch_exists(KEYS) == 2  # its own heads are there
            storage.close()
            whole = backend(drive, host_pool(), tp_lcm_size=tp_lcm_size)
            assert whole.batch_exists(KEYS) == 0  # those of the other rank are not yet
            assert whole.batch_get_v1(KEYS[:1], slots(0)) == [False]
            whole.close()
            continue
        storage.close()
    wanted = torch.cat(pages, dim=2)
    for tp_size in (1, 4):
        for rank in range(tp_size):
            pool = host_pool(tp_size=tp_size)
            storage = backend(drive, pool, tp=(rank, tp_size), tp_lcm_size=tp_lcm_size)
            assert storage.batch_exists(KEYS) == 2
            assert all(storage.batch_get_v1(KEYS[:2], slots(5, 3)))
            heads = slice(rank * pool.head_num, (rank + 1) * pool.head_num)
            assert torch.equal(heads_of(pool, 5), wanted[0][:, heads])
            assert torch.equal(heads_of(pool, 3), wanted[1][:, heads])
            storage.close()


class LatentPool:
    """What the plug-in asks of SGLang's pools of latents, of which every rank has all: one buffer a page."""

    layout, page_size, layer_num, start_layer, end_layer, dtype = (
        "page_first",
        PAGE_SIZE,
        3,
        0,
        3,
        torch.bfloat16,
    )

    def __init__(self):
        self.kv_buffer = torch.randint(0, 255, (8, PAGE_SIZE * 3 * 576 * 2), dtype=torch.uint8)

    def get_page_buffer_meta(self, indices):
        pages = [int(index) // PAGE_SIZE for index in indices[::PAGE_SIZE]]
        return [self.kv_buffer[page].data_ptr() for page in pages], [self.kv_buffer.shape[1]] * len(pages)


def test_latents(drive, backend):
    """What all ranks have alike the first one stores, and any other, of any number of ranks, finds."""
    pool = LatentPool()
    storage = backend(drive, pool, tp=(0, 2), is_mla_model=True)
    assert all(storage.batch_set_v1(KEYS[:2], slots(0, 1)))
    storage.close()
    other = LatentPool()
    storage = backend(drive, other, tp=(3, 4), is_mla_model=True)
    assert storage.batch_exists(KEYS) == 2 and storage.batch_get_v1([KEYS[1]], slots(6)) == [True]
    assert torch.equal(other.kv_buffer[6], pool.kv_buffer[1])


OTHERS = {
    "model": {"model": "another"},
    "revision": {"extra": {"identity": {"revision": "b"}}},
    "rank": {"tp": (1, 2), "heads": 2, "layout": "page_first"},
    "replicated heads": {"tp": (0, 8), "heads": 4},
    "dtype": {"dtype": torch.float16},
    "layout": {"layout": "page_first_direct"},
    "context parallelism": {"attn_cp_rank": 1, "attn_cp_size": 2},
    "heads together": {"tp_lcm_size": 2},
}


@pytest.mark.parametrize("what", OTHERS)
def test_others_pages_are_misses(drive, backend, what):
    """The same keys of another model, dtype, layout or rank: a miss with its reason, never K/V of the other."""
    changes = dict(OTHERS[what])
    layout = changes.pop("layout", "page_head")
    own_layout = "page_first" if what in ("rank", "layout") else "page_head"
    storage = backend(drive, host_pool(own_layout), tp=(0, 2) if what == "rank" else (0, 1))
    assert all(storage.batch_set_v1(KEYS[:2], slots(0, 1)))
    storage.close()

    pool = host_pool(layout, NUM_HEADS // changes.pop("heads", NUM_HEADS), changes.pop("dtype", torch.bfloat16))
    before = pool.kv_buffer.clone()
    storage = backend(drive, pool, **changes)
    assert storage.batch_exists(KEYS) == 0
    assert storage.batch_get_v1(KEYS[:2], slots(0, 1)) == [False, False]
    assert torch.equal(pool.kv_buffer.view(torch.uint8), before.view(torch.uint8))
    misses = storage.usage().misses
    assert misses["identity"] + misses["absent"] == 2 * storage._parts.num_parts
    if what != "heads together":  # whose keys differ, too
        assert misses["identity"] > 0


def test_another_version(drive, backend, monkeypatch):
    """Pages of an SGLang of another version may be arranged otherwise: they are misses."""
    storage = backend(drive, host_pool())
    assert all(storage.batch_set_v1(KEYS[:1], slots(0)))
    storage.close()
    monkeypatch.setattr("sglang.__version__", "9.9.9")
    assert backend(drive, host_pool()).batch_exists(KEYS) == 0


@pytest.mark.parametrize("interface_v1", [0, 1])
def test_through_the_controller(drive, backend, interface_v1):
    """SGLang's own functions of both interfaces store pages, and prefetch them into other slots."""
    pool = host_pool("page_first")
    wanted = [heads_of(pool, page) for page in range(3)]
    storage = backend(drive, pool, interface_v1=interface_v1)
    controller = SimpleNamespace(storage_backend=storage, storage_host_pool=pool, page_size=PAGE_SIZE)
    operation = SimpleNamespace(request_id="request", is_terminated=lambda: False)
    put, get = HiCacheController._generic_page_set, HiCacheController._generic_page_get
    if interface_v1:
        put, get = HiCacheController._page_set_zero_copy, HiCacheController._page_get_zero_copy
    assert put(controller, KEYS[:3], slots(0, 1, 2))
    assert storage.batch_exists(KEYS) == 3
    assert get(controller, operation, KEYS[:5], slots(5, 6, 7, 3, 4)) == 3
    for page, stored in enumerate(wanted, 5):
        assert torch.equal(heads_of(pool, page), stored)


def test_tensors_of_ones_own(drive, backend):
    """The interface without pools: tensors in, into the tensors given out; another size is a miss."""
    storage = backend(drive, host_pool(), interface_v1=0)
    page = torch.randn(5, 7).bfloat16()
    assert storage.set("key", page.t()) and storage.set("key", page.t())
    target = torch.empty(7, 5, dtype=torch.bfloat16)
    assert storage.get("key", target) is target and torch.equal(target, page.t())
    found = storage.batch_get(
        ["other", "key"], [torch.empty(7, 5), torch.empty(5, 7, dtype=torch.bfloat16).t()]
    )
    assert found[0] is None and torch.equal(found[1], page.t())
    assert storage.get("key", torch.empty(3)) is None
    assert storage.batch_set(["a", "b"], [page, page]) and storage.batch_exists(["a", "b", "c"]) == 2
    with pytest.raises(UnsupportedOption, match="given none"):
        storage.get("key")
    with pytest.raises(UnsupportedOption, match="interface_v1"):
        storage.set("key", None, 1234, 5)


def test_clear(drive, backend):
    """Clearing forgets this model's pages, for good, and no other's."""
    other = backend(drive, host_pool(), model="other")
    assert all(other.batch_set_v1(KEYS[:1], slots(0)))
    other.close()
    storage = backend(drive, host_pool())
    assert all(storage.batch_set_v1(KEYS, slots(*range(6))))
    assert storage.set("flat", torch.zeros(9)) and storage.clear()
    assert storage.batch_exists(KEYS) == 0 and storage.get("flat", torch.empty(9)) is None
    storage.close()
    storage = backend(drive, host_pool())
    assert storage.batch_exists(KEYS) == 0
    storage.close()
    assert backend(drive, host_pool(), model="other").batch_exists(KEYS) == 1


def test_capacity(drive, backend):
    """Ten times the cap offered: its use stays below, and what is there is right."""
    pool = host_pool()
    page_bytes = 2 * NUM_HEADS * 8192  # a head's 6144 bytes take two blocks
    storage = backend(drive, pool, extra={"capacity": 6 * page_bytes})
    for turn in range(12):
        keys = [f"{turn}-{key}" for key in KEYS[:5]]
        assert all(storage.batch_set_v1(keys, slots(0, 1, 2, 3, 4)))
        assert storage.usage().bytes <= 6 * page_bytes
    assert storage.batch_exists(keys) == 5
    wanted = heads_of(pool, 4)
    assert storage.batch_get_v1(keys[4:], slots(7)) == [True] and torch.equal(heads_of(pool, 7), wanted)


def test_several_ranks_on_one_mount(drive, backend, tmp_path):
    """Ranks are processes: they share the drive through its mount, and each has its heads."""
    with (
        kvfs.open(drive, cache_bytes="8MiB", num_workers=1) as owner,
        Served(owner, tmp_path / "mount") as served,
    ):
        pools = [host_pool(tp_size=2) for _ in range(2)]
        ranks = [backend(served.invite(), pool, tp=(rank, 2)) for rank, pool in enumerate(pools)]
        for rank in ranks:
            assert all(rank.batch_set_v1(KEYS[:2], slots(0, 1)))
        for rank, pool in zip(ranks, pools, strict=True):
            wanted = heads_of(pool, 1)
            assert rank.batch_get_v1([KEYS[1]], slots(6)) == [True] and torch.equal(heads_of(pool, 6), wanted)
            rank.close()


def test_a_drive_that_fails(drive, backend, caplog):
    """A store that is gone: misses, and one line, so that the engine computes on."""
    storage = backend(drive, host_pool())
    assert all(storage.batch_set_v1(KEYS[:2], slots(0, 1)))
    storage._store.close()
    with caplog.at_level(logging.ERROR, "kvfs"):
        for _ in range(3):
            assert storage.batch_exists(KEYS) == 0
            assert storage.batch_get_v1(KEYS[:2], slots(0, 1)) == [False, False]
            assert storage.batch_set_v1(KEYS[:2], slots(0, 1)) == [False, False]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "the store is closed" in caplog.text and not storage.clear()


def test_refused(drive, backend, tmp_path, caplog):
    """What cannot be kept right is refused in one line, before anything is stored."""
    with pytest.raises(UnsupportedOption, match="layer_first is not supported by kvfs: use one of page_head"):
        backend(drive, host_pool("layer_first"))
    with pytest.raises(UnsupportedOption, match='"path" is missing'):
        backend(drive, host_pool(), extra_config={"backend_name": "kvfs"} | _names())
    with pytest.raises(NotADrive):
        backend(tmp_path / "mount", _folder(tmp_path / "mount") and host_pool())
    with pytest.raises(UnsupportedOption, match="tp_lcm_size 3"):
        backend(drive, host_pool(), tp_lcm_size=3)
    with pytest.raises(UnsupportedOption, match="8-bit K/V look alike"):
        backend(drive, host_pool(dtype=torch.uint8))
    backend(drive, host_pool(dtype=torch.uint8), extra={"identity": {"kv_cache_dtype": "fp8_e5m2"}}).close()
    backend(drive, host_pool(), extra={"capactiy": "1GiB"})
    assert "options that kvfs does not know are ignored: capactiy" in caplog.text


def _names():
    return {"module_path": "kvfs.engines.sglang", "class_name": "HiCacheKvfs"}


def _folder(path):
    path.mkdir()
    return path
