"""What an engine plug-in refuses, and why. The store's own errors (kvfs.errors) pass through unchanged."""

from kvfs.errors import KvfsError


class EngineError(KvfsError):
    """Something between an inference engine and the store that would have given wrong tokens."""


class UnsupportedModel(EngineError):
    """The model's attention is of a kind that kvfs cannot keep or compute (the message says which)."""


class UnsupportedMask(EngineError):
    """A query does not see one contiguous range of positions, or the mask does not fit the stored tokens."""


class WrongAttention(EngineError):
    """Another attention implementation tried to compute with keys and values that are in the store."""


class CacheMismatch(EngineError):
    """The stored sequences belong to another model, another batch size, or another dtype."""
