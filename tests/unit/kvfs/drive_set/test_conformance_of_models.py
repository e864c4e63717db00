"""The store's tests of scores and of quantized models, on a set of two drives."""

from .. import test_attention_scores, test_quantized_models
from ..remote.test_interface import for_clients
from .test_conformance import two_drives_for_one  # noqa: F401 - a fixture of all tests here

_LOOK_INSIDE = {
    "test_a_window_reads_no_more_than_it_sees",
    "test_what_is_on_its_way_reads_as_it_will",
    "test_damaged_scales_are_an_error",
}
globals().update(for_clients((test_attention_scores, test_quantized_models), _LOOK_INSIDE))
sequence = test_attention_scores.sequence
quantized = test_quantized_models.quantized
