"""The store's tests of prefix reuse, on a set of two drives."""

from ..prefix import test_reuse
from ..prefix.conftest import tokens  # noqa: F401 - a fixture
from ..remote.test_interface import for_clients
from .test_conformance import two_drives_for_one  # noqa: F401 - a fixture of all tests here

_LOOK_INSIDE = {
    "test_source_deleted",
    "test_part_of_a_group_on_flash",
    "test_tenants_apart",
    "test_same_work_for_what_others_have",
    "test_tokens_are_compared",
    "test_damage_is_a_miss",
    "test_verified",
}
globals().update(for_clients([test_reuse], _LOOK_INSIDE))
