"""What parts that a crash has left make of a sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.drive_set.membership import agree, new_set
from kvfs.drive_set.part_record import (
    History,
    PartPlace,
    PartRecord,
    PartState,
    are_even,
    in_common,
)
from kvfs.drive_set.recovery import FoundPart, sort_out
from kvfs.drive_set.spreading import Candidate, spread
from kvfs.errors import CatalogueDamaged, NotInSet
from kvfs.metadata import SequenceRow

# a sequence's history as tokens and token ids that nothing else has

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 5)),
        st.tuples(st.just("ids"), st.integers(1, 5)),
        st.tuples(st.just("truncate"), st.floats(0, 1)),
        st.tuples(st.just("settle"), st.none()),
    ),
    max_size=30,
)


def go_on(point, changes, stamp=0):
    """Points that a sequence passes through, from one on: a part's state, its tokens, its token ids."""
    state, tokens, ids = point
    history, points = History.decode(state.history.encode()), [point]
    for kind, amount in changes:
        if kind == "settle":
            history.settled()
            points.clear()
        elif kind == "truncate":
            keep = int(amount * len(tokens))
            tokens, ids = tokens[:keep], ids[:keep]
            history.cut(keep, len(ids))
        else:
            stamp += amount
            fresh = list(range(stamp - amount, stamp))
            tokens, ids = (tokens + fresh, ids) if kind == "append" else (tokens, ids + fresh)
        state = PartState(History.decode(history.encode()), len(tokens), len(ids))
        points.append((state, list(tokens), list(ids)))
    return points


def found_in_common(parts):
    """(tokens, ids)"""
    common = in_common([state for state, _, _ in parts])
    for _, tokens, _ in parts:
        assert tokens[: common.num_tokens] == parts[0][1][: common.num_tokens]
        assert len(tokens) >= common.num_tokens
    return parts[0][1][: common.num_tokens], parts[common.ids_of][2][: common.num_token_ids]


PICKS = st.lists(st.integers(0, 1 << 20), min_size=2, max_size=4)
START = PartState(History(), 0, 0), [], []


@given(CHANGES, PICKS)
def test_common_point_is_one_of_the_history(changes, picks):
    """Parts at any points since they agreed last: tokens that one has otherwise would be a mix of two pasts."""
    points = go_on(START, changes)
    parts = [points[pick % len(points)] for pick in picks]
    found = found_in_common(parts)
    assert found in [(tokens, ids) for _, tokens, ids in points]
    if are_even([state for state, _, _ in parts]):
        assert found == parts[0][1:]


@given(CHANGES, PICKS, CHANGES, PICKS)
def test_what_a_recovery_has_cut_off_stays_away(changes, picks, later, later_picks):
    """Parts were brought to a point; some have not stored that when the power fails again."""
    points = go_on(START, changes)
    parts = [points[pick % len(points)] for pick in picks]
    if not are_even([state for state, _, _ in parts]):
        tokens, ids = found_in_common(parts)
        history = max((state.history for state, _, _ in parts), key=lambda history: history.epoch)
        history = History.decode(history.encode())
        history.cut(len(tokens), len(ids))
        later = [change for change in later if change[0] != "settle"]  # then all have stored it
        points = go_on((PartState(history, len(tokens), len(ids)), tokens, ids), later, 1000)
        for index, pick in zip(range(len(parts)), later_picks, strict=False):
            if pick % 3 or not index:
                parts[index] = points[pick % len(points)]
        assert found_in_common(parts) in [(tokens, ids) for _, tokens, ids in points]


def part(index, copy=0, drive=None, places=None, name="s"):
    places = places or (PartPlace(0, 2, "a"), PartPlace(2, 4, "b"))
    record = PartRecord(7, name, "m", index, copy, places)
    row = SequenceRow(1, 1, record.member_name, 0, 0, 5, 0, 0, 0)
    return FoundPart(drive or places[index].drive_id, row, record, PartState(History(), 5, 0))


MOVED = (PartPlace(0, 2, "a"), PartPlace(2, 4, "c", 1))
FIRST_MOVED = (PartPlace(0, 2, "c", 1), PartPlace(2, 4, "b"))


def test_half_made_and_half_deleted():
    """A sequence with a part missing that no drive can have: it was never promised, or it was to go."""
    for found in ([part(0)], [part(1)]):
        result = sort_out(found, missing=set())
        assert not result.whole and result.dropped == found
    result = sort_out([part(0), part(1)], missing=set())
    assert list(result.whole) == [7] and not result.dropped


def test_nothing_is_dropped_while_a_drive_is_away():
    """The part that is missing may be there."""
    for found, missing in (([part(0)], {"b"}), ([part(1)], {"a"})):
        result = sort_out(found, missing)
        assert not result.dropped and list(result.whole) == [7]
    # the first part has moved to c, and only an old record tells of the sequence
    result = sort_out([part(1)], {"c"})
    assert result.whole[7][0].parts[0].drive_id == "c"


def test_copies_of_a_move():
    """Before and after the switch: each part once, and the other copy dropped."""
    before = [part(0), part(1), part(1, 1, "c", MOVED)]
    result = sort_out(before, set())
    assert result.whole[7][1] == before[:2] and result.dropped == before[2:]
    after = [part(0, places=MOVED), part(1, places=(MOVED[0], PartPlace(2, 4, "b"))), part(1, 1, "c", MOVED)]
    result = sort_out(after, set())
    assert result.whole[7][1] == [after[0], after[2]] and result.dropped == [after[1]]
    firsts = [part(0), part(1), part(0, 1, "c", FIRST_MOVED)]
    result = sort_out(firsts, set())
    assert result.whole[7][1] == [firsts[2], firsts[1]] and result.dropped == [firsts[0]]


@pytest.mark.parametrize(
    "value", [b"{", b"[]", b"{}", b'{"epoch": "x"}', b'{"epoch": 1, "cuts": [[1]]}', b"\xff"]
)
def test_damaged_records(value):
    """A record that makes no sense is an error, not an exception of the parser's."""
    with pytest.raises(CatalogueDamaged):
        History.decode(value)
    with pytest.raises(CatalogueDamaged):
        PartRecord.decode(value)


def test_generations():
    """A drive that a crash has left a generation behind catches up; one that was taken out does not come
    back."""
    first = new_set(["x", "y"])
    a, b = first.drives
    newer = type(first)(first.set_id, a, 2, {a: "x"}, a)
    assert agree({"x": newer}).drives == {a: "x"}
    assert agree({"elsewhere": first, "y": first.of(b)}).drives == {a: "elsewhere", b: "y"}
    with pytest.raises(NotInSet, match="taken out"):
        agree({"x": newer, "y": first.of(b)})


@given(
    st.integers(1, 32),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 100)), min_size=1, max_size=9),
)
def test_every_head_has_one_drive(num_heads, drives):
    """A head twice or nowhere."""
    candidates = [Candidate(str(n), free, heads) for n, (free, heads) in enumerate(drives)]
    places = spread(num_heads, candidates)
    covered = np.concatenate([np.arange(place.first_head, place.stop_head) for place in places])
    assert covered.tolist() == list(range(num_heads))
    counts = [place.stop_head - place.first_head for place in places]
    assert max(counts) - min(counts) <= 1 and len(counts) == min(num_heads, len(drives))
