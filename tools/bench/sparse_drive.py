"""The same pasts on a kvfs drive: each query one command, as in decoding, pages counted by the drive."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import kvfs
from kvfs.sparse import PageCounts
from kvfs_bench.sparse_model import Past
from kvfs_bench.sparse_schemes import ELEMENT_BYTES, PAGE_SIZE, PagesRead

SEALED = ("sketch", "channel_major_keys")
DRIVE_BYTES = 64 << 20  # beside what is stored
CACHE_BYTES = 1 << 30


class OnDrive:
    """A PastAttention. options: of `Store.attend`, what makes it sparse."""

    def __init__(self, store, sequence, past: Past, **options):
        self._store, self._sequence, self._options = store, sequence, options
        self.pages = PagesRead()
        num_kv_heads, num_tokens, head_dim = past.keys[0].shape
        page_tokens = PAGE_SIZE // (ELEMENT_BYTES * head_dim)
        self._dense_pages = 2 * num_kv_heads * -(-num_tokens // page_tokens)

    def attend(self, layer: int, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = queries.flatten(1, 2).numpy()  # [num_queries, num_query_heads, head_dim]
        counts = PageCounts()
        parts = [
            self._store.attend(
                layer,
                row[None, None],
                self._sequence,
                causal=False,
                scale=1.0,
                exact_if_cached=False,  # the cache has all of it
                counts=counts,
                **self._options,
            )
            for row in rows
        ]
        self.pages.read += counts.num_pages
        self.pages.dense += self._dense_pages * len(rows)
        out, lse = (np.concatenate([part[which][0] for part in parts]) for which in (0, 1))
        return torch.from_numpy(out).view(queries.shape), torch.from_numpy(lse).view(queries.shape[:-1])


@contextmanager
def stored(folder: Path, pasts: list[Past], group_size: int) -> Iterator[tuple]:
    """(store, a sealed sequence for each past), on a drive in `folder` that is removed in the end.

    The drive's cache holds all of it: what is counted are pages, wherever they come from.
    """
    num_kv_heads, _, head_dim = pasts[0].keys[0].shape
    kv_bytes = sum(2 * ELEMENT_BYTES * part.numel() for past in pasts for part in past.keys)
    path = folder / "sparse.kvfs"
    kvfs.format(path, DRIVE_BYTES + 3 * kv_bytes)
    try:
        with kvfs.open(path, cache_bytes=CACHE_BYTES) as store:
            model = store.add_model(
                "sparse",
                num_layers=pasts[0].num_layers,
                num_query_heads=num_kv_heads * group_size,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype="float16",
            )
            sequences = []
            for number, past in enumerate(pasts):
                sequence = store.create_sequence(model, str(number))
                for layer, tensors in enumerate(zip(past.keys, past.values, strict=True)):
                    keys, values = (tensor.transpose(0, 1).half().contiguous().numpy() for tensor in tensors)
                    sequence.append(layer, keys, values)
                sequence.flush()
                for derive in SEALED:
                    sequence.seal(derive)
                sequences.append(sequence)
            yield store, sequences
    finally:
        path.unlink()
