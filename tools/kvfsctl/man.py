"""`kvfsctl man`: manual pages, made from what --help says."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from kvfsctl.output import EXIT_CODES, JsonOption, fail, print_json

MANUAL = "kvfs manual"


def man(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the pages go, such as man/man1.")],
    json_output: JsonOption = False,
):
    """Write a manual page for kvfsctl and for each of its verbs, as packages install them."""
    found = pages()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in found.items():
            (folder / name).write_text(text, "utf-8")
    except OSError as error:
        fail(f"{folder}: {error.strerror}")
    if json_output:
        print_json("man", folder=str(folder), pages=sorted(found))
    else:
        print(f"{folder}: {len(found)} pages; man {folder / 'kvfsctl.1'} shows the first")


def pages() -> dict[str, str]:
    """roff by file name."""
    from kvfsctl.main import app

    root = typer.main.get_command(app)
    verbs = {verb: command for verb, command in sorted(root.commands.items()) if not command.hidden}
    found = {"kvfsctl.1": _page(["kvfsctl"], root, verbs)}
    for verb, command in verbs.items():
        found[f"kvfsctl-{verb}.1"] = _page(["kvfsctl", verb], command, getattr(command, "commands", {}))
    return found


def _page(words: list[str], command, verbs: dict) -> str:
    name = "-".join(words)
    summary, _, rest = inspect.cleandoc(command.help or "").partition("\n\n")
    lines = [f'.TH {_roff(name.upper())} 1 "" "kvfs" "{MANUAL}"', ".ad l", ".SH NAME"]
    lines += [f"{_roff(name)} \\- {_roff(_one_line(summary).rstrip('.'))}", ".SH SYNOPSIS"]
    lines += [*_synopsis(words, command), ".SH DESCRIPTION", _roff(_one_line(summary)), *_paragraphs(rest)]
    if len(words) == 1:
        lines += [".SH VERBS"]
        for verb, each in verbs.items():
            first = inspect.cleandoc(each.help or "").partition("\n\n")[0]
            lines += [".TP", f".BR kvfsctl\\-{_roff(verb)} (1)", _roff(_one_line(first))]
        lines += [".SH OPTIONS", *_parameters(command)]
    elif verbs:
        lines += [".SH VERBS"]
        for verb, each in verbs.items():
            lines += [f".SS {_roff(verb)}", *_synopsis([*words, verb], each)]
            lines += [".PP", *_paragraphs(inspect.cleandoc(each.help or "")), *_parameters(each)]
    else:
        lines += [".SH ARGUMENTS AND OPTIONS", *_parameters(command)]
    lines += [".SH EXIT STATUS"]
    for code, (_, meaning) in EXIT_CODES.items():
        lines += [".TP", f".B {code}", _roff(meaning)]
    if len(words) == 1:
        lines += _files_and_environment()
    else:
        lines += [".SH SEE ALSO", ".BR kvfsctl (1)"]
    return "\n".join(lines) + "\n"


def _synopsis(words: list[str], command) -> list[str]:
    pieces = command.collect_usage_pieces(typer.Context(command))
    return [f".B {_roff(' '.join(words))}", _roff(" ".join(pieces))]


def _parameters(command) -> Iterator[str]:
    """As --help has them, and in its words."""
    context = typer.Context(command)
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:  # of what is hidden
            name, meaning = record
            yield from (".TP", f".B {_roff(name)}", _roff(_one_line(meaning)) or "\\&")


def _files_and_environment() -> Iterator[str]:
    from kvfs.configuration import FIELDS, SYSTEM_FILE, VARIABLE_OF_FILE, variable_of

    yield from (".SH FILES", f"{SYSTEM_FILE}, ~/.config/kvfs/kvfs.toml: TOML, the second above the first.")
    for name, field in FIELDS.items():
        yield from (".TP", f".B {_roff(name)}", _roff(f"{field.meaning} (default: {field.default})"))
    yield from (".SH ENVIRONMENT", ".TP", f".B {VARIABLE_OF_FILE}", "One file to be read instead of these.")
    for name in FIELDS:
        yield from (".TP", f".B {variable_of(name)}", _roff(f"Above {name} of the files."))
    yield from (".TP", ".B NO_COLOR", _roff("Where it is set, nothing is coloured, as with --no-color."))


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in filter(None, text.split("\n\n")):
        yield from (".PP", _roff(_one_line(paragraph)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _roff(text: str) -> str:
    """Text as it is to be read: nothing in it is a request or an escape."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped)
