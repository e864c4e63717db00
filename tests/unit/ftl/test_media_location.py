"""Who has a namespace has it alone."""

import pytest

from ftl import media_location
from ftl.errors import DriveBusy
from tests.unit.spdk_glue.memory_drive import MemoryDrive


@pytest.fixture
def location(monkeypatch):
    """Every transport leads to the same drive."""
    drive = MemoryDrive()
    monkeypatch.setattr(media_location, "open_transport", lambda location: drive.transport)
    return "/dev/ng0n1"


def test_namespace_is_held_while_it_is_used(location):
    """A lock that goes with the first command lets two processes write one drive."""
    namespace = media_location.LockedNamespace(location)
    for _ in range(2):
        namespace.read(0, 1)
        with pytest.raises(DriveBusy):
            media_location.LockedNamespace(location)
    namespace.close()
    media_location.LockedNamespace(location).close()
