"""Killing the process that owns the drive, at any time: what was flushed is there, and right."""

import os
import random
import signal
import time

import pytest

import kvfs
from tests.crash.token_writer import check_what_is_left, start_writer


@pytest.mark.parametrize("seed", range(4))
def test_kill_under_load(tmp_path, seed):
    """Flushed tokens after kill -9: none missing, none wrong, the drive checks clean, again and again."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, "32MiB")
    flushed = 0
    for round_number in range(3):
        writer = start_writer(path, seed * 100 + round_number)
        time.sleep(chance.uniform(0.05, 0.8))
        os.kill(writer.pid, signal.SIGKILL)
        output, _ = writer.communicate()
        flushed = check_what_is_left(path, flushed, output)
