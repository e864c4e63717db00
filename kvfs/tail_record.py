"""The tail record: tokens that fill no whole pages yet, as a flush stores them on blocks of their own.

Packed, [layer][K | V][token][kv_head][head_dim], from the first byte of the first block on.
"""

import numpy as np

from kvfs.layout import KvGeometry
from spdk_glue import dma


def new_buffer(geometry: KvGeometry, num_tokens: int, block_bytes: int) -> np.ndarray:
    """uint8: whole blocks for so many tokens."""
    return dma.allocate(-(-num_tokens * geometry.token_bytes // block_bytes) * block_bytes)


def view(geometry: KvGeometry, buffer: np.ndarray, num_tokens: int) -> np.ndarray:
    """[num_layers, 2, num_tokens, num_kv_heads, head_dim]: the record in a buffer."""
    shape = (geometry.num_layers, 2, num_tokens, geometry.num_kv_heads, geometry.head_dim)
    return buffer[: num_tokens * geometry.token_bytes].view(geometry.numpy_dtype).reshape(shape)
