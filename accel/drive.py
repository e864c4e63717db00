"""An embedded drive: flash media, FTL, cache, attention unit and NVMe controller, put together.

The only place that names the concrete classes. Layers open bottom-up on an ExitStack, so a failed step
undoes the earlier ones.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from accel.admin_commands import AdminCommands
from accel.attention_unit import AttentionUnit
from accel.block_commands import BlockCommands
from accel.drive_probes import DriveProbes
from accel.page_cache import PageCache
from accel.sealing import Sealing
from accel.vendor_commands import VendorCommands
from accel.workers import load_worker
from ftl import errors as flash_errors
from ftl.direct_io.api import io_uring_works
from ftl.geometry import Geometry
from ftl.media import FlashMedia
from ftl.media_location import LockedNamespace, create_media, lock_namespace, media_on, open_media
from ftl.media_namespace import holds_flash
from ftl.media_timed import TimedMedia
from ftl.translation import CHECKPOINT_PAGES, CollectorOptions, FlashTranslationLayer
from spdk_glue.controller import Controller
from spdk_glue.transports.inproc import InprocTransport

# what a host that embeds a drive needs to know of the flash below it
__all__ = [
    "CollectorOptions",
    "Drive",
    "DriveConfig",
    "Geometry",
    "LockedNamespace",
    "flash_errors",
    "holds_flash",
    "io_uring_works",
    "lock_namespace",
    "media_on",
]

DEFAULT_CACHE_BYTES = 256 << 20
MIN_CACHE_BYTES = 8 << 20  # a few windows of the attention unit


@dataclass(frozen=True)
class DriveConfig:
    """Options of an embedded drive.

    cache_bytes: DRAM read cache; num_workers: compute threads, None for one per CPU this process may
    use; worker: a name of accel.workers.WORKERS; num_command_threads: 0 to run background commands where
    they are submitted and to collect only when a write needs room, so that the drive does the same thing
    each time; collector: see ftl.collector; checkpoint_pages: pages programmed between two checkpoints of the
    map, at least; progress: called with (superblocks scanned, superblocks to scan) while the drive opens.
    """

    cache_bytes: int = DEFAULT_CACHE_BYTES
    num_workers: int | None = None
    worker: str = "numba"
    num_command_threads: int = 2
    read_only: bool = False
    collector: CollectorOptions = field(default_factory=CollectorOptions)
    checkpoint_pages: int = CHECKPOINT_PAGES
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self):
        if self.cache_bytes < MIN_CACHE_BYTES:
            raise ValueError(f"cache_bytes is at least {MIN_CACHE_BYTES}, not {self.cache_bytes}")
        if self.num_workers is not None and not 1 <= self.num_workers <= 1024:
            raise ValueError(f"num_workers is 1 to 1024, not {self.num_workers}")
        if self.num_command_threads < 0:
            raise ValueError(f"num_command_threads is not negative: {self.num_command_threads}")

    @property
    def worker_count(self) -> int:
        return self.num_workers or len(os.sched_getaffinity(0))


class Drive:
    """A drive in this process; hosts connect through `transport`."""

    def __init__(self, ftl: FlashTranslationLayer, config: DriveConfig, stack: ExitStack):
        self._stack = stack
        self.ftl = ftl
        self.cache = PageCache(config.cache_bytes, ftl.page_size, ftl.geometry.num_pages)
        self.probes = DriveProbes(*getattr(ftl.media, "probes", ()))
        self.attention_unit = AttentionUnit(
            ftl,
            self.cache,
            load_worker(config.worker),
            config.worker_count,
            self.probes,
            reads_ahead=config.num_command_threads > 0,
        )
        stack.callback(self.attention_unit.close)
        self.sealing = Sealing(ftl, in_background=config.num_command_threads > 0)
        stack.callback(self.sealing.close)
        admin = AdminCommands(ftl, self.attention_unit, self.cache, config.worker, self.probes.all)
        blocks = BlockCommands(ftl, self.probes)
        self.controller = controller = Controller(
            {**blocks.handlers(), **VendorCommands(self.attention_unit, self.sealing).handlers()},
            admin.handlers(),
            blocks.batch_handlers(),
        )
        admin.error_log = controller.error_log
        self.transport = InprocTransport(
            controller, config.num_command_threads, ftl.read_run, self.attention_unit.attend_now
        )
        stack.callback(self.transport.close)

    @property
    def page_map(self) -> int | None:
        """See ftl.translation."""
        return self.ftl.page_map

    def count_reads(self, num_pages: int) -> None:
        self.ftl.count_reads(num_pages)

    @staticmethod
    def format(
        location: str | os.PathLike,
        geometry: Geometry | None = None,
        *,
        size_bytes: int | None = None,
        overwrite: bool = False,
        **options: int,
    ) -> None:
        """Make an empty drive in a new file or on an NVMe namespace: see ftl.media_location.create_media.

        Raises FlashError, NvmeError, OSError (FileExistsError), ValueError.
        """
        with ExitStack() as stack:
            media = create_media(location, geometry, size_bytes, overwrite, **options)
            stack.callback(media.close)
            stack.callback(FlashTranslationLayer.format(media).close)

    @classmethod
    def open(cls, location: str | os.PathLike, config: DriveConfig | None = None) -> "Drive":
        """Open a drive by its location, recovering after an unclean end.

        Raises FlashError, NvmeError, OSError.
        """
        config = config or DriveConfig()
        return cls.over(open_media(location, config.read_only), config)

    @classmethod
    def over(cls, media: FlashMedia, config: DriveConfig) -> "Drive":
        """Open a drive on media, which it closes in the end. Raises FlashError."""
        with ExitStack() as stack:
            stack.callback(media.close)
            ftl = FlashTranslationLayer.open(
                TimedMedia(media),
                config.collector,
                background=config.num_command_threads > 0,
                checkpoint_pages=config.checkpoint_pages,
                progress=config.progress,
            )
            stack.callback(ftl.close)
            drive = cls(ftl, config, stack)
            drive._stack = stack.pop_all()
            return drive

    def close(self) -> None:
        self._stack.close()
