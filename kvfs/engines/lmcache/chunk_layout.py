"""What a chunk in LMCache's memory looks like: shapes, dtypes and format, from how many bytes it has.

kvfs keeps bytes alone. In process LMCache asks for an object it has no memory for yet, so that its layout has
to come from the engine's configuration; chunks that look otherwise are not stored.
"""

import math

import torch
from lmcache.v1.memory_management import MemoryFormat

from kvfs.engines.lmcache.identity import layout_of


class ChunkLayout:
    """config: LMCacheEngineConfig; metadata: LMCacheMetadata."""

    def __init__(self, config, metadata):
        self._metadata = metadata
        self._is_blending = bool(getattr(config, "enable_blending", False))
        self.is_layerwise = bool(config.use_layerwise)

    @property
    def format(self) -> MemoryFormat:
        if self._metadata.use_mla:
            return MemoryFormat.KV_MLA_FMT
        if not self.is_layerwise:
            return MemoryFormat.KV_2LTD
        return MemoryFormat.KV_2TD if self._is_blending else MemoryFormat.KV_T2D

    def shapes(self, num_tokens: int) -> list[torch.Size]:
        """Of a chunk, or of one layer of it."""
        if not self.is_layerwise:
            return [torch.Size(shape) for shape in self._metadata.get_shapes(num_tokens)]
        *_, num_heads, head_dim = self._metadata.kv_shape
        if self._metadata.use_mla:
            return [torch.Size([num_tokens, num_heads * head_dim])]
        shape = [2, num_tokens] if self._is_blending else [num_tokens, 2]
        return [torch.Size([*shape, num_heads * head_dim])]

    def dtypes(self) -> list[torch.dtype]:
        return [self._metadata.kv_dtype] if self.is_layerwise else list(self._metadata.get_dtypes())

    def num_tokens(self, num_bytes: int) -> int | None:
        """None: no chunk of this engine has so many bytes."""
        token_bytes = sum(
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(self.shapes(1), self.dtypes(), strict=True)
        )
        num_tokens, rest = divmod(num_bytes, token_bytes)
        return num_tokens if num_tokens and not rest else None

    def is_of(self, chunk) -> bool:
        """Whether this is how a MemoryObj will be loaded again."""
        num_tokens = self.num_tokens(chunk.get_size())
        if num_tokens is None or chunk.metadata.fmt != self.format:
            return False
        return layout_of(chunk) == (self.shapes(num_tokens), self.dtypes())

    def facts(self) -> dict:
        """For the identity: what scheduler and workers know alike."""
        metadata = self._metadata
        return {
            "model": metadata.model_name,
            "world_size": metadata.world_size,
            "dtypes": str(metadata.kv_dtype).removeprefix("torch."),
            "shapes": "x".join(map(str, metadata.kv_shape)),
            "format": self.format.name,
        }
