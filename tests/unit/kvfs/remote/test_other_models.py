"""The store's tests of scores and of quantized models, on a client's store."""

from .. import test_attention_scores, test_quantized_models
from .test_interface import for_clients, remote_kvfs_open  # noqa: F401 - the first is a fixture of all tests here

_OF_THE_OWNER = {
    "test_a_window_reads_no_more_than_it_sees",
    "test_what_is_on_its_way_reads_as_it_will",
    "test_damaged_scales_are_an_error",
}
globals().update(for_clients((test_attention_scores, test_quantized_models), _OF_THE_OWNER))
sequence = test_attention_scores.sequence
quantized = test_quantized_models.quantized
