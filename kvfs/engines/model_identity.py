"""Which model a stored sequence belongs to: geometry, and a fingerprint of weights and positions.

K/V of one model are meaningless to another of the same shape. The name under which a model is kept in the store ends
in a fingerprint of what shapes its keys and values, so that a sequence is never continued by the wrong model.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch

from kvfs.engines.errors import UnsupportedModel

# The drive's attention unit (DESIGN.md): what a page layout and a worker exist for.
HEAD_DIM_LIMITS = (32, 256)
GQA_GROUP_LIMITS = (1, 16)

# Values of one parameter that enter the fingerprint: enough to tell fine-tunes apart, microseconds to read.
_SAMPLED_VALUES = 1024

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
TORCH_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Geometry:
    """The numbers a store needs to keep a model's K/V; the fields are `Store.add_model`'s arguments."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


def storage_dtype(kv_dtype):
    """Name of the dtype in which K/V of torch dtype `kv_dtype` are stored unless the user says otherwise."""
    return _DTYPE_NAMES.get(kv_dtype, "float32")


def geometry_of(module, queries, keys):
    """Geometry of the model that `module` (one attention layer) belongs to; raises UnsupportedModel.

    queries: [num_sequences, num_query_heads, num_queries, head_dim]
    keys:    [num_sequences, num_kv_heads, num_new_tokens, head_dim]
    """
    config = getattr(module, "config", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if num_layers is None:
        raise UnsupportedModel(f"{type(module).__name__} has no config with num_hidden_layers")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type}: encoder-decoder models are not supported by kvfs")
    layer_types = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYER_TYPES
    if layer_types:
        raise UnsupportedModel(f"{config.model_type}: layers without K/V of every token: {sorted(layer_types)}")
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedModel(f"{config.model_type}: layers that share K/V are not supported by kvfs")
    geometry = Geometry(num_layers, queries.shape[1], keys.shape[1], keys.shape[3])
    check_geometry(geometry)
    return geometry


_ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def check_geometry(geometry):
    """Raise UnsupportedModel, with the reason, for head sizes and groups that the drive does not compute."""
    low, high = HEAD_DIM_LIMITS
    if not low <= geometry.head_dim <= high:
        raise UnsupportedModel(f"head_dim {geometry.head_dim}: kvfs supports {low} to {high}")
    group, rest = divmod(geometry.num_query_heads, geometry.num_kv_heads)
    low, high = GQA_GROUP_LIMITS
    if rest or not low <= group <= high:
        raise UnsupportedModel(
            f"{geometry.num_query_heads} query heads over {geometry.num_kv_heads} KV heads: "
            f"kvfs supports {low} to {high} query heads per KV head, all alike"
        )


def model_name(module, geometry, dtype):
    """Name in the store, such as `llama-3f9c0a7be1d2-float16`.

    The fingerprint covers the model type, its rotary settings, the geometry and a sample of this attention layer's
    weights (layer 0 in practice): a fine-tune that leaves that layer alone has the same one.
    """
    config = module.config
    rotary = getattr(config, "rope_parameters", None)
    facts = [config.model_type, rotary, vars(geometry), getattr(config, "sliding_window", None)]
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=6)
    for name, parameter in sorted(module.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(sample.float().cpu().numpy(), "<f4").tobytes())
    return f"{config.model_type}-{digest.hexdigest()}-{dtype}"
