"""vLLM's CPU attention with decoding on the drive. Experimental.

    kvfs.engines.vllm.enable_drive_attention("drive.kvfs")      # or KVFS_DRIVE_ATTENTION=drive.kvfs
    llm = LLM(model, enable_prefix_caching=False)

Prompts are computed as usual, from vLLM's own pool of blocks; what they leave goes to the drive too, layer by
layer. A request that decodes asks the drive, whatever else is in the batch. One that the drive does not have
(it was full) is computed from the pool, so tokens come out all the same.
"""

import atexit

import numpy as np
import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from kvfs.engines import shared_store
from kvfs.engines.vllm import plugin
from kvfs.engines.vllm.cpus import unbound
from kvfs.engines.vllm.drive_sequences import DriveSequences, Row

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class DriveAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls():
        return DriveAttention


class DriveAttention(CPUAttentionBackendImpl):
    """Of one layer. Raises ValueError for what is not supported."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._config = get_current_vllm_config()
        check_supported(self._config, self)
        self._drive: EngineDrive | None = None

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        """See CPUAttentionBackendImpl: [num_tokens, heads, head_size], the batch's rows one after another."""
        if attn_metadata is None:  # vLLM warms up
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if attn_metadata.dynamic_causal is not None or not attn_metadata.causal:
            raise ValueError("attention on the drive is causal")
        if self._drive is None:
            self._drive = EngineDrive.of(self._config, self)
        starts = attn_metadata.query_start_loc.tolist()
        lengths = attn_metadata.seq_lens.tolist()
        first_blocks = attn_metadata.block_table[:, 0].tolist()
        index = extract_layer_index(layer.layer_name)
        decoding, sequences = [], []
        for number, length in enumerate(lengths):
            start, stop = starts[number : number + 2]
            row = Row(first_blocks[number], length - (stop - start), stop - start)
            sequence = self._drive.sequences.append(index, row, key[start:stop], value[start:stop])
            if sequence is not None and row.num_before and row.num_new == 1:
                decoding.append(start)
                sequences.append(sequence)
        if len(decoding) < len(lengths):
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if decoding:
            output[decoding] = self._attend(index, query[decoding], sequences).to(output.dtype)
        return output

    def _attend(self, index: int, queries: torch.Tensor, sequences: list) -> torch.Tensor:
        """[num_sequences, num_heads, head_size], a query of each sequence."""
        out, _ = self._drive.store.attend(
            index,
            queries.unsqueeze(1),
            sequences,
            scale=self.scale,
            window=self.sliding_window if self.sliding_window > 0 else None,
            softcap=self.logits_soft_cap or None,
            alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes.numpy(),
            sinks=None if self.sinks is None else self.sinks.float().numpy(),
        )
        return torch.from_numpy(np.ascontiguousarray(out[:, 0]))


def check_supported(config, layer: CPUAttentionBackendImpl) -> None:
    """Raises ValueError, in one line."""
    parallel = config.parallel_config
    refused = {
        "prefix caching (set enable_prefix_caching=False)": config.cache_config.enable_prefix_caching,
        "several workers": parallel.world_size > 1,
        "a KV connector beside it": config.kv_transfer_config is not None,
        "speculative decoding": config.speculative_config is not None,
        f"attention of kind {layer.attn_type!r}": layer.attn_type != AttentionType.DECODER,
        "layers that share KV": layer.kv_sharing_target_layer_name is not None,
        "a quantized KV cache": layer.is_fp8_kv_cache,
        f"dtype {config.model_config.dtype}": config.model_config.dtype not in DTYPES,
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"kvfs's attention on the drive does not support {what}")


class EngineDrive:
    """What the layers of one engine share."""

    _current: "EngineDrive | None" = None

    def __init__(self, config, layer: CPUAttentionBackendImpl):
        self.config = config
        with unbound():
            self.store = shared_store.acquire(**plugin.options())
        name = "vllm-" + "-".join(
            str(part)
            for part in (
                layer.num_heads,
                layer.num_kv_heads,
                layer.head_size,
                DTYPES[config.model_config.dtype],
            )
        )
        num_layers = config.model_config.get_total_num_hidden_layers()
        model = self.store.add_model(
            f"{name}-{num_layers}",
            num_layers=num_layers,
            num_query_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_size,
            dtype=DTYPES[config.model_config.dtype],
        )
        self.sequences = DriveSequences(self.store, model)

    @classmethod
    def of(cls, config, layer: CPUAttentionBackendImpl) -> "EngineDrive":
        if cls._current is None or cls._current.config is not config:
            if cls._current is not None:
                cls._current.close()
            cls._current = cls(config, layer)
        return cls._current

    def close(self) -> None:
        self.sequences.close()
        shared_store.release(self.store)


@atexit.register
def _close() -> None:
    if EngineDrive._current is not None:
        EngineDrive._current.close()
        EngineDrive._current = None
