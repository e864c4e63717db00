"""The head-major layout of KV on logical blocks: arithmetic only.

A token group of `group_tokens` tokens is one allocation of `group_lbas` consecutive blocks, ordered
`[layer][kv_head][K | V][page]`. A page holds `tokens_per_page` rows `[head_dim]` of one head from byte 0;
the rest is slack, or scales if rows are quantized. Tokens that are not on flash yet wait in pages of the same
order, of rows as users gave them. One layer's share of a group is `layer_lbas` consecutive blocks: the unit of
spilling.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import ml_dtypes
import numpy as np

from kvfs.errors import InvalidArgument
from spdk_glue import vendor_command
from spdk_glue.vendor_command import DTYPE_OF_NAME, INT4_CHANNELS, QUANTIZED, KvDtype

DEFAULT_GROUP_TOKENS = 256
# one head's K (or V) in a group, as long as 256 tokens in float16 at head_dim 128
QUANTIZED_RUN_BYTES = 64 << 10
QUANTIZED_ROW_DTYPE = "float16"  # finer than any code, and half of float32
MAX_GROUP_SIZE = 16
NUMPY_DTYPE = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def is_quantized(dtype: str) -> bool:
    """Whether pages of a storage dtype hold codes and scales."""
    return DTYPE_OF_NAME.get(dtype) in QUANTIZED


def row_dtype(dtype: str) -> str:
    """In which rows of a storage dtype are taken in and given back."""
    return QUANTIZED_ROW_DTYPE if is_quantized(dtype) else dtype


@dataclass(frozen=True)
class KvGeometry:
    """Shape of one model's KV cache. Raises InvalidArgument naming the field at fault."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float16"
    group_tokens: int = DEFAULT_GROUP_TOKENS

    def __post_init__(self):
        for name in ("num_layers", "num_query_heads", "num_kv_heads", "head_dim", "group_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidArgument(f"{name} is a positive integer, not {value!r}")
        if self.num_layers > 1 << 16 or self.num_query_heads > 1 << 16:
            raise InvalidArgument("num_layers and num_query_heads are at most 65536")
        if self.num_query_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"num_query_heads ({self.num_query_heads}) is a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.gqa_group_size > MAX_GROUP_SIZE:
            raise InvalidArgument(
                f"at most {MAX_GROUP_SIZE} query heads share a KV head, not {self.gqa_group_size}"
            )
        if not 32 <= self.head_dim <= 256 or self.head_dim % 8:
            raise InvalidArgument(f"head_dim is a multiple of 8 from 32 to 256, not {self.head_dim}")
        if self.dtype not in DTYPE_OF_NAME:
            raise InvalidArgument(f"dtype is one of {', '.join(DTYPE_OF_NAME)}, not {self.dtype!r}")
        if self.dtype == KvDtype.INT4.name.lower() and self.head_dim % INT4_CHANNELS:
            raise InvalidArgument(f"head_dim of int4 is a multiple of {INT4_CHANNELS}, not {self.head_dim}")
        if self.group_tokens > 1 << 16:
            raise InvalidArgument(f"group_tokens is at most 65536, not {self.group_tokens}")

    def check_layer(self, layer: int) -> int:
        """The layer as an int. Raises InvalidArgument for one that the model does not have."""
        if not isinstance(layer, (int, np.integer)) or not 0 <= layer < self.num_layers:
            raise InvalidArgument(f"layer is 0 to {self.num_layers - 1}, not {layer!r}")
        return int(layer)

    @property
    def gqa_group_size(self) -> int:
        return self.num_query_heads // self.num_kv_heads

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.dtype)

    @property
    def row_dtype(self) -> str:
        """Of rows in memory: taken in, read back, not on flash yet."""
        return row_dtype(self.dtype)

    @property
    def numpy_dtype(self) -> np.dtype:
        """Of rows in memory."""
        return NUMPY_DTYPE[self.row_dtype]

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers, as rows in memory."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.numpy_dtype.itemsize


@dataclass(frozen=True)
class GroupLayout:
    """A model's geometry on a drive of `page_size` blocks."""

    geometry: KvGeometry
    page_size: int

    @cached_property
    def tokens_per_page(self) -> int:
        return vendor_command.tokens_per_page(
            self.page_size, self.geometry.head_dim, DTYPE_OF_NAME[self.geometry.dtype]
        )

    @cached_property
    def pages_per_head(self) -> int:
        """Pages of one head's K (or V) in one group."""
        return -(-self.geometry.group_tokens // self.tokens_per_page)

    @cached_property
    def layer_lbas(self) -> int:
        return self.geometry.num_kv_heads * 2 * self.pages_per_head

    @cached_property
    def group_lbas(self) -> int:
        return self.geometry.num_layers * self.layer_lbas

    @cached_property
    def image_shape(self) -> tuple[int, int, int, int]:
        """uint8 [num_kv_heads, K | V, pages_per_head, page_size]: one layer's share of a group."""
        return (self.geometry.num_kv_heads, 2, self.pages_per_head, self.page_size)

    @cached_property
    def image_bytes(self) -> int:
        return self.layer_lbas * self.page_size

    @cached_property
    def row_bytes(self) -> int:
        """Of a row in memory."""
        return self.geometry.head_dim * self.geometry.numpy_dtype.itemsize

    @cached_property
    def in_memory(self) -> "GroupLayout":
        """The layout of groups that are not on flash yet."""
        if not self.geometry.is_quantized:
            return self
        return GroupLayout(replace(self.geometry, dtype=self.geometry.row_dtype), self.page_size)


def default_group_tokens(dtype: str, head_dim: int, page_size: int) -> int:
    """Tokens per group unless the user says otherwise: whole pages, and runs that are worth a request."""
    if not is_quantized(dtype):
        return DEFAULT_GROUP_TOKENS
    per_page = vendor_command.tokens_per_page(page_size, head_dim, DTYPE_OF_NAME[dtype])
    return per_page * max(1, QUANTIZED_RUN_BYTES // page_size)
