"""Which derived data a sparse command is told of, and what becomes of damaged one."""

import numpy as np

from kvfs.derived import DerivedSegment
from kvfs.sparse import Sparse
from spdk_glue.vendor_command import ANSWER_HEADER

MAX_SEGMENTS = 0xFFFF  # of a command; tokens of what is left out are read dense


def segments_of(
    sparse: Sparse | None, sequences, seen: list[tuple[int, int, int]], group_tokens: int
) -> list[list[DerivedSegment]]:
    """Of each sequence, in token order, what a command may use.

    seen: of each, the first token and the end of what any query sees, and how many tokens are on flash
    """
    if sparse is None:
        return [[] for _ in sequences]
    room = MAX_SEGMENTS
    found = []
    for sequence, (start, stop, num_spilled) in zip(sequences, seen, strict=True):
        first, last = start // group_tokens, -(-min(stop, num_spilled) // group_tokens)
        own = [
            segment
            for segment in sequence.derived_segments(sparse.derive)
            if first < segment.first_group + segment.num_groups <= num_spilled // group_tokens
            and segment.first_group < last
        ][:room]
        room -= len(own)
        found.append(own)
    return found


def give_up_damaged(answer: np.ndarray, sequences, segments: list[list[DerivedSegment]]) -> None:
    """Have its sequence let go of the first segment that an answer calls damaged; the next names the next."""
    header = answer[: ANSWER_HEADER.itemsize].view(ANSWER_HEADER)[0]
    if not header["damaged_segments"]:
        return
    place = int(header["first_damaged"])
    for sequence, own in zip(sequences, segments, strict=True):
        if place < len(own):
            sequence._drop_derived(own[place])
            return
        place -= len(own)
