"""`kvfsctl seal`, and what `kvfsctl info` says of derived data, as a user runs them."""

import json

import numpy as np
import pytest

import kvfs
from tests.unit.kvfsctl.test_verbs import kvfsctl

GROUP = 32


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    path = tmp_path_factory.mktemp("drive") / "drive.kvfs"
    kvfs.format(path, "48MiB")
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = store.add_model(
            "tiny", num_layers=1, num_query_heads=2, num_kv_heads=1, head_dim=64, group_tokens=GROUP
        )
        for name, count in (("a", 2), ("b", 3)):
            rows = np.random.default_rng(count).standard_normal((count * GROUP + 1, 1, 64), np.float32)
            store.create_sequence(model, name).append(0, rows, rows)
    return path


def test_a_life(drive):
    """Made, seen, verified, wanted, and given up."""
    done = json.loads(kvfsctl("seal", "run", drive, "--model", "tiny", "--json").stdout)
    assert [(row["sequence"], row["sealed"]) for row in done["sequences"]] == [
        ("a", 2 * GROUP),
        ("b", 3 * GROUP),
    ]
    found = json.loads(kvfsctl("seal", "ls", drive, "--json").stdout)
    [row] = found["derived"]
    assert found["schema"] == 1 and row["derive"] == "sketch" and row["num_tokens"] == 5 * GROUP
    assert row["num_bytes"] > 0 and row["share"] == row["num_bytes"] / row["dense_bytes"]
    assert json.loads(kvfsctl("info", drive, "--json").stdout)["derived"] == [row]
    assert "sketch" in kvfsctl("info", drive).stdout
    said = kvfsctl("seal", "run", drive, "a", "--layout", "channel_major_keys", "--verify").stdout
    assert "a: 64 of 65 tokens have a channel_major_keys" in said
    assert "sketch is made" in kvfsctl("seal", "set", drive, "tiny", "sketch").stdout
    assert "yes" in kvfsctl("seal", "ls", drive).stdout
    assert json.loads(kvfsctl("seal", "set", drive, "tiny", "--json").stdout)["seal"] == []
    dropped = json.loads(kvfsctl("seal", "drop", drive, "--layout", "sketch", "--json").stdout)
    assert dropped["num_segments"] == 2
    assert "dropped 1 segments" in kvfsctl("seal", "drop", drive).stdout
    assert kvfsctl("seal", "run", drive, "--layout", "x").returncode == 1
    assert kvfsctl("seal", "run", drive, "nobody").returncode == 1
    with kvfs.open(drive, cache_bytes="8MiB") as store:
        assert store.check() == [] and store.derived_usage() == []
