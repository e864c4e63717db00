"""Switching attention on the drive on, in this process and in those that vLLM starts from it."""

import json
import os

from kvfs.engines.vllm import beside_numba

VARIABLE = "KVFS_DRIVE_ATTENTION"  # the drive's path, or JSON of it and the options of shared_store.acquire
BACKEND = "kvfs.engines.vllm.drive_attention.DriveAttentionBackend"


def enable(path, **options) -> None:
    """See kvfs.engines.vllm.enable_drive_attention."""
    os.environ[VARIABLE] = json.dumps({"path": os.fspath(path), **options})
    register()


def register() -> None:
    """vLLM calls this in each of its processes (entry point vllm.general_plugins)."""
    beside_numba.prepare()
    if VARIABLE not in os.environ:
        return
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    if hasattr(selector, "_cached_get_attn_backend"):
        selector._cached_get_attn_backend.cache_clear()  # an engine of this process may have asked before


def options() -> dict:
    text = os.environ[VARIABLE]
    return json.loads(text) if text.lstrip().startswith("{") else {"path": text}
