"""What a store must hold, and what it may hold: told of every change before the store is.

A sequence passes through versions. A completed flush promises the newest one; until then the drive may come
back with the last promised version or any later one, whole. Names and models are one history: what is found
after a power cut must be one of its moments, at or after the last flush.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from kvfs.errors import OutOfSpace

from .file_oracle import FileOracle, Mismatch
from .token_content import ModelShape


class Lost(AssertionError):
    """The store does not hold what it must, or holds what it must not."""


@dataclass(frozen=True, eq=False)
class Version:
    """One state of a sequence. stamps: uint32 [num_layers, num_tokens]; token_ids: uint32 [any number]."""

    stamps: np.ndarray
    token_ids: np.ndarray

    @property
    def num_tokens(self) -> int:
        return self.stamps.shape[1]

    def __eq__(self, other) -> bool:
        return np.array_equal(self.stamps, other.stamps) and np.array_equal(self.token_ids, other.token_ids)

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens and {len(self.token_ids)} ids"


@dataclass(eq=False)
class SequenceState:
    """One sequence, whatever its name. layers: stamps of each layer, which differ while a pass runs."""

    shape: ModelShape
    layers: list[np.ndarray]
    token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    versions: list[Version] = field(default_factory=list)  # the first is promised, the last is now

    def __post_init__(self):
        self.versions.append(self._now())

    @classmethod
    def empty(cls, shape: ModelShape) -> "SequenceState":
        return cls(shape, [np.empty(0, np.uint32) for _ in range(shape.num_layers)])

    @property
    def num_tokens(self) -> int:
        return min(len(stamps) for stamps in self.layers)

    def _now(self) -> Version:
        count = self.num_tokens
        return Version(np.stack([stamps[:count] for stamps in self.layers]), self.token_ids)

    def _note(self) -> None:
        now = self._now()
        if now != self.versions[-1]:
            self.versions.append(now)

    def append(self, layer: int, stamps: np.ndarray) -> None:
        self.layers[layer] = np.concatenate([self.layers[layer], stamps])
        self._note()

    def append_token_ids(self, token_ids: np.ndarray) -> None:
        self.token_ids = np.concatenate([self.token_ids, token_ids])
        self._note()

    def truncate(self, num_tokens: int) -> None:
        self.layers = [stamps[:num_tokens] for stamps in self.layers]
        self.token_ids = self.token_ids[:num_tokens]
        self._note()

    def fork(self) -> "SequenceState":
        count = self.num_tokens
        return SequenceState(self.shape, [stamps[:count] for stamps in self.layers], self.token_ids)

    def promise(self) -> None:
        """A flush has completed: no earlier version may come back."""
        del self.versions[:-1]

    def settle(self, version: Version) -> None:
        """This version is what was found; it is all there is from now on."""
        self.layers, self.token_ids = list(version.stamps), version.token_ids
        self.versions = [version]

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Changes made inside are taken back if the store refuses them (a power cut is no refusal)."""
        before = list(self.layers), self.token_ids, list(self.versions)
        try:
            yield
        except OutOfSpace:
            self.layers, self.token_ids, self.versions = before
            raise


@dataclass(frozen=True)
class Moment:
    """The names and models of one instant."""

    sequences: dict[str, SequenceState]
    models: frozenset[str]


class Oracle:
    """Names to states as they are now, and every moment since the last flush. files: the same of files."""

    def __init__(self) -> None:
        self.files = FileOracle()
        self.now = Moment({}, frozenset())
        self.history = [self.now]
        self._next_stamp = 1

    @property
    def sequences(self) -> dict[str, SequenceState]:
        return self.now.sequences

    def new_stamps(self, count: int) -> np.ndarray:
        first, self._next_stamp = self._next_stamp, self._next_stamp + count
        return np.arange(first, first + count, dtype=np.uint32)

    @contextmanager
    def attempt(
        self, sequences: dict[str, SequenceState] | None = None, models: frozenset[str] | None = None
    ) -> Iterator[None]:
        """The next moment; not to be if the store refuses it."""
        before, length = self.now, len(self.history)
        self.now = Moment(
            before.sequences if sequences is None else sequences, before.models if models is None else models
        )
        self.history.append(self.now)
        try:
            yield
        except OutOfSpace:
            self.now = before
            del self.history[length:]
            raise

    def promise(self, *names: str) -> None:
        """A flush of these sequences has completed; it covers all names and models."""
        for name in names:
            self.sequences[name].promise()
        self.history = [self.now]
        self.files.promise()

    def settle(
        self, found: dict[str, "FoundSequence"], models: frozenset[str], files: dict[str, bytes | None]
    ) -> None:
        """Compare with what a reopened store holds, which is the truth from now on. Raises Lost."""
        self.now = self.check(found, models, files)
        self.files.settle(files)
        self.history = [self.now]
        for name, sequence in found.items():
            state = self.sequences[name]
            state.settle(sequence.version_of(state))

    def check(
        self, found: dict[str, "FoundSequence"], models: frozenset[str], files: dict[str, bytes | None]
    ) -> Moment:
        """The moment that a reopened store has come back to. Raises Lost."""
        try:
            self.files.check(files)
        except Mismatch as error:
            raise Lost(str(error)) from error
        reasons = []
        for moment in reversed(self.history):
            reason = _mismatch(moment, found, models)
            if reason is None:
                return moment
            reasons.append(reason)
        raise Lost(
            "no moment since the last flush fits what is there:\n  " + "\n  ".join(dict.fromkeys(reasons))
        )


class FoundSequence:
    """What was read back of a sequence. words: per layer, as ModelShape.words has them."""

    def __init__(self, model: str, words: list[np.ndarray], token_ids: np.ndarray):
        self.model, self.words, self.token_ids = model, words, token_ids

    def version_of(self, state: SequenceState) -> Version | None:
        """The version of a state that this is, the newest if there are several."""
        if self.model != state.shape.name:
            return None
        return next((version for version in reversed(state.versions) if self._is(state.shape, version)), None)

    def _is(self, shape: ModelShape, version: Version) -> bool:
        if any(words.shape[1] != version.num_tokens for words in self.words):
            return False
        return np.array_equal(self.token_ids, version.token_ids) and all(
            np.array_equal(words, shape.words(layer, version.stamps[layer]))
            for layer, words in enumerate(self.words)
        )

    def __str__(self) -> str:
        return f"{[words.shape[1] for words in self.words]} tokens and {len(self.token_ids)} ids"


def _mismatch(moment: Moment, found: dict[str, FoundSequence], models: frozenset[str]) -> str | None:
    if models != moment.models:
        return f"models {sorted(models)} where there were {sorted(moment.models)}"
    if found.keys() != moment.sequences.keys():
        return f"names {sorted(found)} where there were {sorted(moment.sequences)}"
    for name, sequence in found.items():
        if sequence.version_of(moment.sequences[name]) is None:
            versions = ", ".join(str(version) for version in moment.sequences[name].versions[-8:])
            return f"{name!r} holds {sequence}, which it never did; its versions: {versions}"
    return None
