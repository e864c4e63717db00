"""Reading whole tokens from flash: rows of all KV heads, from head-major groups to token-major arrays."""

from collections.abc import Sequence

import numpy as np

from accel.quantized_pages import decode_pages, encode_pages
from kvfs import group_image
from kvfs.layout import GroupLayout
from kvfs.metadata import GroupRow
from spdk_glue import dma
from spdk_glue.namespace import Namespace
from spdk_glue.vendor_command import DTYPE_OF_NAME, tokens_per_page

BATCH_BYTES = 8 << 20  # read by one doorbell: bounded memory


def read(
    namespace: Namespace,
    layout: GroupLayout,
    groups: Sequence[GroupRow],
    layer: int,
    start: int,
    stop: int,
    keys: np.ndarray,
    values: np.ndarray,
) -> None:
    """Fill keys and values [num_tokens, num_kv_heads, head_dim] with tokens [start, stop), all on flash."""
    group_tokens = layout.geometry.group_tokens
    num_groups = -(-stop // group_tokens)
    assert len(groups) >= num_groups, f"{len(groups)} groups for {stop} tokens"  # or memory as it was
    groups = groups[:num_groups]
    batch = max(1, BATCH_BYTES // layout.image_bytes)
    for first in range(start // group_tokens, len(groups), batch):
        bases = [g.base_lba + layer * layout.layer_lbas for g in groups[first : first + batch]]
        images = dma.allocate(len(bases) * layout.image_bytes).reshape(len(bases), *layout.image_shape)
        namespace.read_scattered(list(zip(bases, images, strict=True)))
        for group, image in enumerate(images, first):
            low, high = max(start, group * group_tokens), min(stop, (group + 1) * group_tokens)
            part = slice(low - start, high - start)
            first_row = low - group * group_tokens
            if layout.geometry.is_quantized:
                group_image.decode(layout, image, first_row, keys[part], values[part])
            else:
                group_image.unpack(layout, image, first_row, keys[part], values[part])


def as_stored(rows: np.ndarray, dtype: str, page_size: int) -> np.ndarray:
    """float16 [num_runs, num_rows, head_dim]: what comes back of rows of a quantized dtype.

    Each run begins on a page of its own, as a head does in a group.
    """
    num_runs, num_rows, head_dim = rows.shape
    code = DTYPE_OF_NAME[dtype]
    num_pages = -(-num_rows // tokens_per_page(page_size, head_dim, code))
    pages = np.zeros((num_runs, num_pages, page_size), np.uint8)
    # rows without pages: one image page that holds them all
    images = np.ascontiguousarray(rows, np.float16).view(np.uint8).reshape(num_runs, 1, -1)
    encode_pages(images, num_rows, 0, num_rows, code, head_dim, pages)
    back = decode_pages(pages.reshape(-1, page_size), code, head_dim)
    return back.reshape(num_runs, -1, head_dim)[:, :num_rows]
