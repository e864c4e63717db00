import pytest

import kvfs
from kvfs.files.file_system import FileSystem
from tests.unit.kvfs.files.posix import Posix


@pytest.fixture
def path(tmp_path):
    """A formatted, empty drive."""
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, "32MiB")
    return path


@pytest.fixture
def opened(path):
    """A function that opens the drive's store: (store, its files by path). What it opened last is checked."""
    stores = []

    def open_drive():
        store = kvfs.open(path, cache_bytes="8MiB", num_workers=1, worker="reference")
        stores.append(store)
        return store, Posix(FileSystem(store))

    yield open_drive
    if stores and not stores[-1]._closed:
        assert stores[-1].check() == []
    for store in stores:
        store.close()


@pytest.fixture
def store(opened):
    return opened()[0]


@pytest.fixture
def posix(store):
    return Posix(store._files)
