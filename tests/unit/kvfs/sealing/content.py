"""Whether segments hold what should be in them: made once more by the host, of what a sequence's tokens read
as."""

import numpy as np

from kvfs.sealing.commands import derived_layout
from kvfs.sealing.derived_catalogue import SegmentRow
from kvfs.sealing.policy import DERIVES


def check_content(store, sequence, encode) -> int:
    """Raises AssertionError unless every segment of a sequence is of its tokens; how many tokens have a sketch.

    encode: (derive) to what makes pages of rows
    """
    num_sealed = 0
    for derive in DERIVES.values():
        stop = 0
        for segment in sequence.derived_segments(derive):
            assert segment.first_group >= stop and segment.num_groups >= 1
            stop = segment.first_group + segment.num_groups
            _check_segment(store, sequence, segment, encode(derive))
        group_tokens = sequence.model.geometry.group_tokens
        assert stop * group_tokens <= sequence.num_tokens
        num_sealed = stop * group_tokens if derive == DERIVES["sketch"] else num_sealed
    return num_sealed


def _check_segment(store, sequence, segment: SegmentRow, encode) -> None:
    geometry = sequence.model.geometry
    layout = derived_layout(sequence.model.layout, segment.derive, segment.num_groups)
    start = segment.first_group * geometry.group_tokens
    raw = store._namespace.read(segment.base_lba, layout.num_lbas).reshape(-1, layout.page_size)
    for layer in range(geometry.num_layers):
        keys, values = sequence.read(layer, start, start + layout.num_tokens)
        for head in range(geometry.num_kv_heads):
            rows = (np.ascontiguousarray(part[:, head], np.float32) for part in (keys, values))
            wanted = encode(*rows, layout)
            places = (
                (layout.index_lba(layer, head), layout.index_pages),
                (layout.refinement_lba(layer, head), layout.refinement_pages),
            )
            found = np.concatenate([raw[first : first + count] for first, count in places])
            assert np.array_equal(found, wanted), (
                f"{segment} of {sequence.name!r} is not of its tokens: layer {layer} KV head {head}"
            )
