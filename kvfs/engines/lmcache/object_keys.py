"""LMCache's keys as the keys of objects: what names the tokens, at most 64 bytes.

What the bytes depend on as well (model, dtype, layout) is the identity's, so that a key of another model is
known to be that.
"""

import json
import struct
from collections.abc import Callable
from hashlib import blake2b

from kvfs.errors import InvalidArgument

TEXT_BYTES = 16  # of the digest that stands for a text
NO_TEXT = bytes(TEXT_BYTES)
_L2_HEAD = struct.Struct("<QI16s")  # kv_rank, object_group_id, text of the salt; the chunk's hash follows
_IN_PROCESS_HEAD = struct.Struct("<Iq16s")  # worker, layer or WHOLE_CHUNK, tags; the chunk's hash follows
WHOLE_CHUNK = -1
MAX_HASH_BYTES = 64 - _L2_HEAD.size


def text_digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=TEXT_BYTES).digest()


def salt_text(salt: str) -> str:
    """As the directory keeps it."""
    return json.dumps({"salt": salt})


def l2_key(key) -> bytes:
    """Of an ObjectKey. Raises InvalidArgument."""
    salt = text_digest(salt_text(key.cache_salt)) if key.cache_salt else NO_TEXT
    return _with_hash(_L2_HEAD.pack(key.kv_rank, key.object_group_id, salt), key.chunk_hash)


def object_key(packed: bytes, model: str, salt_of: Callable[[bytes], str | None]):
    """The ObjectKey of `l2_key`; None if its salt is not known any more."""
    from lmcache.v1.distributed.api import ObjectKey

    kv_rank, group, digest = _L2_HEAD.unpack_from(packed)
    salt = "" if digest == NO_TEXT else salt_of(digest)
    return None if salt is None else ObjectKey(packed[_L2_HEAD.size :], model, kv_rank, group, salt)


def salt_digest(packed: bytes) -> bytes:
    return packed[_L2_HEAD.size - TEXT_BYTES : _L2_HEAD.size]


def in_process_key(key) -> bytes:
    """Of a CacheEngineKey or LayerCacheEngineKey. Raises InvalidArgument."""
    tags = text_digest(repr(key.tags)) if key.tags else NO_TEXT
    layer = getattr(key, "layer_id", WHOLE_CHUNK)
    chunk_hash = key.chunk_hash
    if isinstance(chunk_hash, int):
        chunk_hash = chunk_hash.to_bytes(chunk_hash.bit_length() // 8 + 1, "big", signed=True)
    return _with_hash(_IN_PROCESS_HEAD.pack(key.worker_id, layer, tags), chunk_hash)


def _with_hash(head: bytes, chunk_hash: bytes) -> bytes:
    if len(chunk_hash) > MAX_HASH_BYTES:
        raise InvalidArgument(f"a chunk's hash is at most {MAX_HASH_BYTES} bytes, not {len(chunk_hash)}")
    return head + chunk_hash
