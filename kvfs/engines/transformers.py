"""Transformers on kvfs: K/V on the drive, decode attention in the drive.

    import kvfs
    from kvfs.engines.transformers import KvfsCache

    with kvfs.open("drive.kvfs") as store:
        model.generate(ids, past_key_values=KvfsCache(store, "chat-42"))

Importing this module registers the attention implementation "kvfs" and teaches "sdpa", the default of most
models, to recognise K/V that are in a kvfs store; everything else it computes as before. Models whose default
is eager (gpt-oss) need `model.set_attn_implementation("kvfs")`. Any other implementation refuses a KvfsCache
with one clear error.
"""

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"kvfs.engines.transformers needs torch and transformers ({error.name} is not installed): "
        "pip install torch transformers"
    ) from error

from kvfs.engines.errors import CacheMismatch, EngineError, UnsupportedMask, UnsupportedModel, WrongAttention
from kvfs.engines.transformers_attention import register
from kvfs.engines.transformers_cache import KvfsCache

__all__ = ["CacheMismatch", "EngineError", "KvfsCache", "UnsupportedMask", "UnsupportedModel", "WrongAttention"]

register()
