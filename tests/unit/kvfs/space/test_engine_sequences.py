"""vLLM's attention on the drive under a cap: its requests go on without the drive, which is told once."""

import logging

import numpy as np
import pytest

from kvfs.engines.vllm.drive_sequences import DriveSequences, Row

from ..conftest import add_model
from .test_space import GROUP, GROUP_BYTES, make, names


@pytest.fixture
def model(store):
    return add_model(store, name="m", group_tokens=GROUP)


ROWS = np.zeros((GROUP, 2, 64), np.float16)


def test_a_cap_is_a_full_drive(store, model, caplog):
    """An error that ends the engine, or a line for each request."""
    store.set_quota("m", capacity_bytes=GROUP_BYTES)
    make(store, model, "kept").set_attribute("user.kvfs.pinned", b"1")
    sequences = DriveSequences(store, model)
    with caplog.at_level(logging.WARNING):
        for first_block in range(3):
            assert sequences.append(0, Row(first_block, 0, GROUP), ROWS, ROWS) is None
    assert sequences.requests_refused == 3 and names(store) == ["kept"]
    (record,) = caplog.records
    assert "the cap of model 'm' is" in record.message and "attends to such requests itself" in record.message


def test_a_request_that_was_evicted(store, model):
    """Under a cap one request's tokens may have another's evicted, while it runs."""
    store.set_quota("m", capacity_bytes=GROUP_BYTES)
    sequences = DriveSequences(store, model)
    assert sequences.append(0, Row(1, 0, GROUP), ROWS, ROWS) is not None
    assert sequences.append(0, Row(2, 0, GROUP), ROWS, ROWS) is not None
    assert sequences.append(0, Row(1, GROUP, GROUP), ROWS, ROWS) is None
    assert sequences.append(0, Row(1, 0, GROUP), ROWS, ROWS) is not None  # the block's next request
    sequences.close()
    assert names(store) == []
