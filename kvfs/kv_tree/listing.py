"""A folder's names while it is being listed: by position, with few pages of them in memory."""

from collections import deque
from collections.abc import Callable, Iterator

KEPT_PAGES = 3  # a reader that goes back a little finds what it has seen


class Listing:
    """Names that come or go meanwhile may be there or not; no other is left out, or there twice.

    pages: begins anew with each call
    """

    def __init__(self, pages: Callable[[], Iterator[list[str]]]):
        self._pages = pages
        self._begin()

    def _begin(self) -> None:
        self._rest = self._pages()
        self._kept: deque[tuple[int, list[str]]] = deque([(0, [])], KEPT_PAGES)  # position of the first, names

    def behind(self, position: int) -> Iterator[tuple[str, int]]:
        """(name, its position) of those behind a position; 0: all. Whoever goes back far begins anew."""
        if position < self._kept[0][0]:
            self._begin()
        for start, names in tuple(self._kept):
            yield from _behind(position, start, names)
        while (names := next(self._rest, None)) is not None:
            last, before = self._kept[-1]
            start = last + len(before)
            self._kept.append((start, names))
            yield from _behind(position, start, names)


def _behind(position: int, start: int, names: list[str]) -> Iterator[tuple[str, int]]:
    for index in range(max(position - start, 0), len(names)):
        yield names[index], start + index + 1
