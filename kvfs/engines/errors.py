"""What an engine plug-in refuses, and why. The store's own errors (kvfs.errors) pass through unchanged."""

from kvfs.errors import KvfsError, NvmeError, StoreClosed


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


class UnsupportedOption(EngineError):
    """An option of the engine that asks for another cache than kvfs."""


class CapReached(KvfsError):
    """Sessions that may be evicted are gone, and what is left is too much: the answer is not stored."""

    def __init__(self, num_bytes, capacity_bytes, num_sequences, max_sequences):
        self.num_bytes, self.capacity_bytes = num_bytes, capacity_bytes
        self.num_sequences, self.max_sequences = num_sequences, max_sequences
        caps = {"bytes": capacity_bytes, "sequences": max_sequences}
        told = " and ".join(f"{cap} {name}" for name, cap in caps.items() if cap is not None)
        super().__init__(
            f"what is open or pinned takes {num_bytes} bytes in {num_sequences} sequences,"
            f" which a cap of {told} does not hold"
        )


# What a drive, a mount or another process may do to work under way.
TROUBLE = (KvfsError, NvmeError, OSError)


def is_for_the_user(error):
    """Of TROUBLE: what nobody can go on from, or should without being told."""
    return isinstance(error, (EngineError, StoreClosed))
