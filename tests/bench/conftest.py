"""Benchmarks without the repetitions and rests that only a figure needs which is compared with others."""

import pytest

from kvfs_bench import attention, quantized

SHORT = {
    attention: {
        **{"ROUNDS": 1, "ROUND_SECONDS": 0.001, "SETTLE_SECONDS": 0},
        **{"DISK_ROUNDS": 1, "APPEND_ROUNDS": 2, "DISK_REST_SECONDS": 0},
    },
    quantized: {"WARM_ROUNDS": 1, "COLD_ROUNDS": 1, "SETTLE_SECONDS": 0},
}


@pytest.fixture(scope="package", autouse=True)
def _short_rounds():
    with pytest.MonkeyPatch.context() as patch:
        for module, values in SHORT.items():
            for name, value in values.items():
                patch.setattr(module, name, value)
        yield
