"""A whole kvfs drive with its flash in a namespace that SPDK's target serves."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.errors import DriveBusy, MediaFailure, NamespaceHoldsData, NotADrive
from kvfs_bench.nvmf_target import Target
from tests.crash.token_writer import check_what_is_left, start_writer

ROOT = Path(__file__).resolve().parents[2]
STORE_TESTS = ["test_store.py", "test_spilling.py", "test_read_ahead.py", "test_quantized_models.py"]
SHAPE = {"num_layers": 2, "num_query_heads": 8, "num_kv_heads": 2, "head_dim": 64}


@pytest.mark.slow
def test_the_store_tests(target):
    """What must hold of any drive, on this one."""
    tests = [f"tests/unit/kvfs/{name}" for name in STORE_TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests],
        cwd=ROOT,
        env={**os.environ, "KVFS_TEST_LOCATION": target.location},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
def test_demo(tmp_path):
    """The demo's main job, small: each token as Transformers gives it."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1280 << 20)
    target = Target(tmp_path, {"file": ("aio", tmp_path / "large")})
    try:
        run_demo(target.location)
    finally:
        target.close()


def run_demo(location):
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "kvfsctl",
                "demo",
                "--context",
                "512",
                "--tokens",
                "8",
                "--more-tokens",
                "4",
            ),
            *("--drive", location, "--json"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("seed", range(2))
def test_target_killed_under_load(target, seed):
    """The drive is gone in the middle of everything, and back: the writer is told, nothing flushed is lost."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    kvfs.format(target.location, "32MiB")
    flushed = 0
    for round_number in range(3):
        writer = start_writer(target.location, seed * 100 + round_number)
        time.sleep(chance.uniform(0.05, 0.8))
        target.kill()
        time.sleep(chance.uniform(0, 0.3))
        target.start()
        try:
            output, errors = writer.communicate(timeout=8)
            assert b"MediaFailure" in errors or b"NvmeStatusError" in errors, errors.decode()
        except subprocess.TimeoutExpired:  # everything was durable at that moment: it goes on
            writer.kill()
            output, _ = writer.communicate()
        flushed = check_what_is_left(target.location, flushed, output)


def test_format_refuses_what_is_not_empty(target):
    kvfs.format(target.location, "32MiB")
    with pytest.raises(NamespaceHoldsData, match="--force"):
        kvfs.format(target.location)
    with kvfs.open(target.location):
        pass
    kvfs.format(target.location, overwrite=True)  # all of it this time
    with kvfs.open(target.location) as store:
        assert store.counters()["space"]["capacity_bytes"] > 64 << 20


def test_one_owner(target):
    kvfs.format(target.location, "32MiB")
    with kvfs.open(target.location), pytest.raises(DriveBusy):
        kvfs.open(target.location)
    with kvfs.open(target.location):
        pass


def test_not_a_drive(target):
    with pytest.raises(NotADrive):
        kvfs.open(target.location)


def test_smaller_than_its_superblock_says(tmp_path, target):
    """A drive that was copied to a smaller namespace."""
    kvfs.format(target.location)
    target.kill()
    with (tmp_path / "namespace").open("r+b") as file:
        file.truncate(48 << 20)
    target.start()
    with pytest.raises(NotADrive, match=r"truncated: \d+ bytes where the drive has \d+"):
        kvfs.open(target.location)


def test_too_small(target):
    with pytest.raises(kvfs.errors.InvalidArgument, match="bytes are needed"):
        kvfs.format(target.location, "1GiB")


def test_target_gone(target):
    """Not there, and gone while a drive is open: one line, and the store can be closed."""
    kvfs.format(target.location, "32MiB")
    store = kvfs.open(target.location)
    model = store.add_model("m", **SHAPE)
    sequence = store.create_sequence(model, "s")
    rows = np.ones((300, 2, 64), np.float32)
    for layer in range(2):
        sequence.append(layer, rows, rows)
    sequence.flush()
    target.kill()
    for layer in range(2):
        sequence.append(layer, rows, rows)
    started = time.monotonic()
    with pytest.raises((MediaFailure, kvfs.NvmeStatusError)):
        sequence.flush()
    assert time.monotonic() - started < 60
    with pytest.raises((MediaFailure, kvfs.NvmeStatusError)):
        store.close()
    with pytest.raises(MediaFailure, match="no NVMe controller answers") as caught:
        kvfs.open(target.location)
    assert "\n" not in str(caught.value)
    target.start()
    with kvfs.open(target.location) as store:
        assert store.sequence("s").num_tokens == 300
        assert store.check() == []
