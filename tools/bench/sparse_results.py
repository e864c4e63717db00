"""What was measured so far: a file of JSON lines, so that a run that was stopped goes on where it was.

The first line says what is measured; a file of anything else is refused.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """kind: "quality" or "needles"; num_tokens: predicted ones of the text"""

    kind: str
    context: int
    text: int
    scheme: str
    label: str
    num_tokens: int


class Results:
    def __init__(self, path: Path, about: dict):
        """about: of JSON's types. Raises ValueError for a file of another run."""
        self._path = path
        self._measured: dict[Point, dict] = {}
        about = json.loads(json.dumps(about))
        if not path.exists():
            self._append(about)
        first, *lines = path.read_text().split("\n")
        if json.loads(first) != about:
            raise ValueError(f"{path} is of another run: {first}")
        for line in lines[:-1]:  # what is behind the last newline was not finished
            self._take(**json.loads(line))
        if lines[-1]:
            path.write_text("\n".join([first, *lines[:-1], ""]))

    def _take(self, point: dict, found: dict) -> None:
        self._measured[Point(**point)] = found

    def _append(self, line: dict) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def __contains__(self, point: Point) -> bool:
        return point in self._measured

    def __iter__(self) -> Iterator[tuple[Point, dict]]:
        yield from self._measured.items()

    def add(self, point: Point, found: dict) -> None:
        self._append({"point": vars(point), "found": found})
        self._take(vars(point), found)
