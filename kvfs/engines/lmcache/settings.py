"""What users set, the same for the adapter and the plug-in, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from kvfs.sizes import parse_size
from kvfs.space.admission import ADMISSIONS

DEFAULT_CACHE = "lmcache"


@dataclass(frozen=True)
class Settings:
    """path: a drive's file, a mount's folder, or a namespace's location, as kvfs.open takes them
    size: of the drive to format where there is none, in bytes or such as "64GiB"; None: there has to be one
    cache: the name of the cache of objects on the drive
    capacity_bytes: what it may take of the drive; None: as it was, at first the whole drive
    admission: "second-sight": chunks are stored when they are offered for the second time
    drive_cache_bytes: memory for what attention reads; chunks pass it by, so it is small
    num_threads: calls under way at once, of stores and of loads each
    flush_seconds: what was stored so long ago survives a kill of the engine or a power cut
    identity: what else the bytes depend on, as facts of the user's own (an engine's version, a serializer)
    """

    path: str
    size: int | str | None = None
    cache: str = DEFAULT_CACHE
    capacity_bytes: int | None = None
    admission: str = "all"
    drive_cache_bytes: int = 16 << 20
    num_threads: int = 2
    flush_seconds: float = 2.0
    identity: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping) -> "Settings":
        """From a mapping of names to values. Raises ValueError, with what is wrong in one line."""
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"kvfs does not know {', '.join(unknown)}: it knows {', '.join(names)}")
        path = values.get("path")
        if not isinstance(path, str) or not path:
            raise ValueError("kvfs needs path: a drive's file, the folder of a mount, or a location")
        known = dict(values)
        for name in ("size", "capacity_bytes", "drive_cache_bytes"):
            if known.get(name) is not None:
                known[name] = parse_size(known[name])
        settings = cls(**known)
        if not isinstance(settings.num_threads, int) or not 1 <= settings.num_threads <= 64:
            raise ValueError(f"kvfs: num_threads is 1 to 64, not {settings.num_threads!r}")
        if not isinstance(settings.flush_seconds, int | float) or not settings.flush_seconds > 0:
            raise ValueError(f"kvfs: flush_seconds is more than 0, not {settings.flush_seconds!r}")
        if settings.admission not in ADMISSIONS:
            raise ValueError(f"kvfs: admission is {' or '.join(ADMISSIONS)}, not {settings.admission!r}")
        if not isinstance(settings.identity, Mapping):
            raise ValueError(f"kvfs: identity is a mapping of names to values, not {settings.identity!r}")
        return settings
