"""The store's tests of sparse attention, on a set of two drives."""

from .. import test_sparse
from ..remote.test_interface import for_clients
from .test_conformance import two_drives_for_one  # noqa: F401 - a fixture of all tests here

# each drive has a head: a call is a command on each
_OF_ONE_DRIVE = {
    "test_a_damaged_segment_is_given_up",
    "test_a_drive_that_cannot",
    "test_an_older_drive_is_not_asked_to_be_exact",
    "test_awaited",
    "test_pages_are_counted",
}
globals().update(for_clients((test_sparse,), _OF_ONE_DRIVE))
