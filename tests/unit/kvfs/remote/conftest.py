import pytest

import kvfs

from ..conftest import add_model
from .owner import Served


@pytest.fixture
def served(path, tmp_path):
    """A drive that is open here and served to clients, with little shared memory."""
    with (
        kvfs.open(path, cache_bytes="8MiB", num_workers=2) as store,
        Served(store, tmp_path / "mount", memory_bytes=1 << 20) as served,
    ):
        yield served


@pytest.fixture
def client(served):
    with served.open() as client:
        yield client


@pytest.fixture
def sequence(client):
    return client.create_sequence(add_model(client), "s")
