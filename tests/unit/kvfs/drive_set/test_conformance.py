"""A set of two drives is a store: the store's own tests, with the KV heads on two drives."""

import os

import pytest

import kvfs
from kvfs.drive_set.set_sequence import SetSequence

from .. import test_bad_input, test_store
from ..remote.test_interface import for_clients, public


@pytest.mark.parametrize(("one", "several"), [(kvfs.Store, kvfs.DriveSet), (kvfs.Sequence, SetSequence)])
def test_same_methods(one, several):
    """A program for one drive must run on several; what is more are the drives and who is asked about them."""
    more = {"drives"} if one is kvfs.Store else set()
    theirs = {name: signature for name, signature in public(several).items() if name not in more}
    assert theirs == public(one)


@pytest.fixture(autouse=True)
def two_drives_for_one(monkeypatch):
    """kvfs.format of a drive makes two that are a set, and kvfs.open opens both."""
    format_one, open_one = kvfs.format, kvfs.open

    def several(path):
        return [f"{os.fspath(path)}.{number}" for number in range(2)]

    def format_set(path, *arguments, **options):
        format_one(several(path), *arguments, **options)

    def open_set(path, **options):
        return open_one(several(path) if os.path.exists(f"{os.fspath(path)}.0") else path, **options)

    monkeypatch.setattr(kvfs, "format", format_set)
    monkeypatch.setattr(kvfs, "open", open_set)


_LOOK_INSIDE = {
    "test_attend_waits_for_no_spill",
    "test_groups_written_in_small_pieces_end_in_one",
    "test_tails_stay_within_their_memory",
    "test_corrupt_page_is_an_error_with_facts",
    "test_files_that_are_no_drive",
    "test_drive_of_a_newer_version",
    "test_drive_open_elsewhere",
    "test_format_refuses",
    "test_every_error_has_an_errno",
    "test_sizes",
}
globals().update(for_clients((test_store, test_bad_input), _LOOK_INSIDE))
sequence = test_bad_input.sequence
