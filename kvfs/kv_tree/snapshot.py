"""A sequence as it was when a file was looked up: what an open file reads, whatever is appended meanwhile."""

import errno
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from kvfs.errors import InvalidArgument
from kvfs.head_pieces import HeadRows
from kvfs.sequence import Sequence
from kvfs.sequence_version import Version
from kvfs.tree import FileError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """num_token_ids: how many token ids there were, which need not be one per token."""

    sequence: Sequence
    version: Version
    num_token_ids: int

    @classmethod
    def of(cls, sequence: Sequence) -> "Snapshot":
        return cls(sequence, sequence.version(), sequence.num_token_ids)

    @property
    def key(self) -> tuple:
        return (self.version.num_tokens, self.version.epoch, self.num_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.version.num_tokens

    def check(self) -> None:
        """Raises FileError ESTALE once the sequence has lost a token of the snapshot."""
        if not self.sequence.holds(self.version):
            raise FileError(errno.ESTALE)

    def read_heads(self, pieces: Items[HeadRows]) -> memoryview:
        """As Sequence.read_heads, of tokens in the snapshot. Raises FileError ESTALE."""
        try:
            rows = self.sequence.read_heads(pieces)
        except InvalidArgument:
            self.check()
            raise
        self.check()  # after reading: what was cut off and appended anew meanwhile was not the snapshot's
        return rows

    def fork(self, name: str, attributes: Mapping[str, bytes]) -> None:
        """A new sequence of the snapshot's tokens, durable, with these attributes beside those it inherits.

        Raises FileError ESTALE, SequenceExists.
        """
        child = self.sequence.fork(name)
        try:
            self.check()
            if child.num_tokens > self.num_tokens:
                child.truncate(self.num_tokens)
            for attribute, value in attributes.items():
                child.set_attribute(attribute, value)
            child.flush()
        except BaseException:
            if not child.is_deleted:
                self.sequence.store.delete_sequence(child.name)
            raise

    def token_ids(self) -> np.ndarray:
        """uint32 [num_token_ids]. Raises FileError ESTALE."""
        token_ids = self.sequence.tokens[: self.num_token_ids]
        self.check()
        return token_ids
