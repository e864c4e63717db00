"""The troubleshooting page has every message that kvfs's errors and log lines can have, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs import errors

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "tools/guides/troubleshooting.md"
PACKAGES = ("kvfs", "ftl", "accel", "spdk_glue", "tools/kvfsctl")


class Varying(str):
    """Stands for a value of any kind, smaller than any number."""

    def __lt__(self, other):
        return True


VARIES = Varying("…")
MIN_WORDS = 3  # of a message's own: what is told by another error altogether has its entry there
# these say in each case what was given and what is wanted
SELF_EXPLANATORY = {"InvalidArgument", "NvmeStatusError", "BadLocation"}
CLASSES = {found.__name__: found for found in errors.ERRNO if found.__name__ not in SELF_EXPLANATORY}
ARGUMENTS = {  # where an ellipsis is no value
    "DriveMissing": [([VARIES], 1)],
    "ModelMismatch": [({VARIES: (VARIES, VARIES)}, 1)],
}
LOG_METHODS = {"warning", "error", "exception"}


def template(node: ast.expr) -> str:
    """A message's text with an ellipsis for each part that varies."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VARIES for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return VARIES


def plain(text: str) -> str:
    """One line, as it is compared: what varies may be several words and marks."""
    return re.sub(rf"{VARIES}(?:[ ,:]*{VARIES})+", VARIES, " ".join(text.split()))


def calls() -> Iterator[ast.Call]:
    """Also `raise StoreClosed`, as if it were called."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield node
                elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name):
                    yield ast.Call(node.exc, args=[], keywords=[])


def name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def error_message(call: ast.Call) -> str:
    name = name_of(call.func)
    values = [None if is_none(node) else Varying(template(node)) for node in call.args]
    for value, position in ARGUMENTS.get(name, ()):
        values[position] = value
    if name == "NvmeError":
        values = values[:1]
    return str(CLASSES[name](*values))


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def log_message(call: ast.Call) -> str:
    return re.sub(r"%[#.0-9]*[a-z]", VARIES, template(call.args[0]).replace("%%", "%"))


def is_log_line(call: ast.Call) -> bool:
    function = call.func
    is_of_log = isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "log"
    return is_of_log and function.attr in LOG_METHODS


def messages() -> set[str]:
    found = set()
    for call in calls():
        if is_log_line(call):
            found.add(plain(log_message(call)))
        elif name_of(call.func) in CLASSES:
            found.add(plain(error_message(call)))
    return {message for message in found if len(re.findall(r"\w+", message)) >= MIN_WORDS}


def documented() -> list[str]:
    """Lines of the page's blocks that are not of a language."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def real() -> set[str]:
    return messages()


def test_every_message_has_an_entry(real):
    assert sorted(real - set(documented())) == []


def test_every_entry_is_a_message(real):
    assert sorted(set(documented()) - real) == []


def test_no_message_comes_twice():
    lines = documented()
    assert sorted({line for line in lines if lines.count(line) > 1}) == []
