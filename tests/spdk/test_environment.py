"""SPDK's environment, one a process: with huge pages and without, and drives that move data by DMA."""

import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvfs_bench.nvmf_target import Target
from spdk_glue.pyspdk.environment import free_hugepages_mb

NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
WORK = textwrap.dedent(
    """
    import sys
    import numpy as np
    from spdk_glue import dma
    from spdk_glue.namespace import BlockNamespace
    from spdk_glue.pyspdk import environment
    from spdk_glue.transports.url import open_transport

    namespace = BlockNamespace(open_transport("spdk:" + sys.argv[1]))
    random = np.random.default_rng(0)
    ordinary = random.integers(0, 256, 3 << 20, np.uint8)  # memory that SPDK does not know
    given = dma.allocate(5 << 20)
    given[:] = random.integers(0, 256, given.size, np.uint8)
    shared = environment.allocate(1 << 20)
    shared[:] = 9
    for first, data in ((0, ordinary), (1000, given), (3000, shared)):
        namespace.write(first, data)
    namespace.flush()
    for first, data in ((0, ordinary), (1000, given), (3000, shared)):
        np.testing.assert_array_equal(namespace.read(first, data.size // 4096), data)
        into = np.zeros(data.size, np.uint8)
        namespace.read_scattered([(first, into)])
        np.testing.assert_array_equal(into, data)
    namespace.deallocate([(0, 8)])
    namespace.close()
    print(environment.started_with())
    """
)


@contextmanager
def reserved_hugepages(megabytes):
    """Huge pages for as long as the context; skips the test where this user may not have them."""
    before = NR_HUGEPAGES.read_text()
    try:
        NR_HUGEPAGES.write_text(str(int(before) + megabytes // 2))
    except OSError as error:
        pytest.skip(f"huge pages cannot be reserved: {error}")
    try:
        if free_hugepages_mb() < megabytes:
            pytest.skip("the kernel has not enough contiguous memory for huge pages")
        yield
    finally:
        NR_HUGEPAGES.write_text(before)


def run(transport_id, **environment):
    return subprocess.run(
        [sys.executable, "-c", WORK, transport_id],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def transport_id(request, tmp_path):
    is_tcp = request.param == "tcp"
    target = Target(tmp_path, {"memory": ("malloc", 64 << 20)}, is_polling=not is_tcp)
    yield target.transport_id if is_tcp else target.listen_on_vfio_user()
    target.close()


@pytest.mark.parametrize("transport_id", ["tcp", "vfio-user"], indirect=True)
def test_without_hugepages(transport_id):
    done = run(transport_id, KVFS_SPDK_HUGEPAGES="0")
    assert done.returncode == 0, done.stderr
    assert "'hugepages': False" in done.stdout


@pytest.mark.parametrize("transport_id", ["tcp", "vfio-user"], indirect=True)
def test_with_hugepages(transport_id):
    """Found free, they are used without being asked for."""
    with reserved_hugepages(384):
        done = run(transport_id)
    assert done.returncode == 0, done.stderr
    assert "'hugepages': True" in done.stdout


def test_no_hugepages_where_they_are_asked_for(target):
    if free_hugepages_mb():
        pytest.skip("this machine has free huge pages")
    done = run(target.transport_id, KVFS_SPDK_HUGEPAGES="1")
    assert "SPDK does not start with 256 MB in huge pages" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("meminfo", ["HugePages_Free:  12\nHugepagesize:  2048 kB\n", "MemTotal: 1 kB\n"])
def test_free_hugepages(tmp_path, meminfo):
    (tmp_path / "meminfo").write_text(meminfo)
    assert free_hugepages_mb(tmp_path / "meminfo") == (24 if "HugePages" in meminfo else 0)
