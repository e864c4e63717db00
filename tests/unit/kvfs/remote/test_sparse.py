"""The store's tests of sparse attention, on a client's store."""

from .. import test_sparse
from .test_interface import for_clients, remote_kvfs_open  # noqa: F401 - the first is a fixture of all tests here

_OF_THE_OWNER = {
    "test_a_damaged_segment_is_given_up",
    "test_a_drive_that_cannot",
    "test_an_older_drive_is_not_asked_to_be_exact",
    "test_awaited",
}
globals().update(for_clients((test_sparse,), _OF_THE_OWNER))
