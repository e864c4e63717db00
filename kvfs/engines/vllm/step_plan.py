"""What the scheduler's half of the connector tells the workers' half, once for each step of the engine."""

from dataclasses import dataclass, field
from typing import NamedTuple


class BlockTransfer(NamedTuple):
    """Blocks of one request: key i names what is in block_ids[i] of vLLM's pool."""

    request_id: str
    keys: list[bytes]
    block_ids: list[int]


@dataclass
class Transfers:
    """loads: into blocks that the engine leaves alone until they are reported; saves: of blocks that are full
    once this step has run; computes: whether the model runs in this step."""

    loads: list[BlockTransfer] = field(default_factory=list)
    saves: list[BlockTransfer] = field(default_factory=list)
    computes: bool = True
