"""Sets of drives as a user runs them: format, info, ls, check, scrub, df, rm, and the verbs of `drive`."""

import json
import os

import numpy as np
import pytest

import kvfs
from kvfs.administration import leftovers as machine
from kvfs.owner_process import this_process
from kvfs.sequence_attributes import OWNER
from tests.unit.kvfsctl.command_line import assert_asks, kvfsctl


@pytest.fixture
def pool(tmp_path):
    """A set's file, of two drives with a sequence."""
    pool = tmp_path / "pool.kvfs-set"
    drives = [f"--drive={tmp_path / name}.kvfs" for name in "ab"]
    result = kvfsctl("format", pool, *drives, "--size", "48MiB")
    assert result.returncode == 0 and "set of 2 drives" in result.stdout, result.stderr
    with kvfs.open(pool, cache_bytes="16MiB") as store:
        model = store.add_model("tiny", num_layers=1, num_query_heads=2, num_kv_heads=2, head_dim=64)
        sequence = store.create_sequence(model, "chat")
        rows = np.arange(300 * 128, dtype=np.float32).reshape(300, 2, 64) % 2039
        sequence.append(0, rows, -rows)
    return pool


def in_json(*arguments):
    result = kvfsctl(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_looking(pool):
    """A set is looked into as a drive is."""
    assert [s["name"] for s in in_json("ls", pool)["sequences"]] == ["chat"]
    assert [d["state"] for d in in_json("info", pool)["drives"]] == ["in use", "in use"]
    assert [d["num_kv_heads"] for d in in_json("drive", "list", pool)["drives"]] == [1, 1]
    assert len(in_json("df", pool)["drives"]) == 2
    assert len(in_json("stats", pool)["counters"]["drives"]) == 2
    found = in_json("check", pool)
    assert found["num_sequences"] == 1 and [d["problems"] for d in found["drives"]] == [[], []]
    assert [d["lost"] for d in in_json("scrub", pool)["drives"]] == [[], []]
    for verb in ("info", "stats", "df", "check", "scrub"):
        assert kvfsctl(verb, pool).returncode == 0
    assert "a.kvfs" in kvfsctl("drive", "list", pool).stdout


def test_adding_and_draining(pool, tmp_path):
    """The set's file follows."""
    assert kvfsctl("format", tmp_path / "c.kvfs", "--size", "48MiB").returncode == 0
    in_json("drive", "add", pool, tmp_path / "c.kvfs")
    moved = in_json("drive", "drain", pool, tmp_path / "b.kvfs")
    assert moved["moved_bytes"] == 300 * 64 * 2 * 2
    assert 'drives = ["a.kvfs", "c.kvfs"]' in pool.read_text()
    with kvfs.open(pool, cache_bytes="16MiB") as store:
        assert store.sequence("chat").read(0)[0].shape == (300, 2, 64)


def test_a_missing_drive(pool, tmp_path):
    """One line that names it; what can go on does, if it is asked to."""
    os.rename(tmp_path / "b.kvfs", tmp_path / "away")
    result = kvfsctl("ls", pool)
    assert result.returncode == 1 and "b.kvfs" in result.stderr and result.stderr.count("\n") == 1
    assert [d["state"] for d in in_json("drive", "list", pool)["drives"]] == ["in use", "lost"]
    assert kvfsctl("rm", pool, "chat", "--yes").returncode == 1
    assert kvfsctl("drive", "remove", pool, tmp_path / "b.kvfs").returncode == 2
    in_json("rm", pool, "chat", "--lost", "--yes")
    in_json("drive", "remove", pool, tmp_path / "b.kvfs", "--yes")
    assert in_json("ls", pool)["sequences"] == []


def test_errors_are_one_line(pool, tmp_path):
    """What cannot be done leaves the set as it was."""
    kvfs.format(tmp_path / "c.kvfs", "48MiB")
    cases = [
        (("drive", "drain", pool, "nowhere"), 1, "no drive of this set"),
        (("drive", "add", pool, tmp_path / "a.kvfs"), 1, "in this set already"),
        (("drive", "list", tmp_path / "c.kvfs"), 1, "one drive, not a set"),
        (("format", tmp_path / "d.kvfs", "--drive", tmp_path / "e.kvfs"), 2, "kvfs-set"),
        (("format", tmp_path / "d.kvfs-set"), 2, "--drive"),
        (("format", pool, "--drive", tmp_path / "e.kvfs"), 1, "exists"),
        (("ls", tmp_path / "a.kvfs"), 1, "one drive of a set"),
        (("drive", "return", pool, tmp_path / "a.kvfs"), 1, "not lost"),
    ]
    for arguments, code, text in cases:
        result = kvfsctl(*arguments)
        assert result.returncode == code and text in result.stderr, (arguments, result.stderr)
        assert code == 2 or result.stderr.count("\n") == 1
    assert not (tmp_path / "e.kvfs").exists()
    assert [s["name"] for s in in_json("ls", pool)["sequences"]] == ["chat"]


def test_models_of_a_set(pool):
    """One with sequences stays; one without goes from all drives, and does not come back."""
    refused = kvfsctl("model", "rm", pool, "tiny", "--yes")
    assert refused.returncode == 1 and "has 1 sequences" in refused.stderr
    in_json("rm", pool, "chat", "--yes")
    assert_asks("model", "rm", pool, "tiny")
    assert kvfsctl("model", "rm", pool, "tiny", "--dry-run").stdout == "would delete model tiny\n"
    assert [each["num_sequences"] for each in in_json("model", "ls", pool)["models"]] == [0]
    assert kvfsctl("model", "rm", pool, "tiny", "--yes").stdout == "deleted model tiny\n"
    assert in_json("model", "ls", pool)["models"] == []
    assert kvfsctl("model", "rm", pool, "tiny", "--yes").returncode == 1


def test_leftovers_of_a_set(pool, monkeypatch):
    """Shown until somebody asks for them to go: then whole, on all drives."""
    monkeypatch.setattr(machine, "machine_leftovers", list)
    host, _, rest = this_process().partition(b" ")
    boot = rest.partition(b" ")[2]
    with kvfs.open(pool, cache_bytes="16MiB") as store:
        store.sequence("chat").fork("left").set_attribute(OWNER, host + b" another-boot " + boot)
    (left,) = in_json("leftovers", pool)["sequences"]
    assert (left["name"], left["num_tokens"], left["is_certain"]) == ("left", 300, True)
    assert_asks("leftovers", pool, "--clean")
    assert "removed sequence left" in kvfsctl("leftovers", pool, "--clean", "--yes").stdout
    assert [each["name"] for each in in_json("ls", pool)["sequences"]] == ["chat"]
    assert in_json("leftovers", pool)["sequences"] == []
    assert [each["problems"] for each in in_json("check", pool)["drives"]] == [[], []]


def test_df_of_a_set_by_kind(pool, tmp_path):
    """Of each drive two sums that come to all its flash, and a table of each for people."""
    kinds = in_json("df", pool)["kinds"]
    assert [usage["drive"] for usage in kinds] == [str(tmp_path / f"{name}.kvfs") for name in "ab"]
    for usage in kinds:
        assert sum(usage["blocks"].values()) == sum(usage["pages"].values()) == usage["media_bytes"]
        assert usage["blocks"]["groups"] + usage["blocks"]["tails"] >= 300 * 64 * 2 * 2  # one head of two
    assert kvfsctl("df", pool).stdout.count("waits for collection") == 2
