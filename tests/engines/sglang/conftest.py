"""Fixtures of the tests with SGLang, which is imported where it is used: without it they are skipped."""

import pytest

import kvfs


@pytest.fixture
def drive(tmp_path):
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, "64MiB")
    return path


@pytest.fixture
def backend():
    """backend(path, pool, **changes): see engine.create_backend; closed in the end."""
    from .engine import create_backend

    made = []

    def make(*arguments, **changes):
        made.append(create_backend(*arguments, **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()
