"""SGLang's storage backend: pages of its host pool as objects of a kvfs store.

Each call is one batch of media commands, read into and written from the pool's memory where that is aligned
to 4 KiB. SGLang calls from its prefetch and backup threads. What the drive cannot do is a miss with one line in
the log: the engine computes the page.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig

from kvfs.engines import shared_store
from kvfs.engines.errors import UnsupportedModel, UnsupportedOption
from kvfs.engines.sglang.page_parts import FLAT, PageParts, page_digest, with_more
from kvfs.errors import KvfsError
from spdk_glue.status import NvmeError

CACHE_NAME = "sglang"
CLEARED_AT_ONCE = 4096
OPTIONS = {"path", "capacity", "cache", "identity", "open", "admission"}
# what SGLang itself takes from the same table
_OF_SGLANG = {
    "backend_name",
    "module_path",
    "class_name",
    "interface_v1",
    "tp_lcm_size",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "prefetch_timeout_per_page",
    "prefetch_timeout_max",
    "hicache_storage_pass_prefix_keys",
}

log = logging.getLogger(__name__)


class HiCacheKvfs(HiCacheStorage):
    """Made by SGLang's StorageBackendFactory; closed by it, or by `close`.

    Of extra_config: path: a drive's file or location, or the folder where it is mounted, which several ranks
    need; capacity: the cache's cap, such as "100GiB" (by default what the drive has); cache: its name,
    "sglang"; identity: what else K/V depend on, such as {"revision": "..."}; open: options of kvfs.open;
    admission: "second-sight": pages are stored when they are offered for the second time.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None):
        """Raises UnsupportedOption, and what kvfs.open raises."""
        self._config = storage_config
        self._options = dict(storage_config.extra_config or {})
        unknown = sorted(self._options.keys() - OPTIONS - _OF_SGLANG)
        if unknown:  # a later SGLang may know them
            log.warning("options that kvfs does not know are ignored: %s", ", ".join(unknown))
        if "path" not in self._options:
            raise UnsupportedOption('"path" is missing in --hicache-storage-backend-extra-config: the drive')
        self._is_v1 = bool(self._options.get("interface_v1", 0))
        self._told: set[str] = set()
        self._store = shared_store.acquire(self._options["path"], **self._options.get("open", {}))
        self._is_open = True

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Learn what the pages are. Raises UnsupportedOption, UnsupportedModel, InvalidArgument."""
        super().register_mem_pool_host(mem_pool_host)
        self._parts = PageParts(self._config, mem_pool_host)
        more = self._options.get("identity", {})
        name = self._options.get("cache", CACHE_NAME)
        admission = self._options.get("admission", "all")
        self._pages = self._store.object_cache(
            name,
            with_more(self._parts.identity, more),
            self._options.get("capacity"),
            admission=admission,
        )
        self._flat = self._store.object_cache(
            name, with_more(self._parts.flat_identity, more), admission=admission
        )

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        raise UnsupportedModel(
            f"pool {host_pool_name}: kvfs keeps K/V pages alone in SGLang, not states of hybrid models"
        )

    # pages in the pool's own memory

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many pages from the first on are all there."""
        if not self._is_v1:
            return _leading(self._done(lambda: self._flat.contains(_flat_keys(keys)), len(keys)))
        num_parts = self._parts.num_parts
        found = self._done(lambda: self._pages.contains(self._parts.keys(keys)), len(keys) * num_parts)
        return _leading(_whole(found, num_parts))

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Read pages into the pool. False: a miss; that page's memory may hold anything then."""
        return self._transfer(self._pages.get, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Store pages of the pool. False: there is no room."""
        return self._transfer(self._pages.put, keys, host_indices)

    def _transfer(self, call: Any, keys: list[str], host_indices: torch.Tensor) -> list[bool]:
        num_parts = self._parts.num_parts
        work = lambda: call(self._parts.keys(keys), self._parts.buffers(host_indices))  # noqa: E731
        return _whole(self._done(work, len(keys) * num_parts), num_parts)

    # pages as tensors of their own, for SGLang without interface_v1

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """The tensors that were given, filled; None: a miss."""
        if target_locations is None:
            raise UnsupportedOption("kvfs reads pages into the tensors that it is given, and was given none")
        targets = [target.contiguous() for target in target_locations]
        found = self._done(lambda: self._flat.get(_flat_keys(keys), list(map(_bytes_of, targets))), len(keys))
        for target, given, is_hit in zip(targets, target_locations, found, strict=True):
            if is_hit and target is not given:
                given.copy_(target)
        return [given if is_hit else None for given, is_hit in zip(target_locations, found, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        if values is None or any(value is None for value in values):
            raise UnsupportedOption("kvfs stores tensors, not addresses: switch interface_v1 on")
        data = [_bytes_of(value.contiguous()) for value in values]
        return all(self._done(lambda: self._flat.put(_flat_keys(keys), data), len(keys)))

    # the whole

    def clear(self) -> bool:
        """Forget the pages of this model, dtype and layout."""
        try:
            for cache in (self._pages, self._flat):
                keys = list(cache.keys())
                for start in range(0, len(keys), CLEARED_AT_ONCE):
                    cache.delete(keys[start : start + CLEARED_AT_ONCE])
            self._store.flush()
            return True
        except (KvfsError, NvmeError) as error:
            self._tell(error)
            return False

    def usage(self) -> Any:
        """Objects, bytes, cap, hits, misses by reason and evictions of the cache (kvfs.objects Usage)."""
        return self._pages.usage()

    def flush(self) -> None:
        """What was stored survives a kill or a power cut from here on."""
        self._store.flush()

    def close(self) -> None:
        """Closing twice is allowed."""
        if self._is_open:
            self._is_open = False
            shared_store.release(self._store)

    def _done(self, work: Any, num_results: int) -> list[bool]:
        """What the store says, or, of a failure, misses."""
        try:
            return work()
        except (KvfsError, NvmeError) as error:
            self._tell(error)
            return [False] * num_results

    def _tell(self, error: Exception) -> None:
        """Once for a reason: a drive that is gone fails with every page."""
        text = f"{type(error).__name__}: {error}"
        log.log(
            logging.DEBUG if text in self._told else logging.ERROR, "kvfs: pages are computed anew: %s", text
        )
        self._told.add(text)


def _whole(found: Sequence[bool], num_parts: int) -> list[bool]:
    """Of each page whether all its parts are."""
    return [all(found[start : start + num_parts]) for start in range(0, len(found), num_parts)]


def _leading(found: Sequence[bool]) -> int:
    with suppress(ValueError):
        return list(found).index(False)
    return len(found)


def _flat_keys(keys: Sequence[str]) -> list[bytes]:
    return [page_digest(key) + FLAT for key in keys]


def _bytes_of(tensor: torch.Tensor) -> Any:
    """uint8 NumPy view of a contiguous tensor's memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
