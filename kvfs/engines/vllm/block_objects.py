"""One KV head of one block, in all layers, is one object.

So whoever has other heads of the model (another tensor-parallel size) finds its own: keys end in the head's
number in the whole model. vLLM packs what is in a block for the CPU's instruction set, each head for itself:
these are bytes here, and the identity of the cache says how they are packed.
"""

import mmap
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NULL_BLOCK = 0  # of vLLM's pool: stands where a sliding window needs no block


class HeadShare(NamedTuple):
    """The KV heads of one tensor-parallel rank. is_first: of the ranks that have the same ones."""

    first: int
    count: int
    is_first: bool

    @classmethod
    def of_rank(cls, rank: int, num_ranks: int, num_heads: int) -> "HeadShare":
        """Raises ValueError if they cannot be shared out evenly."""
        if num_heads % num_ranks == 0:
            count = num_heads // num_ranks
            return cls(rank * count, count, True)
        if num_ranks % num_heads == 0:
            ranks_per_head = num_ranks // num_heads
            return cls(rank // ranks_per_head, 1, rank % ranks_per_head == 0)
        raise ValueError(f"{num_heads} KV heads do not go evenly into {num_ranks} ranks")


def head_keys(block_keys: Sequence[bytes], first: int, count: int) -> list[bytes]:
    """Of each block in turn, one key for each of its heads."""
    suffixes = [struct.pack("<H", head) for head in range(first, first + count)]
    return [key + suffix for key in block_keys for suffix in suffixes]


class BlockPool:
    """vLLM's pool of blocks, as bytes.

    layers: uint8 views [num_blocks, num_heads, tokens, bytes of a token's key and value], one for each layer
    """

    def __init__(self, layers: Sequence[np.ndarray]):
        self._layers = list(layers)
        shapes = {layer.shape for layer in self._layers}
        if len(shapes) != 1:
            raise ValueError(f"layers whose blocks differ are not supported: {sorted(shapes)}")
        self.num_blocks, self.num_heads, self._tokens, self._token_bytes = shapes.pop()
        self.object_bytes = len(self._layers) * self._tokens * self._token_bytes
        self.block_bytes = self.num_heads * self.object_bytes

    def staging(self, num_blocks: int) -> np.ndarray:
        """Memory for the objects of so many blocks, on a page boundary: the drive reads and writes it directly.

        uint8 [num_blocks, num_heads, num_layers, tokens, bytes of a token]
        """
        shape = (num_blocks, self.num_heads, len(self._layers), self._tokens, self._token_bytes)
        return np.frombuffer(mmap.mmap(-1, num_blocks * self.block_bytes), np.uint8).reshape(shape)

    def copy_out(self, block_ids: Sequence[int], staged: np.ndarray) -> None:
        """From the pool to staging memory."""
        for layer, blocks in enumerate(self._layers):
            for into, block_id in zip(staged, block_ids, strict=True):
                into[:, layer] = blocks[block_id]

    def copy_in(self, block_ids: Sequence[int], staged: np.ndarray) -> None:
        """From staging memory to the pool."""
        for layer, blocks in enumerate(self._layers):
            for source, block_id in zip(staged, block_ids, strict=True):
                blocks[block_id] = source[:, layer]


def objects_of(staged: np.ndarray) -> list[np.ndarray]:
    """The buffers of staged blocks, in the order of head_keys."""
    return list(staged.reshape(staged.shape[0] * staged.shape[1], -1))
