"""One attention call, cut into what each drive does of it."""

from dataclasses import dataclass

from kvfs.drive_set.member import Member


@dataclass
class Share:
    """parts: of the sequences at `items` (an index of the batch), with these query heads; num_bytes: of keys
    and values that the drive reads for it."""

    member: Member
    items: list[int] | slice
    query_heads: slice
    parts: list
    num_bytes: int
    holding: str


def shares_of(store, sequences, layer: int) -> list[Share]:
    """Parts with the same heads on one drive go in one command."""
    shares: dict[tuple[str, int, int], Share] = {}
    geometry = sequences[0].model.geometry
    group = geometry.gqa_group_size
    row_bytes = 2 * geometry.head_dim * geometry.numpy_dtype.itemsize
    for item, sequence in enumerate(sequences):
        for part, place in zip(sequence._parts, sequence._record.parts, strict=True):
            key = place.drive_id, place.first_head, place.stop_head
            share = shares.get(key)
            if share is None:
                heads = slice(place.first_head * group, place.stop_head * group)
                member = store._member(place)
                share = shares[key] = Share(member, [], heads, [], 0, sequence._holding(place))
            share.items.append(item)
            share.parts.append(part)
            num_heads = place.stop_head - place.first_head
            tails = part._layers  # None: all of it is on flash
            num_spilled = part._row.num_spilled if tails is None else tails[layer].num_spilled
            share.num_bytes += num_spilled * num_heads * row_bytes
    for share in shares.values():
        if len(share.items) == len(sequences):
            share.items = slice(None)
    return list(shares.values())
