"""SGLang's own storage factory and host pools, on a machine without a GPU.

Its pools import torchvision, whose build on PyPI needs CUDA, and of which nothing is used here: an empty one
stands in where there is none.
"""

import importlib.abc
import importlib.machinery
import sys
import types

import sglang  # noqa: F401  before torchvision seems to be there
import torch
import transformers.image_utils  # noqa: F401

NUM_HEADS, HEAD_DIM, NUM_LAYERS, PAGE_SIZE, NUM_PAGES = 4, 64, 3, 16, 8


class _Absent(types.ModuleType):
    __path__: tuple = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _AbsentTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_AbsentTorchvision())

from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig  # noqa: E402
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.storage import StorageBackendFactory  # noqa: E402


def host_pool(layout="page_head", tp_size=1, dtype=torch.bfloat16, **changes):
    """SGLang's pool for a rank of `tp_size`, full of noise."""
    shape = {
        "page_size": PAGE_SIZE,
        "head_num": NUM_HEADS // tp_size,
        "head_dim": HEAD_DIM,
        "v_head_dim": HEAD_DIM,
    }
    shape |= changes
    device = [torch.zeros(1, shape["head_num"], HEAD_DIM, dtype=dtype) for _ in range(NUM_LAYERS)]
    addresses = torch.tensor([layer.data_ptr() for layer in device], dtype=torch.uint64)
    buffers = KVBuffers(
        k=tuple(device),
        v=tuple(device),
        k_data_ptrs=addresses,
        v_data_ptrs=addresses,
        layout=KVBufferLayout.NHD,
    )
    info = MHABufferInfo(buffers=buffers, dtype=dtype, device=torch.device("cpu"), **shape)
    with host_memory_budget_scope(1 << 30):
        pool = MHATokenToKVPoolHost(
            info,
            host_to_device_ratio=2,
            host_size=0,
            page_size=shape["page_size"],
            layout=layout,
            pin_memory=False,
            device_capacity_tokens=1,
            start_layer=0,
            end_layer=NUM_LAYERS,
            host_token_capacity=NUM_PAGES * shape["page_size"],
        )
    noise = torch.randint(0, 255, (pool.kv_buffer.numel() * pool.dtype.itemsize,), dtype=torch.uint8)
    pool.kv_buffer.view(torch.uint8).reshape(-1).copy_(noise)
    return pool


def heads_of(pool, page):
    """The bytes of a page as [K | V, heads, tokens, layers, bytes of a row], whatever the layout."""
    tokens = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
    if pool.layout == "page_head":
        found = pool.kv_buffer[:, page]
    elif pool.layout == "page_first":
        found = pool.kv_buffer[:, tokens].permute(0, 3, 1, 2, 4)
    else:
        found = pool.kv_buffer[:, page].permute(0, 3, 2, 1, 4)
    return found.contiguous().view(torch.uint8).clone()


def slots(*pages):
    """Indices of these pages' token slots, as the controller has them."""
    return torch.cat([torch.arange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in pages])


def create_backend(path, pool, tp=(0, 1), model="model", interface_v1=1, extra=None, **changes):
    """As SGLang's controller makes it. extra: of extra_config; changes: of the rest of the configuration."""
    facts = {
        "tp_rank": tp[0],
        "tp_size": tp[1],
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": pool.layout == "page_first",
        "model_name": model,
        "extra_config": {
            "backend_name": "kvfs",
            "module_path": "kvfs.engines.sglang",
            "class_name": "HiCacheKvfs",
            "interface_v1": interface_v1,
            "path": str(path),
            **({} if "mount" in str(path) else {"open": {"cache_bytes": "8MiB", "num_workers": 1}}),
            **(extra or {}),
        },
    }
    storage = StorageBackendFactory.create_backend("dynamic", HiCacheStorageConfig(**facts | changes), pool)
    try:
        storage.register_mem_pool_host(pool)
    except BaseException:
        storage.close()
        raise
    return storage
