"""What kvfs is compared with: K/V in memory, rounded in memory, or in a file that is read back."""

import os

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from kvfs.layout import default_group_tokens, is_quantized, row_dtype
from kvfs.token_rows import as_stored

PAGE_SIZE = 4096  # of the drive that the demo formats


class RoundedCache(DynamicCache):
    """In-memory K/V rounded to a storage dtype: the reference for what kvfs stores in that dtype."""

    def __init__(self, dtype):
        super().__init__()
        self._dtype = dtype

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """As DynamicCache, over rounded K/V."""
        keys, values = (t.to(self._dtype).to(t.dtype) for t in (key_states, value_states))
        return super().update(keys, values, layer_idx, *args, **kwargs)


class QuantizedCache(RoundedCache):
    """In-memory K/V as kvfs keeps them in a quantized dtype: rows in float16, whole groups of them coded.

    A prompt attends over its own rows before they are coded, as kvfs does it.
    """

    def __init__(self, dtype):
        """dtype: "int8" and so on."""
        super().__init__(getattr(torch, row_dtype(dtype)))
        self._dtype_on_flash = dtype
        self._num_coded = {}  # tokens, by layer

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """As DynamicCache, over K/V as they are stored."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        is_prefill = keys.shape[2] == key_states.shape[2]
        found = (keys.clone(), values.clone()) if is_prefill else (keys, values)
        start = self._num_coded.get(layer_idx, 0)
        group_tokens = default_group_tokens(self._dtype_on_flash, keys.shape[3], PAGE_SIZE)
        while start + group_tokens <= keys.shape[2]:
            for tensor in (keys, values):
                group = tensor[0, :, start : start + group_tokens]
                group.copy_(torch.from_numpy(as_stored(group.numpy(), self._dtype_on_flash, PAGE_SIZE)))
            start += group_tokens
        self._num_coded[layer_idx] = start
        return found


def rounded_cache(dtype):
    """An empty cache in memory that gives back what kvfs would."""
    return QuantizedCache(dtype) if is_quantized(dtype) else RoundedCache(getattr(torch, dtype))


class FileLayer(CacheLayerMixin):
    """One layer's K/V of one sequence in a preallocated file, read back whole at each step.

    A layer's K and V are contiguous in the file, [capacity_tokens, num_kv_heads, head_dim] each, so a step
    costs one large read for each. Reads go through the page cache: this rival never waits for a disk.
    """

    is_croppable = False
    is_sliding = False

    def __init__(self, file_descriptor, layer, capacity_tokens, dtype):
        super().__init__()
        self._fd = file_descriptor
        self._layer = layer
        self._capacity_tokens = capacity_tokens
        self._dtype = dtype
        self.num_tokens = 0
        self.bytes_read = 0
        self.bytes_written = 0

    def lazy_initialization(self, key_states, value_states):
        """Place the layer in the file and allocate the buffers that reads go to."""
        _, num_kv_heads, _, head_dim = key_states.shape
        shape = (self._capacity_tokens, num_kv_heads, head_dim)
        self._buffers = [torch.empty(shape, dtype=self._dtype) for _ in range(2)]
        self._token_bytes = num_kv_heads * head_dim * self._dtype.itemsize
        region = self._capacity_tokens * self._token_bytes
        self._offsets = [(2 * self._layer + part) * region for part in range(2)]
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, self._offsets[0], 2 * region)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Write the new tokens' K/V, read back all of them; a prefill has nothing to read back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.num_tokens
        self.num_tokens += key_states.shape[2]
        return tuple(self._store(part, past, fresh) for part, fresh in enumerate((key_states, value_states)))

    def _store(self, part, past, fresh):
        stored = fresh[0].transpose(0, 1).to(self._dtype).contiguous()
        written = os.pwrite(self._fd, _bytes_of(stored), self._offsets[part] + past * self._token_bytes)
        self.bytes_written += written
        if past == 0:
            return stored.transpose(0, 1).unsqueeze(0).to(fresh.dtype)
        back = self._buffers[part][: self.num_tokens]
        done = os.preadv(self._fd, [_bytes_of(back)], self._offsets[part])
        if done != self.num_tokens * self._token_bytes:
            raise OSError(f"offloaded layer {self._layer}: read {done} bytes of {self.num_tokens} tokens")
        self.bytes_read += done
        return back.transpose(0, 1).unsqueeze(0).to(fresh.dtype)

    def get_mask_sizes(self, query_length):
        """(kv_length, kv_offset)"""
        return self.num_tokens + query_length, 0

    def get_seq_length(self):
        """Tokens in the file."""
        return self.num_tokens

    def get_max_length(self):
        """Tokens the file has room for."""
        return self._capacity_tokens


def _bytes_of(tensor):
    """Writable memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")


class FileCache(Cache):
    """Offloading: all layers' K/V in one file, attention in torch over what is read back."""

    def __init__(self, path, num_layers, capacity_tokens, dtype):
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by close()
        descriptor = self._file.fileno()
        super().__init__(layers=[FileLayer(descriptor, n, capacity_tokens, dtype) for n in range(num_layers)])

    def link_bytes(self):
        """Bytes written to and read back from the file so far."""
        return sum(layer.bytes_read + layer.bytes_written for layer in self.layers)

    def close(self):
        """Close the file; its directory is the caller's to clean."""
        self._file.close()
