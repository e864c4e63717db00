"""kvfs under vLLM: a KV connector (`connector`), and attention on the drive (`drive_attention`).

The connector needs no import of the user's: vLLM finds it by its configuration,

    KVTransferConfig(
        kv_connector="KvfsConnector",
        kv_connector_module_path="kvfs.engines.vllm.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"path": "drive.kvfs"},
    )
"""

from kvfs.engines.vllm import beside_numba, cpus  # cpus: as early as can be

beside_numba.prepare()


def enable_drive_attention(path, **options) -> None:
    """Decode on the drive at `path` in engines that this process makes from here on; see drive_attention."""
    from kvfs.engines.vllm import plugin

    plugin.enable(path, **options)


__all__ = ["cpus", "enable_drive_attention"]
