"""SGLang's HiCache on kvfs: KV pages on the drive, found again after a restart.

--enable-hierarchical-cache --hicache-mem-layout page_head --hicache-storage-backend dynamic
--hicache-storage-backend-extra-config '{"backend_name": "kvfs", "module_path": "kvfs.engines.sglang",
    "class_name": "HiCacheKvfs", "interface_v1": 1, "path": "/mnt/kv", "capacity": "100GiB"}'
"""

try:
    import sglang  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"kvfs.engines.sglang needs sglang ({error.name} is not installed): pip install kvfs[sglang]"
    ) from error

from kvfs.engines.sglang.hicache_storage import HiCacheKvfs

__all__ = ["HiCacheKvfs"]
