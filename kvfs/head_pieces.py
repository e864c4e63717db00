"""What of single heads is read: named alike by stores here and by clients of a mount, who need no kernels."""

from dataclasses import dataclass

KEYS, VALUES = 0, 1


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of tokens [start, stop) of one KV head's keys (kind 0) or values (kind 1) in one layer."""

    layer: int
    kind: int
    head: int
    start: int
    stop: int
