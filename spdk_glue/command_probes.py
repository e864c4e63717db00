"""How long a namespace's commands take, by kind."""

import numpy as np

from spdk_glue.command import IoOpcode
from spdk_glue.probes import Probe, Probes


class CommandProbes:
    """What commands took, from the host's call to its completion; of several sent together each took as long as
    all. num_outstanding: commands under way.
    """

    def __init__(self):
        self.read, self.attention, self._other = (
            Probe("queue", name) for name in ("read", "attention", "other")
        )
        self.written = Probe("queue", "write_behind", is_wait=True)  # until the host looks whether it is done
        self._by_opcode = {
            IoOpcode.READ: self.read,
            IoOpcode.WRITE: Probe("queue", "write"),
            IoOpcode.FLUSH: Probe("queue", "flush"),
            IoOpcode.DATASET_MANAGEMENT: Probe("queue", "deallocate"),
            IoOpcode.VERIFY: Probe("queue", "verify"),
            IoOpcode.ATTENTION_SUBMIT: Probe("queue", "attention_submit"),
            IoOpcode.ATTENTION_FETCH: Probe("queue", "attention_fetch"),
            IoOpcode.SEAL_GROUPS: Probe("queue", "seal"),
        }
        self.all = Probes(*self._by_opcode.values(), self.written, self.attention, self._other)
        self.num_outstanding = 0

    def of(self, entries: np.ndarray) -> Probe:
        """Commands that are sent together are of one kind, but for Submit with its Fetch."""
        opcode = int(entries["opcode"][0])
        if opcode == IoOpcode.ATTENTION_SUBMIT and len(entries) > 1:
            return self.attention
        return self._by_opcode.get(opcode, self._other)
