"""The table of verbs: each can be loaded, and nothing that kvfsctl's help says is cut."""

from pathlib import Path

import pytest

import kvfsctl
from kvfsctl.verbs import VERBS, load
from tests.unit.kvfsctl.command_line import kvfsctl as run

FOLDER = Path(kvfsctl.__file__).parent


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_loads(verb):
    command = load(verb)
    assert command.name == verb
    assert command.help, "it says what it does"
    for below in getattr(command, "commands", {}).values():
        assert below.help


def test_every_line_fits():
    """80 columns, whole: a line that is cut says half of what matters."""
    shown = run("--help").stdout
    for name, verb in VERBS.items():
        assert f"  {name.ljust(max(map(len, VERBS)))}  {verb.line}\n" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_no_module_is_forgotten():
    """A module that makes a verb, and that no line of the table leads to."""
    known = {verb.place.partition(":")[0] for verb in VERBS.values()}
    for path in FOLDER.glob("*.py"):
        first = path.read_text().partition("\n")[0]
        if first.startswith('"""`kvfsctl ') and " ".join(first.split("`")[1].split()[1:]).isalpha():
            assert path.stem in known, path


def test_an_unknown_verb_is_not_loaded():
    failed = run("statsu")
    assert failed.returncode == 2 and "Did you mean" in failed.stderr
