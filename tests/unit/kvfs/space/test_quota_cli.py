"""kvfsctl quota, evict, pin on a drive of its own."""

import json

import pytest
from typer.testing import CliRunner

import kvfs
from kvfsctl.main import app

from ..conftest import add_model, random_kv


@pytest.fixture
def drive(path):
    with kvfs.open(path, num_workers=1) as store:
        model = add_model(store, name="m", group_tokens=64)
        for name in "abc":
            sequence = store.create_sequence(model, name)
            for layer in range(model.num_layers):
                sequence.append(layer, *random_kv(64))
    return path


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_caps_pins_and_evictions(drive):
    """An administrator's way to all of it; dry runs that delete, or caps that are not stored."""
    call("pin", drive, "a", "--json")
    call("quota", "set", drive, "1MiB", "--model", "m", "--low", 90, "--json")
    (quota,) = call("quota", "ls", drive, "--json")["quotas"]
    assert (quota["model"], quota["capacity_bytes"], quota["used_bytes"]) == ("m", 1 << 20, 3 << 16)
    evict = ("evict", drive, "--model", "m", "--to", "64KiB", "--json")
    assert call(*evict, "--dry-run")["deleted"] == ["b", "c"]
    assert call(*evict, "--yes")["deleted"] == ["b", "c"]
    call("unpin", drive, "a", "--json")
    assert call("evict", drive, "--model", "m", "--to", "0", "--yes", "--json")["deleted"] == ["a"]
    assert CliRunner().invoke(app, ["evict", str(drive), "--yes"]).stdout == "nothing to delete\n"
    call("quota", "set", drive, "none", "--model", "m", "--json")
    assert call("quota", "ls", drive, "--json")["quotas"] == []


def test_background(drive):
    """A watermark that is not stored, or cannot be taken back."""
    nothing = {"expired": False, "high_percent": None, "low_percent": None}
    assert nothing.items() <= call("quota", "background", drive, "--json").items()
    call("quota", "background", drive, "--expired", "--high", 90, "--json")
    wanted = {"expired": True, "high_percent": 90, "low_percent": 80}
    assert wanted.items() <= call("quota", "background", drive, "--json").items()
    call("quota", "background", drive, "--off", "--json")
    assert nothing.items() <= call("quota", "background", drive, "--json").items()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["quota", "set", "DRIVE", "much"], "not a size"),
        (["quota", "set", "DRIVE", "none"], "no cap of all models"),
        (["quota", "set", "DRIVE", "1MiB", "--model", "x"], "no model named 'x'"),
        (["quota", "set", "DRIVE", "0"], "above zero"),
        (["evict", "DRIVE", "--to", "0", "--yes"], "no cap of all models"),
        (["quota", "background", "DRIVE", "--high", "100"], "high_percent is 1 to 99"),
        (["quota", "background", "DRIVE", "--low", "9"], "give both"),
        (["pin", "DRIVE", "x"], "no sequence named 'x'"),
    ],
)
def test_bad_input(drive, arguments, line):
    """One line that says what is wrong."""
    result = CliRunner().invoke(app, [str(drive) if each == "DRIVE" else each for each in arguments])
    assert result.exit_code != 0
    assert line in result.output + str(result.exception)
