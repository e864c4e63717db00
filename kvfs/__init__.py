"""kvfs: the KV cache of language models on flash, with attention computed where the data lies.

What is named here is imported when it is first used: opening a drive takes numba, asking a mounted one not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvfs import errors
from kvfs.errors import KvfsError, NvmeStatusError

if TYPE_CHECKING:
    from kvfs.drive_set.drive_set import DriveSet
    from kvfs.embedded_drive import Geometry
    from kvfs.formatting import format
    from kvfs.model import Model
    from kvfs.objects.object_cache import ObjectCache
    from kvfs.opening import open
    from kvfs.prefix.match import PrefixMatch
    from kvfs.sequence import Sequence
    from kvfs.sparse import PageCounts, Sparf
    from kvfs.store import Store

__version__ = "0.1.0"
__all__ = [
    "DriveSet",
    "Geometry",
    "KvfsError",
    "Model",
    "NvmeStatusError",
    "ObjectCache",
    "PageCounts",
    "PrefixMatch",
    "Sequence",
    "Sparf",
    "Store",
    "__version__",
    "errors",
    "format",
    "open",
]
_MODULE_OF = {
    "DriveSet": "kvfs.drive_set.drive_set",
    "Geometry": "kvfs.embedded_drive",
    "Model": "kvfs.model",
    "ObjectCache": "kvfs.objects.object_cache",
    "PageCounts": "kvfs.sparse",
    "PrefixMatch": "kvfs.prefix.match",
    "Sequence": "kvfs.sequence",
    "Sparf": "kvfs.sparse",
    "Store": "kvfs.store",
    "format": "kvfs.formatting",
    "open": "kvfs.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
