"""The store's tests of caches of objects, on a set of two drives."""

from ..objects import test_object_cache
from ..objects.conftest import cache  # noqa: F401 - a fixture
from ..remote.test_interface import for_clients
from .test_conformance import two_drives_for_one  # noqa: F401 - a fixture of all tests here

_LOOK_INSIDE = {
    "test_one_batch_of_commands",
    "test_a_key_keeps_its_object",
    "test_a_damaged_object",
    "test_a_write_that_fails",
    "test_replaced_while_it_is_read",
    "test_closing_waits_for_readers",
    "test_flushes_by_itself",
    "test_in_a_transaction_that_is_taken_back",
    "test_a_cap_goes_to_the_catalogue_behind_what_it_evicts",
    "test_a_catalogue_without_room",
}
# of which object is evicted when: each drive has a share of the cap, and an order of use
_OF_ONE_DRIVE = {"test_the_cap_holds", "test_pins", "test_a_full_drive", "test_a_restart"}
globals().update(for_clients([test_object_cache], _LOOK_INSIDE | _OF_ONE_DRIVE))
