"""kvfs.open: from a path and options to an open store."""

from collections.abc import Callable

from accel.workers import load_worker
from kvfs.embedded_drive import CollectorOptions, DriveConfig, open_drive
from kvfs.errors import InvalidArgument
from kvfs.sizes import parse_size
from kvfs.store import DEFAULT_CACHE_BYTES, DEFAULT_TAIL_BYTES, Store


def open(
    path,
    *,
    cache_bytes: int | str = DEFAULT_CACHE_BYTES,
    num_workers: int | None = None,
    worker: str = "numba",
    writeback_tokens: int | None = None,
    tail_bytes: int | str = DEFAULT_TAIL_BYTES,
    collection: str = "greedy",
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Open the drive in a file.

    cache_bytes: the drive's DRAM cache; num_workers: its compute threads, None for one per CPU; worker:
    "numba" or "reference"; writeback_tokens: how many tokens per sequence, layer and head wait in host
    memory before they are written, None for a whole token group; tail_bytes: host memory for such tokens of
    all sequences, beyond which those not used longest are stored and leave memory (what one call works on
    stays, however large); collection: how the drive chooses what to collect, "greedy", "cost-benefit" or
    "d-choices"; progress: called with (done, all) while a drive without a checkpoint is scanned.

    Raises NotADrive, DriveBusy (with the pid), MediaFailure, InvalidArgument.
    """
    try:
        config = DriveConfig(
            cache_bytes=parse_size(cache_bytes),
            num_workers=num_workers,
            worker=worker,
            collector=CollectorOptions(policy=collection),
            progress=progress,
        )
        tail_limit = parse_size(tail_bytes)
        load_worker(worker)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    except KeyError as error:
        raise InvalidArgument(str(error.args[0])) from error
    return Store(
        open_drive(path, config),
        path,
        worker=worker,
        writeback_tokens=writeback_tokens,
        tail_bytes=tail_limit,
    )
