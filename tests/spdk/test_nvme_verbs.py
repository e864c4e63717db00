"""kvfsctl nvme over NVMe/TCP, against SPDK's target: a drive that is not ours."""

import json
import os
import subprocess
import sys

import pytest

import kvfs
from kvfs_bench.nvmf_target import Target, why_no_spdk

pytestmark = [pytest.mark.spdk, pytest.mark.skipif(bool(why_no_spdk()), reason=why_no_spdk())]
BLOCK = 4096


def kvfsctl(*arguments, stdin=b""):
    command = [sys.executable, "-m", "kvfsctl", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, input=stdin, timeout=120)
    assert b"Traceback" not in result.stderr, result.stderr.decode()
    return result


@pytest.fixture(scope="module")
def location(tmp_path_factory):
    target = Target(tmp_path_factory.mktemp("target"), {"drive": ("malloc", 256 << 20)})
    yield target.location
    target.close()


def test_blocks_and_commands(location):
    """Another maker's controller: what it says, blocks, commands, its errors."""
    document = json.loads(kvfsctl("nvme", "identify", location, "--json").stdout)
    assert document["controller"]["mn"] == "SPDK bdev Controller"
    assert document["namespace"]["nsze"] * BLOCK == 256 << 20
    assert kvfsctl("nvme", "smart-log", location).returncode == 0
    data = os.urandom(3 * BLOCK)
    assert kvfsctl("nvme", "write", location, "-s", 7, stdin=data).returncode == 0
    assert kvfsctl("nvme", "read", location, "-s", 7, "-c", 2).stdout == data
    passthru = ("nvme", "passthru", location, "-l", BLOCK)
    assert kvfsctl(*passthru, "-o", 2, "--cdw10", 8, "-b").stdout == data[BLOCK : 2 * BLOCK]
    assert kvfsctl(*passthru, "-o", 5, "--cdw10", 7, stdin=data[:BLOCK]).returncode == 0
    assert b"compare failure" in kvfsctl(*passthru, "-o", 5, "--cdw10", 7, stdin=bytes(BLOCK)).stderr
    assert b"lba out of range" in kvfsctl(*passthru, "-o", 2, "--cdw10", 0xFFFFFFFF).stderr
    too_long = kvfsctl("nvme", "passthru", location, "-o", 2, "-l", 1 << 20, "--cdw12", 255)
    assert b"takes at most 131072 at once" in too_long.stderr


def test_a_drive_in_use_is_spared(location):
    """A kvfs drive is not overwritten unasked, and while it is open not at all."""
    kvfs.format(location, overwrite=True)
    refused = kvfsctl("nvme", "write", location, stdin=bytes(BLOCK))
    assert refused.returncode == 1 and b"holds a kvfs drive: --force" in refused.stderr
    with kvfs.open(location, cache_bytes="8MiB", worker="reference"):
        refused = kvfsctl("nvme", "write", location, "--force", stdin=bytes(BLOCK))
        assert refused.returncode == 1 and b"open in another process" in refused.stderr
        assert kvfsctl("nvme", "identify", location).returncode == 0
    assert kvfsctl("nvme", "write", location, "--force", stdin=bytes(BLOCK)).returncode == 0
