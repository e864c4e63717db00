import pytest

from kvfs_bench.nvmf_target import Target, why_no_spdk

MIB = 1 << 20


def pytest_collection_modifyitems(items):
    reason = why_no_spdk()
    for item in items:
        if "/tests/spdk/" in str(item.path):
            item.add_marker(pytest.mark.spdk)
            if reason:
                item.add_marker(pytest.mark.skip(reason=f"needs SPDK: {reason}"))


@pytest.fixture(scope="module")
def shared_target(tmp_path_factory):
    """A target with two namespaces, 64 MiB each: 1 in memory, 2 in a file."""
    folder = tmp_path_factory.mktemp("target")
    with (folder / "namespace").open("wb") as file:
        file.truncate(64 * MIB)
    target = Target(folder, {"memory": ("malloc", 64 * MIB), "file": ("aio", folder / "namespace")})
    yield target
    target.close()


@pytest.fixture
def target(tmp_path):
    """A target of one test's own, which may kill it: one namespace of 96 MiB in a file."""
    with (tmp_path / "namespace").open("wb") as file:
        file.truncate(96 * MIB)
    target = Target(tmp_path, {"file": ("aio", tmp_path / "namespace")})
    yield target
    target.close()
