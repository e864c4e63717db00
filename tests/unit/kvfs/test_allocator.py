"""Blocks: never the same one twice, never one that durable metadata still names."""

from hypothesis import given
from hypothesis import strategies as st

from kvfs.allocator import Allocator

VERBS = st.sampled_from(["allocate", "allocate_some", "give_back", "hold", "release"])
OPERATIONS = st.lists(st.tuples(VERBS, st.integers(1, 40)))


@given(OPERATIONS)
def test_against_a_set(operations):
    """Overlap: two sequences in one place; leaks: a drive that fills up by itself."""
    allocator = Allocator(10, 210, [(50, 20)])
    free = set(range(10, 210)) - set(range(50, 70))
    held: set[int] = set()
    allocated: list[tuple[int, int]] = []
    for operation, number in operations:
        if operation == "allocate":
            first = allocator.allocate(number)
            if first is None:
                runs = "".join("1" if lba in free else "0" for lba in range(10, 210)).split("0")
                assert max(map(len, runs)) < number
            else:
                assert set(range(first, first + number)) <= free
                free -= set(range(first, first + number))
                allocated.append((first, number))
        elif operation == "allocate_some":
            behind = sum(allocated[-1]) if allocated else None
            extents = allocator.allocate_some(number * 3, behind)
            if extents is None:
                assert len(free) < number * 3
            else:
                lbas = [lba for first, count in extents for lba in range(first, first + count)]
                assert len(lbas) == len(set(lbas)) == number * 3 and set(lbas) <= free
                assert behind not in free or lbas[0] == behind
                free -= set(lbas)
                allocated += extents
        elif operation == "release":
            released = allocator.release()
            assert {lba for first, count in released for lba in range(first, first + count)} == held
            free |= held
            held = set()
        elif allocated:
            first, count = allocated.pop(number % len(allocated))
            getattr(allocator, operation)(first, count)
            (held if operation == "hold" else free).update(range(first, first + count))
        assert allocator.free_lbas == len(free) + len(held)


def test_damaged_catalogue_is_noticed():
    """Overlapping extents in the catalogue: refuse to open rather than overwrite."""
    import pytest

    for used in ([(0, 5), (4, 2)], [(90, 20)]):
        with pytest.raises(ValueError, match="overlaps"):
            Allocator(0, 100, used)
