"""What vLLM's KV bytes depend on beside the tokens: objects of another identity are misses, never wrong KV."""

import hashlib
import json
import os
from collections.abc import Callable

import torch
import vllm
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvfs.engines.weights_fingerprint import fingerprint

HASHES = ("sha256", "sha256_cbor")
ABOUT_FILES = ("_name_or_path", "_commit_hash", "transformers_version")  # of a configuration, not of the model


def attention_spec(vllm_config, kv_cache_config):
    """The one kind of layer that the engine has. Raises ValueError, saying what is not supported."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    groups = kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec if groups else None
    refused = {
        "platforms other than the CPU": not current_platform.is_cpu(),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        f"prefix_caching_hash_algo={cache.prefix_caching_hash_algo}, which collides (use sha256)": (
            cache.prefix_caching_hash_algo not in HASHES
        ),
        "KV scales that are computed as the engine goes": getattr(cache, "calculate_kv_scales", False),
        "models of several kinds of layers": len(groups) != 1,
        f"layers of {type(spec).__name__}": type(spec) not in (FullAttentionSpec, SlidingWindowSpec),
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"kvfs's connector does not support {what}")
    return spec


def instruction_set(vllm_config, spec) -> str:
    """That the CPU's kernels pack KV for."""
    cache = vllm_config.cache_config
    return _get_attn_isa(vllm_config.model_config.dtype, spec.block_size, spec.head_size, cache.cache_dtype)


def identity_of(vllm_config, kv_cache_config, spec, weights: str | None) -> dict[str, str | int]:
    """weights: what the user calls them, instead of a look at the files. Raises ValueError."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return {
        "engine": "vllm",
        "version": vllm.__version__,
        "weights": weights or _weights(vllm_config),
        "config": _digest(model.hf_config.to_dict()),
        "max_model_len": model.max_model_len if _depends_on_length(model) else 0,
        "quantization": str(model.quantization),
        "dtype": str(model.dtype),
        "cache_dtype": cache.cache_dtype,
        "block_tokens": spec.block_size,
        "layers": len(kv_cache_config.kv_cache_groups[0].layer_names),
        "kv_heads": model.get_total_num_kv_heads(),
        "head_dim": spec.head_size,
        "window": getattr(spec, "sliding_window", None) or 0,
        "backend": "CPU_ATTN",
        "instruction_set": instruction_set(vllm_config, spec),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "hash": cache.prefix_caching_hash_algo,
    }


def _digest(config: dict) -> str:
    told = {name: value for name, value in config.items() if name not in ABOUT_FILES}
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _depends_on_length(model) -> bool:
    """Some rotary embeddings choose their factors by the longest context that the engine is made for."""
    config = model.hf_text_config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type", kind.get("type", "default")) != "default" for kind in kinds)


def _weights(vllm_config) -> str:
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy":
        return "dummy"
    try:
        if os.path.exists(model.model):
            return fingerprint(model.model)
        from huggingface_hub import snapshot_download

        return fingerprint(
            snapshot_download(
                model.model, revision=model.revision, cache_dir=load.download_dir, local_files_only=True
            )
        )
    except (OSError, ValueError) as error:  # huggingface_hub: not in its cache
        raise ValueError(
            f"kvfs's connector does not see the weights of {model.model!r} ({error}): name them, in"
            ' kv_connector_extra_config={"weights": ...}'
        ) from error


def salts(vllm_config) -> Callable[[object], bytes | None]:
    """What a request's keys depend on beyond vLLM's hashes: its adapter's files, which may be trained again.

    None for a request that must not be cached: its adapter's files are not seen, or its images are known by the
    request's number (without prefix caching), which the next process gives to others.
    """
    is_caching = vllm_config.cache_config.enable_prefix_caching
    adapters: dict[str, bytes | None] = {}

    def salt_of(request) -> bytes | None:
        if request.mm_features and not is_caching:
            return None
        if request.lora_request is None:
            return b""
        path = request.lora_request.lora_path
        if getattr(request.lora_request, "load_inplace", False):
            adapters[path] = None  # other weights under a name that vLLM's hashes have seen
        if path not in adapters:
            try:
                adapters[path] = fingerprint(path).encode()
            except OSError:
                adapters[path] = None
        return adapters[path]

    return salt_of


def names(vllm_config) -> Callable[[object], tuple[str, str]]:
    """A request's tenant and model, for counters. The tenant's salt is a secret: it is known by its digest."""
    model = str(vllm_config.model_config.served_model_name)

    def names_of(request) -> tuple[str, str]:
        salt, adapter = request.cache_salt, request.lora_request
        tenant = "" if not salt else f"salt {hashlib.blake2b(salt.encode(), digest_size=4).hexdigest()}"
        return tenant, _printable(model if adapter is None else f"{model} + {adapter.lora_name}")

    return names_of


def _printable(name: str) -> str:
    """As far as a name in counters may be: it comes from whoever runs the engine."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)[-60:]
