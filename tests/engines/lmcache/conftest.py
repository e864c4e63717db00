"""Fixtures of LMCache's tests: its chunks in memory, and adapters made as its server makes them."""

import json
import select
from argparse import Namespace

import pytest

CHUNK_BYTES = 64 << 10
NUM_LAYERS, NUM_TOKENS, HIDDEN = 2, 64, 128  # of a chunk: 64 KiB in bfloat16
MODEL = "tiny/model"
WORLD_SIZE, RANK = 1, 0


def adapter_json(path, **params):
    params = {"path": str(path), "size": "96MiB", "drive_cache_bytes": "8MiB", **params}
    where = {"module_path": "kvfs.engines.lmcache", "class_name": "KvfsL2Adapter"}
    return json.dumps({"type": "plugin", **where, "adapter_params": params})


def make_adapter(path, **params):
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config

    config = parse_args_to_l2_adapters_config(Namespace(l2_adapter=[adapter_json(path, **params)]))
    adapter = create_l2_adapter(config.adapters[0])
    adapter.set_backend_identity("plugin", shared=False)  # as its server does, over names of its own
    return adapter


@pytest.fixture
def open_adapter(tmp_path):
    """open_adapter(**adapter_params) over one drive; closed in the end. `path` says another one."""
    opened = []

    def open_one(path=tmp_path / "drive.kvfs", **params):
        opened.append(make_adapter(path, **params))
        return opened[-1]

    yield open_one
    for adapter in opened:
        adapter.close()


def key(number, model=MODEL, world_size=WORLD_SIZE, salt="", group=0):
    from lmcache.v1.distributed.api import ObjectKey

    rank = ObjectKey.ComputeKVRank(world_size, RANK, world_size, RANK)
    return ObjectKey(number.to_bytes(32, "big"), model, rank, group, salt)


def layout(shape=(2, NUM_LAYERS, NUM_TOKENS, HIDDEN), dtype="bfloat16"):
    import torch
    from lmcache.v1.distributed.api import MemoryLayoutDesc

    return MemoryLayoutDesc([torch.Size(shape)], [getattr(torch, dtype)])


def chunk(seed=None, desc=None):
    """A MemoryObj of noise, or of zeros; its memory begins on a page."""
    import torch
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    desc = desc or layout()
    (shape,), (dtype,) = desc.shapes, desc.dtypes
    num_bytes = shape.numel() * dtype.itemsize
    memory = torch.zeros(num_bytes + 4096, dtype=torch.uint8)
    raw = memory[-memory.data_ptr() % 4096 :][:num_bytes]
    if seed is not None:
        raw[:] = torch.randint(
            0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
    metadata = MemoryObjMetadata(shape, dtype, 0, num_bytes, 1, fmt=MemoryFormat.KV_2LTD)
    metadata.shapes, metadata.dtypes = [shape], [dtype]
    return TensorMemoryObj(raw_data=raw, metadata=metadata, parent_allocator=None)


def wait(fd, query):
    """What `query` gives, once the event fd has said that there is something."""
    from lmcache.v1.platform import consume_fd

    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while not (found := query()):
        assert poller.poll(20_000), "no event in 20 seconds"
        consume_fd(fd)
    return found


class Caller:
    """An adapter as LMCache's controllers use it, one task after another."""

    def __init__(self, adapter):
        self.adapter = adapter

    def store(self, keys, chunks):
        """The L2StoreResult."""
        task = self.adapter.submit_store_task(keys, chunks)
        return wait(self.adapter.get_store_event_fd(), self.adapter.pop_completed_store_tasks)[task]

    def look_up(self, keys, desc=None, group=0):
        """Which keys were found, and are locked."""
        adapter = self.adapter
        task = adapter.submit_lookup_and_lock_task(keys, {group: desc or layout()})
        fd = adapter.get_lookup_and_lock_event_fd()
        found = wait(fd, lambda: _known(adapter.query_lookup_and_lock_result(task)))[0]
        return [found.test(position) for position in range(len(keys))]

    def load(self, keys, desc=None):
        """The chunks, None where there is none."""
        chunks = [chunk(desc=desc) for _ in keys]
        task = self.adapter.submit_load_task(keys, chunks)
        found = wait(self.adapter.get_load_event_fd(), lambda: _known(self.adapter.query_load_result(task)))[0]
        return [one if found.test(position) else None for position, one in enumerate(chunks)]


def _known(result):
    return None if result is None else [result]


def same(left, right):
    import torch

    return left is not None and torch.equal(left.raw_data, right.raw_data)
