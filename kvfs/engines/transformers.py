"""Transformers on kvfs: K/V on the drive, decode attention in the drive.

    import kvfs
    from kvfs.engines.transformers import enable

    with kvfs.open("drive.kvfs") as store:
        enable(model, store, session="chat-42", tokenizer=tokenizer)
        model.generate(**inputs)    # computes only what no session has stored before

One conversation without a look at others, and nothing changed on the model:
`model.generate(ids, past_key_values=KvfsCache(store, "chat-42"))`.

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

from kvfs.engines.errors import (
    CacheMismatch,
    EngineError,
    UnsupportedMask,
    UnsupportedModel,
    UnsupportedOption,
    WrongAttention,
)
from kvfs.engines.transformers_attention import register
from kvfs.engines.transformers_cache import KvfsCache
from kvfs.engines.transformers_session import Reuse, Session, disable, enable
from kvfs.engines.x_cache.cache import XCache

__all__ = [
    "CacheMismatch",
    "EngineError",
    "KvfsCache",
    "Reuse",
    "Session",
    "UnsupportedMask",
    "UnsupportedModel",
    "UnsupportedOption",
    "WrongAttention",
    "XCache",
    "disable",
    "enable",
]

register()
