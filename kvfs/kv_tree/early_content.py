"""A snapshot's content for one who reads it, pieces of it early: it never changes."""

from collections.abc import Callable

from kvfs.kv_tree.nodes import OpenContent
from kvfs.read_ahead import ReadAhead


class EarlyContent(OpenContent):
    """One handle's view of a content. check: raises once the content is not to be had any more."""

    def __init__(self, content: OpenContent, check: Callable[[], None]):
        self.content = content
        self.size = content.size
        self._ahead = ReadAhead(content.read, lambda: content.size, lambda: check() or True)

    def read(self, offset: int, size: int) -> memoryview | bytes:
        return self._ahead.read(offset, size)

    def release(self) -> None:
        self._ahead.clear()
