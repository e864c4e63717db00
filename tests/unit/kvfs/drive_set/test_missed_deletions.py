"""Which drives may still have, after a crash, what was deleted: no object put elsewhere has a stale twin."""

import pytest

from kvfs.drive_set import missed_deletions
from kvfs.drive_set.missed_deletions import EVERYTHING, Deletion, MissedDeletions

KEY, OTHER = b"key", b"other"


@pytest.mark.parametrize("deletion", [Deletion("c", "{}", KEY), Deletion("c"), EVERYTHING])
def test_a_key_that_goes_to_another_drive(deletion):
    """Whether the key itself was deleted, or its cache, or all caches."""
    missed = MissedDeletions()
    missed.note("a", deletion)
    assert missed.with_any("c", "{}", [(KEY, "b")]) == ["a"]
    missed.settled("a", [deletion])
    assert missed.with_any("c", "{}", [(KEY, "b")]) == []


def test_what_was_deleted_of_others():
    """Other keys, caches and identities make nobody wait for a drive; nor does the same drive."""
    missed = MissedDeletions()
    missed.note("a", Deletion("c", "{}", KEY))
    assert missed.with_any("c", "{}", [(OTHER, "b")]) == []
    assert missed.with_any("d", "{}", [(KEY, "b")]) == []
    assert missed.with_any("c", '{"model":"m"}', [(KEY, "b")]) == []
    assert missed.with_any("c", "{}", [(KEY, "a")]) == []
    missed.note("b", Deletion("d"))
    assert missed.with_any("c", "{}", [(OTHER, "a")]) == []


def test_too_many_to_be_remembered(monkeypatch):
    """Then all count as deleted, and nothing is taken for known."""
    monkeypatch.setattr(missed_deletions, "MAX_MISSED", 2)
    missed = MissedDeletions()
    for key in (b"1", b"2", b"3"):
        missed.note("a", Deletion("c", "{}", key))
    assert missed.of("a") == [EVERYTHING]
    assert missed.with_any("d", "{}", [(OTHER, "b")]) == ["a"]
