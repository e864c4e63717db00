import numpy as np
import pytest

from accel.drive import Drive, DriveConfig
from ftl.geometry import Geometry
from spdk_glue import dma
from spdk_glue.namespace import Namespace

GEOMETRY = Geometry(pages_per_erase_block=32, num_superblocks=48)


@pytest.fixture
def drive(tmp_path):
    Drive.format(tmp_path / "drive", GEOMETRY)
    drive = Drive.open(tmp_path / "drive", DriveConfig(cache_bytes=8 << 20, num_workers=2))
    yield drive
    drive.close()


@pytest.fixture
def namespace(drive):
    return Namespace(drive.transport)


def blocks(count, seed=0):
    """uint8 [count * 4096], random, as the drive takes it."""
    data = dma.allocate(count * 4096)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.size, np.uint8)
    return data
