"""kvfs as LMCache's storage: an L2 adapter of its server, and a storage plug-in of the engine's process.

lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "kvfs.engines.lmcache",
    "class_name": "KvfsL2Adapter", "adapter_params": {"path": "/data/kv.kvfs", "capacity_bytes": "64GiB"}}'

storage_plugins: ["kvfs"]
extra_config:
    storage_plugin.kvfs.module_path: kvfs.engines.lmcache
    storage_plugin.kvfs.class_name: KvfsStoragePlugin
    kvfs.path: /data/kv.kvfs
"""

from kvfs.engines.lmcache.adapter_config import KvfsL2AdapterConfig
from kvfs.engines.lmcache.l2_adapter import KvfsL2Adapter
from kvfs.engines.lmcache.storage_plugin import KvfsStoragePlugin

__all__ = ["KvfsL2Adapter", "KvfsL2AdapterConfig", "KvfsStoragePlugin"]
