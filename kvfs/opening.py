"""kvfs.open: from a path and options to an open store."""

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

from accel.workers import check_worker
from kvfs.drive_set.drive_set import DriveSet
from kvfs.drive_set.locations import Location, is_set, locations_of
from kvfs.drive_set.opening import open_set
from kvfs.embedded_drive import MIN_CACHE_BYTES, AttachedDrive, CollectorOptions, DriveConfig, open_drive
from kvfs.errors import InvalidArgument
from kvfs.remote.mounted import is_folder
from kvfs.remote.remote_store import RemoteStore
from kvfs.sizes import parse_size
from kvfs.space.background import EVERY_SECONDS
from kvfs.store import DEFAULT_CACHE_BYTES, DEFAULT_TAIL_BYTES, Store

OF_DRIVES = ("cache_bytes", "num_workers", "collection")  # options of the drive, rather than of its store


def open(
    path: Location | Sequence[Location],
    *,
    cache_bytes: int | str = DEFAULT_CACHE_BYTES,
    num_workers: int | None = None,
    worker: str = "numba",
    writeback_tokens: int | None = None,
    tail_bytes: int | str = DEFAULT_TAIL_BYTES,
    collection: str = "greedy",
    progress: Callable[[int, int], None] | None = None,
    degraded: bool = False,
    evict_every_s: float | None = EVERY_SECONDS,
) -> Store:
    """Open the drive in a file, the one that is mounted at a folder, or several drives as one store.

    path: of several drives a list of what names each, or a set's file, NAME.kvfs-set

    cache_bytes: the drive's DRAM cache; num_workers: its compute threads, None for one per CPU; worker:
    "numba", "reference" or "fpga"; writeback_tokens: how many tokens per sequence, layer and head wait in host
    memory before they are written, None for a whole token group (few cost flash: what was written in pieces of
    less than 256 KiB a layer is written once more when the group is full); tail_bytes: host memory for such
    tokens of all sequences, beyond which those not used longest are stored and leave memory (what one call
    works on stays, however large); collection: how the drive chooses what to collect, "greedy", "cost-benefit"
    or "d-choices"; progress: called with (done, all) while a drive without a checkpoint is scanned; degraded:
    also a set of drives of which some cannot be opened: what they hold is an error when it is used;
    evict_every_s: seconds between two looks of the background eviction, where that is turned on
    (Store.set_background_eviction), None: never. Of a set cache_bytes and tail_bytes are for all drives
    together (but no cache is smaller than a drive can have), num_workers for each (by default so many that all
    together are one per CPU).

    A mounted drive is used through the process that mounted it: what is returned is a RemoteStore, for several
    drives a DriveSet. Their interface is that of Store, so that is the type given to all. The options of a
    mounted drive are those of the mount, and given here they are an InvalidArgument. So are cache_bytes,
    num_workers and collection of a drive that `kvfsctl serve` has elsewhere; a set uses them for its other
    drives.

    Raises NotADrive, DriveBusy (with the pid), MediaFailure, InvalidArgument; for a folder also NotPermitted,
    TooManyClients, ServerGone; for a set DriveMissing, NotInSet; for one drive of a set alone DriveOfSet.
    """
    options = locals()
    if not is_set(path) and is_folder(path):
        given = [name for name, default in open.__kwdefaults__.items() if options[name] != default]
        if given:
            raise InvalidArgument(
                f"{', '.join(given)}: options of the mount at {os.fspath(path)}, not of its users"
            )
        return cast(Store, RemoteStore(path))
    num_drives = len(locations_of(path)) if is_set(path) else 1
    if num_workers is None and num_drives > 1:
        num_workers = max(1, len(os.sched_getaffinity(0)) // num_drives)
    try:
        config = DriveConfig(
            cache_bytes=_share(parse_size(cache_bytes), num_drives, MIN_CACHE_BYTES),
            num_workers=num_workers,
            worker=worker,
            collector=CollectorOptions(policy=collection),
            progress=progress,
        )
        tail_limit = parse_size(tail_bytes) // num_drives
        check_worker(worker)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    except KeyError as error:
        raise InvalidArgument(str(error.args[0])) from error
    of_store: dict[str, Any] = {
        "worker": worker,
        "writeback_tokens": writeback_tokens,
        "tail_bytes": tail_limit,
    }
    if evict_every_s is not None and not evict_every_s > 0:
        raise InvalidArgument(f"evict_every_s is a number of seconds above zero, or None, not {evict_every_s}")
    if is_set(path):
        opened: DriveSet = open_set(
            path,
            lambda location: _open_of_set(location, config, of_store),
            degraded,
            evict_every_s=evict_every_s,
        )
        return cast(Store, opened)
    if degraded:
        raise InvalidArgument("degraded is for sets of drives")
    drive = open_drive(path, config)
    if isinstance(drive, AttachedDrive):
        given = [name for name in OF_DRIVES if options[name] != open.__kwdefaults__[name]]
        if given:
            drive.close()
            raise InvalidArgument(
                f"{path}: {', '.join(given)}: chosen by who serves the drive, not by its users"
            )
    return Store(drive, path, evict_every_s=evict_every_s, **of_store)


def _share(total: int, num_drives: int, least: int) -> int:
    """Of one drive; what is too little for one is too little for each."""
    return min(total, max(total // num_drives, least))


def _open_of_set(location: str, config: DriveConfig, options: dict) -> Store:
    return Store(open_drive(location, config), location, in_set=True, **options)
