import pytest

import kvfs

from ..conftest import add_model

SIZE = "48MiB"
OPTIONS = {"cache_bytes": "24MiB", "num_workers": 1}


@pytest.fixture
def locations(tmp_path):
    """The drives of a new set."""
    locations = [str(tmp_path / f"{name}.kvfs") for name in "ab"]
    kvfs.format(locations, SIZE)
    return locations


@pytest.fixture
def drive_set(locations):
    with kvfs.open(locations, **OPTIONS) as drive_set:
        yield drive_set


@pytest.fixture
def sequence(drive_set):
    return drive_set.create_sequence(add_model(drive_set, num_kv_heads=4, num_query_heads=8), "s")
