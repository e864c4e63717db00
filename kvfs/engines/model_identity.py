"""Which model a stored sequence belongs to: geometry, and a fingerprint of weights and positions.

K/V of one model are meaningless to another of the same shape. The name under which a model is kept in the store
ends in a fingerprint of what shapes its keys and values, so that a sequence is never continued by the wrong
model.
"""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import torch

from kvfs.engines.errors import UnsupportedModel
from kvfs.errors import InvalidArgument
from kvfs.layout import KvGeometry

# Values of one parameter that enter the fingerprint: enough to tell fine-tunes apart, microseconds to read.
_SAMPLED_VALUES = 1024

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
TORCH_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}

# Layers that keep K and V of every token; other kinds (Mamba, convolutions) keep a state of their own.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def storage_dtype(kv_dtype):
    """Name of the dtype in which K/V of torch dtype `kv_dtype` are stored unless the user says otherwise."""
    return _DTYPE_NAMES.get(kv_dtype, "float32")


def geometry_of(module, queries, keys, dtype):
    """KvGeometry of the model that `module` (one attention layer) belongs to; raises UnsupportedModel.

    queries: [num_sequences, num_query_heads, num_queries, head_dim]
    keys:    [num_sequences, num_kv_heads, num_new_tokens, head_dim]
    dtype:   name of the storage dtype
    """
    config = getattr(module, "config", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if num_layers is None:
        raise UnsupportedModel(f"{type(module).__name__} has no config with num_hidden_layers")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type}: encoder-decoder models are not supported by kvfs")
    other_layers = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if other_layers:
        raise UnsupportedModel(
            f"{config.model_type}: layers without K/V of every token: {sorted(other_layers)}"
        )
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedModel(f"{config.model_type}: layers that share K/V are not supported by kvfs")
    try:
        return KvGeometry(num_layers, queries.shape[1], keys.shape[1], keys.shape[3], dtype)
    except InvalidArgument as error:
        raise UnsupportedModel(f"{config.model_type}: the drive cannot keep its K/V: {error}") from error


def model_name(module, geometry):
    """Name in the store, such as `llama-3f9c0a7be1d2-float16`.

    The fingerprint covers the model type, its rotary settings, the geometry and a sample of this attention
    layer's weights (layer 0 in practice): a fine-tune that leaves that layer alone has the same one.
    """
    config = module.config
    rotary = getattr(config, "rope_parameters", None)
    facts = [config.model_type, rotary, asdict(geometry), getattr(config, "sliding_window", None)]
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=6)
    for name, parameter in sorted(module.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(sample.float().cpu().numpy(), "<f4").tobytes())
    return f"{config.model_type}-{digest.hexdigest()}-{geometry.dtype}"
