"""The store's tests of scores and of quantized models, on a client's store; see test_interface."""

from .. import test_attention_scores, test_quantized_models
from .test_interface import remote_kvfs_open  # noqa: F401 - a fixture that all tests here use

# those look inside
_OF_THE_OWNER = {
    "test_a_window_reads_no_more_than_it_sees",
    "test_what_is_on_its_way_reads_as_it_will",
    "test_damaged_scales_are_an_error",
}
for module in (test_attention_scores, test_quantized_models):
    globals().update(
        {
            name: test
            for name, test in vars(module).items()
            if name.startswith("test_") and name not in _OF_THE_OWNER
        }
    )
sequence = test_attention_scores.sequence
quantized = test_quantized_models.quantized
