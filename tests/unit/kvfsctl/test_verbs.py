"""The command line as a user runs it: output, JSON, exit codes."""

import json

import numpy as np
import pytest

import kvfs
from tests.unit.kvfsctl.command_line import assert_asks, kvfsctl


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    path = tmp_path_factory.mktemp("drive") / "drive.kvfs"
    assert kvfsctl("format", path, "--size", "48MiB").returncode == 0
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = store.add_model("tiny", num_layers=1, num_query_heads=2, num_kv_heads=1, head_dim=64)
        for name in ("chat-1", "chat-2", "chat-3"):
            sequence = store.create_sequence(model, name)
            sequence.append(0, np.ones((300, 1, 64), np.float32), np.ones((300, 1, 64), np.float32))
    return path


def test_help_teaches():
    """--help: every verb says what it does."""
    result = kvfsctl("--help")
    assert result.returncode == 0
    for verb in ("format", "info", "ls", "stats", "rm", "check", "bench", "demo"):
        assert verb in result.stdout
        assert kvfsctl(verb, "--help").returncode == 0


def test_json_of_every_verb(drive):
    """Scripts: JSON with a schema number and plain integers."""
    for verb in ("info", "ls", "stats", "check"):
        result = kvfsctl(verb, drive, "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["schema"] == 1
        assert kvfsctl(verb, drive).returncode == 0
    listing = json.loads(kvfsctl("ls", drive, "--json").stdout)["sequences"]
    assert [row["name"] for row in listing] == ["chat-1", "chat-2", "chat-3"]
    assert listing[0]["num_tokens"] == 300
    assert listing[0]["size_bytes"] == 300 * 2 * 64 * 2
    assert json.loads(kvfsctl("ls", drive, "--model", "tiny", "--json").stdout)["sequences"] == listing


def test_rm_asks_first(drive):
    """rm: deletes only what it was told to, and not unasked."""
    assert_asks("rm", drive, "chat-3")
    assert kvfsctl("rm", drive, "chat-3", "--dry-run").returncode == 0
    result = kvfsctl("rm", drive, "chat-3", "nobody", "--yes")
    assert (result.returncode, result.stderr) == (1, "kvfsctl: no sequence named 'nobody'\n")
    assert "chat-3" in kvfsctl("ls", drive).stdout
    assert kvfsctl("rm", drive, "chat-3", "--yes").returncode == 0
    assert "chat-3" not in kvfsctl("ls", drive).stdout


def test_check_finds_damage(drive):
    """check: exit code 3 and the block's number when a page was flipped."""
    with kvfs.open(drive, cache_bytes="8MiB") as store:
        sequence = store.create_sequence(store.model("tiny"), "damaged")
        rows = np.arange(256 * 64, dtype=np.float32).reshape(256, 1, 64) % 2039
        sequence.append(0, rows, rows)
    needle = rows[:4].astype(np.float16).tobytes()
    offset = drive.read_bytes().rindex(needle)
    with drive.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xde\xad\xbe\xef")
    result = kvfsctl("check", drive)
    assert result.returncode == 3, result
    assert "LBA" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert kvfsctl("rm", drive, "damaged", "--yes").returncode == 0
    assert kvfsctl("check", drive).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("info", "/nonexistent/drive"), 1),
        (("info", "/dev/null"), 1),
        (("format", "/nonexistent/drive"), 1),
        (("format", "x", "--size", "huge"), 1),
        (("format", "x", "--page-size", "3 apples"), 2),
        (("ls", "/nonexistent/drive"), 1),
        (("nonsense",), 2),
        (("rm", "/nonexistent/drive", "a", "--yes"), 1),
        (("check", "/nonexistent/drive"), 1),
        (("bench", "nonsense"), 2),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, code):
    """Errors: the right exit code and no traceback."""
    result = kvfsctl(*arguments)
    assert result.returncode == code, result
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("kvfsctl: ")
