"""How pages of SGLang's host pool become objects: what they are, and what else their bytes depend on.

A page's key is a hash over its tokens and all before them; it says nothing of the model. The rest is the object
cache's identity: pages of another model, dtype, layout, engine version or share of the heads are misses, never
wrong K/V.

In the layout page_head, `[K | V][page][kv_head][token][layer][head_dim]`, the rows of a KV head lie together.
So an object is some KV heads of a page, under their numbers in the whole model, and the identity has no rank:
ranks of another tensor-parallel size find the heads that they want. In other layouts it is a rank's K or V.
"""

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sglang

from kvfs.engines.errors import UnsupportedOption

FORMAT = 1  # of the keys and objects below
HEAD_MAJOR = "page_head"
LAYOUTS = (HEAD_MAJOR, "page_first", "page_first_direct")
FLAT = b"flat"


class PageParts:
    """Of one rank's pool. Raises UnsupportedOption.

    config: SGLang's HiCacheStorageConfig; pool: its host pool
    """

    def __init__(self, config: Any, pool: Any):
        if pool.layout not in LAYOUTS:
            raise UnsupportedOption(
                f"--hicache-mem-layout {pool.layout} is not supported by kvfs: use one of {', '.join(LAYOUTS)}"
            )
        self._pool = pool
        self._heads_per_part = None
        is_replicated = bool(config.is_mla_model)  # all ranks of tensor parallelism have the same
        facts = {
            "engine": f"sglang {sglang.__version__}",
            "format": FORMAT,
            "model": config.model_name or "",
            "dtype": str(pool.dtype).removeprefix("torch."),
            "layout": pool.layout,
            "page_size": pool.page_size,
            "layers": f"{pool.start_layer}-{pool.end_layer}",
            "num_layers": pool.layer_num,
            "kv": type(pool).__name__,
            "context_parallel": f"{config.attn_cp_rank}/{config.attn_cp_size}",
            "decode_context_parallel": f"{config.dcp_rank}/{config.dcp_size}",
        }
        if not is_replicated:
            # of all ranks; more than the model has where several ranks have the same head, under other numbers
            facts["num_kv_heads"] = pool.head_num * config.tp_size
            facts["head_dim"] = f"{pool.head_dim}/{getattr(pool, 'v_head_dim', pool.head_dim)}"
        rank = "replicated" if is_replicated else f"{config.tp_rank}/{config.tp_size}"
        self.identity: dict[str, str | int] = {**facts, "tensor_parallel": rank}
        self.flat_identity = dict(self.identity)  # of a rank's pages in one piece each
        if pool.layout == HEAD_MAJOR and not is_replicated:
            self._heads_per_part = _heads_per_part(config, pool)
            self.identity["tensor_parallel"] = f"any, {self._heads_per_part} KV heads together"
            first_head = config.tp_rank * pool.head_num
            starts = range(first_head, first_head + pool.head_num, self._heads_per_part)
            self.tags = [f"{kind}{head}".encode() for head in starts for kind in "kv"]
        else:
            num_pieces = len(pool.get_page_buffer_meta(_indices_of_page(pool))[0])
            self.tags = [f"p{piece}".encode() for piece in range(num_pieces)]

    @property
    def num_parts(self) -> int:
        """Objects of a page."""
        return len(self.tags)

    def buffers(self, host_indices: Any) -> list[np.ndarray]:
        """uint8: memory of the pool, writable, page by page and of each its parts in order.

        host_indices: int64 tensor [num_pages * page_size], token slots, each page's together
        """
        if self._heads_per_part is None:
            addresses, sizes = self._pool.get_page_buffer_meta(host_indices)
        else:
            split = self._pool.head_num // self._heads_per_part
            addresses, sizes = self._pool.get_split_heads_page_buffer_meta(host_indices, split)
        pieces = zip(addresses, sizes, strict=True)
        return [np.frombuffer((ctypes.c_uint8 * size).from_address(at), np.uint8) for at, size in pieces]

    def keys(self, page_keys: Sequence[str]) -> list[bytes]:
        """Of all parts of these pages, in the order of `buffers`."""
        digests = [page_digest(key) for key in page_keys]
        return [digest + tag for digest in digests for tag in self.tags]


def page_digest(key: str) -> bytes:
    """32 bytes for a key of SGLang: mostly a SHA-256 in hexadecimal, sometimes with something behind it."""
    return hashlib.sha256(key.encode()).digest()


def with_more(identity: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """What a user adds to an identity, such as a model's revision, under names of its own.

    Raises UnsupportedOption for 8-bit floats without kv_cache_dtype: in SGLang's pool they are all uint8.
    """
    if identity["dtype"] == "uint8" and "kv_cache_dtype" not in more:
        raise UnsupportedOption('8-bit K/V look alike: say which, "identity": {"kv_cache_dtype": "fp8_e4m3"}')
    return {**identity, **{f"user.{name}": value for name, value in more.items()}}


def _heads_per_part(config: Any, pool: Any) -> int:
    """One KV head, or more if SGLang is told which sizes of tensor parallelism there will be (tp_lcm_size)."""
    if not config.tp_lcm_size:
        return 1
    num_heads = pool.head_num * config.tp_size
    if num_heads % config.tp_lcm_size or config.tp_lcm_size % config.tp_size:
        wanted = f"a multiple of {config.tp_size} ranks that divides {num_heads} KV heads"
        raise UnsupportedOption(f"tp_lcm_size {config.tp_lcm_size} is not {wanted}")
    return num_heads // config.tp_lcm_size


def _indices_of_page(pool: Any) -> Any:
    import torch

    return torch.arange(pool.page_size, dtype=torch.int64)
