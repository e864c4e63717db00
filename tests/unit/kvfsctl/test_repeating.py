"""INTERVAL and COUNT: one loop for all verbs that look more than once."""

import json

import pytest

from kvfsctl import repeating
from kvfsctl.repeating import repeat
from tests.unit.kvfsctl.command_line import kvfsctl


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping, and `take`, move."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            assert seconds >= 0
            self.now += seconds

    found = Clock()
    monkeypatch.setattr(repeating, "time", found)
    return found


@pytest.mark.parametrize(
    ("interval", "count", "at_once", "times"),
    [
        (None, None, True, [0]),
        (2.0, 1, True, [0]),
        (2.0, 3, True, [0, 2, 4]),
        (2.0, 3, False, [2, 4, 6]),
    ],
)
def test_on_time(clock, interval, count, at_once, times):
    """Looks that take long do not move those after them."""
    seen = []

    def show() -> None:
        seen.append(clock.now - 100)
        clock.now += 0.5

    repeat(show, interval, count, at_once=at_once)
    assert seen == times


def test_a_look_longer_than_the_interval(clock):
    """They follow each other at once, and no sleep is asked for that is below zero."""

    def show() -> None:
        clock.now += 3

    repeat(show, 1.0, 4)
    assert clock.now == 112


@pytest.mark.parametrize("verb", ["status", "stats", "top"])
@pytest.mark.parametrize("interval", ["nan", "inf", "0", "1e400", "soon", "1e9", "-1"])
def test_no_number_of_seconds(verb, interval, tmp_path):
    """Wrong usage that names what is wrong, before anything is opened."""
    done = kvfsctl(verb, tmp_path, interval, "1")
    assert done.returncode == 2
    assert repr(interval) in done.stderr.splitlines()[-1] or "No such option: -1" in done.stderr
    assert "Traceback" not in done.stderr
    assert kvfsctl(verb, tmp_path, "--", interval, "1").stderr.splitlines()[-1].endswith("from 0.1 to 86400")


def test_json_lines(tmp_path):
    """Whoever reads a line at a time gets an object of each, with the schema's number."""
    drive = tmp_path / "drive.kvfs"
    assert kvfsctl("format", drive, "--size", "48MiB").returncode == 0
    done = kvfsctl("status", drive, "0.1", "2", "--json")
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(look["schema"], look["verb"]) for look in looks] == [(1, "status")] * 2
