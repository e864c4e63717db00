"""kvfs: the KV cache of language models on flash, with attention computed where the data lies."""

from kvfs import errors
from kvfs.drive_set.drive_set import DriveSet
from kvfs.embedded_drive import Geometry
from kvfs.errors import KvfsError, NvmeStatusError
from kvfs.formatting import format
from kvfs.model import Model
from kvfs.opening import open
from kvfs.sequence import Sequence
from kvfs.store import Store

__version__ = "0.1.0"
__all__ = [
    "DriveSet",
    "Geometry",
    "KvfsError",
    "Model",
    "NvmeStatusError",
    "Sequence",
    "Store",
    "__version__",
    "errors",
    "format",
    "open",
]
