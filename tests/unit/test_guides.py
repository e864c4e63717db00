"""The commands that README and the guides name exist, and so do the files that they point to."""

import re
from pathlib import Path

import pytest
import typer

from kvfsctl.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "tools/guides").glob("*.md"))]
COMMAND = re.compile(r"\bkvfsctl\s+([a-z][a-z-]*)(?:[ \n]([a-z][a-z-]*))?")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def problem(root, verb: str, word: str) -> str | None:
    command = root.commands.get(verb)
    if command is None:
        return f"kvfsctl {verb}"
    if hasattr(command, "commands") and word and word not in command.commands:
        return f"kvfsctl {verb} {word}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    root = typer.main.get_command(app)
    found = [problem(root, verb, word) for verb, word in COMMAND.findall(page.read_text())]
    assert [each for each in found if each] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = LINK.findall(page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
