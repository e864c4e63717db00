"""Where a file's blocks lie: against a dictionary from block to LBA."""

from hypothesis import given
from hypothesis import strategies as st

from kvfs.files.extent_map import ExtentMap

RANGES = st.tuples(st.integers(0, 40), st.integers(1, 12))
OPERATIONS = st.lists(st.tuples(st.sampled_from(["fill", "remove"]), RANGES), max_size=30)


@given(OPERATIONS, st.booleans())
def test_against_a_dictionary(operations, is_contiguous):
    """A block at the wrong LBA is another file's data; one freed twice is handed out twice."""
    extents, blocks, next_lba = ExtentMap(), {}, 1000
    for operation, (first, count) in operations:
        stop = first + count
        if operation == "fill":
            for start, end, lba in extents.pieces(first, stop):
                if lba is None:
                    extents.add(start, end - start, next_lba)
                    blocks.update((block, next_lba + block - start) for block in range(start, end))
                    next_lba += end - start + (not is_contiguous)
        else:
            version = extents.version
            removed = [lba + i for lba, num in extents.remove(first, stop) for i in range(num)]
            gone = [blocks.pop(block) for block in range(first, stop) if block in blocks]
            assert removed == gone and extents.version == version + bool(gone)
        assert blocks == {
            start + i: lba + i
            for start, end, lba in extents.pieces(0, 60)
            if lba is not None
            for i in range(end - start)
        }
        assert extents.num_blocks == len(blocks)
    for block in range(60):
        assert extents.lba(block) == blocks.get(block)
        assert extents.next_data(block) == min((b for b in blocks if b >= block), default=None)
        assert extents.next_hole(block) == next(b for b in range(block, 100) if b not in blocks)


@given(OPERATIONS, st.integers(1, 5))
def test_stored_changes_are_all_changes(operations, store_every):
    """Rows that are not written, or not removed: after the next opening the file has other blocks."""
    extents, rows, next_lba = ExtentMap(), {}, 1000
    for number, (operation, (first, count)) in enumerate(operations):
        if operation == "fill":
            for start, end, lba in extents.pieces(first, first + count):
                if lba is None:
                    extents.add(start, end - start, next_lba)
                    next_lba += end - start + number % 2
        else:
            extents.remove(first, first + count)
        if number % store_every == 0 and (changed := extents.take_changed()):
            rows = {start: run for start, run in rows.items() if not changed[0] <= start < changed[1]}
            for start, *run in extents.runs(*changed):
                assert start not in rows
                rows[start] = run
    if changed := extents.take_changed():
        rows = {start: run for start, run in rows.items() if not changed[0] <= start < changed[1]}
        rows.update((start, run) for start, *run in extents.runs(*changed))
    assert [(start, *run) for start, run in sorted(rows.items())] == list(extents.runs())


def test_neighbours_are_one_run():
    """A file written piece by piece would have a row for each piece."""
    extents = ExtentMap([(0, 2, 100)])
    extents.add(4, 2, 104)
    extents.add(2, 2, 102)
    assert list(extents.runs()) == [(0, 6, 100)]
    assert extents.lba_behind(6) == 106
