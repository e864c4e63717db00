"""Which model a stored sequence belongs to: geometry, and a fingerprint of weights and positions.

K/V of one model are meaningless to another of the same shape. The name under which a model is kept in the store
ends in a fingerprint of what shapes its keys and values, so that a sequence is never continued by the wrong
model. A cache alone sees one attention layer; `enable` has the whole model, and tells more apart.
"""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import torch
import transformers

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
    if getattr(config, "num_hidden_layers", None) is None:
        raise UnsupportedModel(f"{type(module).__name__} has no config with num_hidden_layers")
    check_config(config)
    try:
        return KvGeometry(config.num_hidden_layers, queries.shape[1], keys.shape[1], keys.shape[3], dtype)
    except InvalidArgument as error:
        raise UnsupportedModel(f"{config.model_type}: the drive cannot keep its K/V: {error}") from error


def check_config(config):
    """Raises UnsupportedModel for what its config tells: other attention than over K/V of every token."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type}: encoder-decoder models are not supported by kvfs")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedModel(
            f"{config.model_type}: latent attention (DeepSeek MLA) is not supported by kvfs: its cache holds "
            "latents instead of K/V"
        )
    other_layers = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if other_layers:
        raise UnsupportedModel(
            f"{config.model_type}: layers without K/V of every token: {sorted(other_layers)}"
        )
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedModel(f"{config.model_type}: layers that share K/V are not supported by kvfs")


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


# -- of a whole model, as `enable` has it ----------------------------------------------------------------------

# Values of each parameter: a fine-tune changes nearly all of them, and a thousand parameters take milliseconds.
_SAMPLED_OF_EACH = 64

# What a config says beside what keys and values depend on; anything else that differs is another identity.
_NOT_OF_KV = {
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "problem_type",
    "id2label",
    "label2id",
    "tie_word_embeddings",
}


def whole_model_name(model, dtype):
    """Name in the store of a whole model with K/V in the storage dtype `dtype`, from samples of all weights."""
    samples = []
    digest = hashlib.blake2b(digest_size=10)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // _SAMPLED_OF_EACH)][:_SAMPLED_OF_EACH].float())
    devices = {sample.device for sample in samples}
    for device in sorted(devices, key=str):  # one transfer from each
        values = torch.cat([sample for sample in samples if sample.device == device])
        digest.update(np.ascontiguousarray(values.cpu().numpy(), "<f4").tobytes())
    return f"{_text_config(model).model_type}-{digest.hexdigest()}-{dtype}"


def identity_settings(model, tokenizer):
    """What keys and values depend on beside weights, storage dtype and ids, as `Sequence.publish` takes it.

    config: rotary settings, windows, soft caps, norms and the like; tokenizer: its vocabulary and rules, None
    where none was given; adapters: which are active, and how strongly.
    """
    config = {name: value for name, value in _text_config(model).to_dict().items() if name not in _NOT_OF_KV}
    settings = {
        "engine": f"transformers {transformers.__version__}",
        "config": _digest(json.dumps(config, sort_keys=True, default=str)),
        "compute_dtype": str(model.dtype).removeprefix("torch."),
    }
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer
    adapters = [
        (name, str(module._active_adapter), module._disable_adapters, str(getattr(module, "scaling", None)))
        for name, module in model.named_modules()
        if hasattr(module, "_disable_adapters")
    ]
    if adapters:
        settings["adapters"] = _digest(json.dumps(adapters))
    return settings


def tokenizer_digest(tokenizer):
    """Of the vocabulary, the merges and all else that makes ids of text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _digest(backend.to_str())
    return _digest(json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]))


def _text_config(model):
    return model.config.get_text_config(decoder=True)


def _digest(text):
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
