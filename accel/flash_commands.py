"""What an administrator sees and asks of the flash: health log pages, allocated blocks, maintenance."""

from collections.abc import Callable, Sequence

import numpy as np

from accel.block_commands import flash_errors_as_status
from accel.page_cache import PageCache
from ftl.check import Finding
from ftl.mapping import PAGE_NONE
from ftl.page_writer import GC_STREAM
from ftl.provisioning import spare_left
from ftl.superblocks import State
from ftl.translation import FlashTranslationLayer
from spdk_glue.command import (
    LBA_STATUS_ALLOCATED,
    LBA_STATUS_DESCRIPTOR,
    LBA_STATUS_HEADER,
    AdminOpcode,
    Maintenance,
)
from spdk_glue.controller import Handler, Request
from spdk_glue.identify import (
    FLASH_CHECK_HEADER,
    FLASH_FINDING,
    FLASH_HEALTH_LOG,
    MAX_FINDINGS,
    NOT_GIVEN,
    SMART_LOG,
    STREAM_COLLECTED,
    SUPERBLOCK_RECORD,
    WARNING_READ_ONLY,
    WARNING_SPARE,
    WEAR_BINS,
    LogPage,
)
from spdk_glue.status import CommandFailed, Status

BYTES_PER_DATA_UNIT = 512 * 1000
SPARE_THRESHOLD_PERCENT = 10
LBAS_AT_ONCE = 1 << 16


class FlashCommands:
    """Get LBA Status and FLASH_MAINTENANCE, and the log pages of the flash by their identifiers."""

    def __init__(self, ftl: FlashTranslationLayer, cache: PageCache):
        self._ftl = ftl
        self._cache = cache
        self._findings: list[Finding] = []  # of the latest check

    def handlers(self) -> dict[int, Handler]:
        return {
            AdminOpcode.GET_LBA_STATUS: self.get_lba_status,
            AdminOpcode.FLASH_MAINTENANCE: self.maintenance,
        }

    def log_pages(self) -> dict[int, Callable[[], np.ndarray]]:
        return {
            LogPage.SMART: self._smart,
            LogPage.FLASH_HEALTH: self._flash_health,
            LogPage.SUPERBLOCKS: self._superblocks,
            LogPage.FLASH_CHECK: self._flash_check,
        }

    # commands

    def get_lba_status(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.cdw13 >> 24 != LBA_STATUS_ALLOCATED or request.cdw13 & 0xFFFF:
                request.fail(CommandFailed(Status.INVALID_FIELD, detail="action type or range length"))
            elif request.first_lba >= self._ftl.num_lbas:
                request.fail(CommandFailed(Status.LBA_OUT_OF_RANGE, lba=request.first_lba))
            elif request.data.nbytes < LBA_STATUS_HEADER.itemsize:
                request.fail(CommandFailed(Status.SGL_LENGTH_INVALID))
            else:
                self._tell_allocated(request)

    def _tell_allocated(self, request: Request) -> None:
        room = (request.data.nbytes - LBA_STATUS_HEADER.itemsize) // LBA_STATUS_DESCRIPTOR.itemsize
        runs = self._allocated(request.first_lba, room)
        header, records = np.zeros(1, LBA_STATUS_HEADER), np.zeros(len(runs), LBA_STATUS_DESCRIPTOR)
        header["num_descriptors"] = len(runs)
        records["first_lba"], records["num_lbas"] = runs[:, 0], runs[:, 1]
        answer = np.concatenate([header.view(np.uint8), records.view(np.uint8)])
        request.data[: len(answer)] = answer
        request.data[len(answer) :] = 0

    def _allocated(self, first_lba: int, max_runs: int) -> np.ndarray:
        """int64 [n, 2]: (first LBA, number of LBAs) of runs from an LBA on. One may be cut in two."""
        runs = [np.empty((0, 2), np.int64)]
        while first_lba < self._ftl.num_lbas and sum(map(len, runs)) < max_runs:
            lbas = np.arange(first_lba, min(first_lba + LBAS_AT_ONCE, self._ftl.num_lbas))
            mapped = np.concatenate([[False], self._ftl.resolve(lbas) != PAGE_NONE, [False]])
            edges = first_lba + np.flatnonzero(np.diff(mapped))
            runs.append(np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1))
            first_lba = int(lbas[-1]) + 1
        return np.concatenate(runs)[:max_runs]

    def maintenance(self, requests: Sequence[Request]) -> None:
        actions = {
            Maintenance.COLLECT: lambda limit: self._ftl.collect(limit or None),
            Maintenance.RENEW: lambda limit: self._ftl.renew(),
            Maintenance.CHECK: lambda limit: self._check(),
            Maintenance.DROP_CACHE: lambda limit: self._cache.clear(),
        }
        for request in requests:
            action = actions.get(request.cdw10)
            try:
                if action is None:
                    raise CommandFailed(Status.INVALID_FIELD, detail=f"maintenance action {request.cdw10}")
                with flash_errors_as_status(Status.INTERNAL_ERROR):
                    request.result = action(request.cdw11)
            except CommandFailed as failure:
                request.fail(failure)

    def _check(self) -> int:
        self._findings = self._ftl.check()
        return len(self._findings)

    # log pages

    def _smart(self) -> np.ndarray:
        ftl, flash, record = self._ftl, self._ftl.counters, np.zeros(1, SMART_LOG)
        spare = self._available_spare()
        record["critical_warning"] = (WARNING_SPARE if spare < SPARE_THRESHOLD_PERCENT else 0) | (
            WARNING_READ_ONLY if ftl.media.read_only else 0
        )
        record["available_spare"] = spare
        record["available_spare_threshold"] = SPARE_THRESHOLD_PERCENT
        record["percentage_used"] = min(255, 100 * ftl.erase_counts().mean() // ftl.options.rated_cycles)
        record["data_units_read"] = -(-flash.host_pages_read * ftl.page_size // BYTES_PER_DATA_UNIT)
        record["data_units_written"] = -(-flash.host_pages_written * ftl.page_size // BYTES_PER_DATA_UNIT)
        record["media_errors"] = flash.corrupt_pages - flash.repaired_pages
        return record

    def _available_spare(self) -> int:
        """Percent of the flash beyond the logical blocks that is still good."""
        superblocks = self._ftl.superblocks
        in_use = (superblocks.states != State.BAD) & (superblocks.states != State.QUARANTINED)
        usable = int(superblocks.capacity[in_use].sum())
        usable += int(self._ftl.valid_pages()[superblocks.states == State.QUARANTINED].sum())
        return min(100, int(100 * spare_left(self._ftl.geometry, usable)))

    def _flash_health(self) -> np.ndarray:
        ftl, media, superblocks = self._ftl, self._ftl.media.counters, self._ftl.superblocks
        record = np.zeros(1, FLASH_HEALTH_LOG)
        counts = ftl.erase_counts()
        fields = {
            "version": 2,
            "num_channels": ftl.geometry.num_channels,
            "num_superblocks": ftl.geometry.num_superblocks,
            "page_size": ftl.page_size,
            "num_pages": ftl.geometry.num_pages,
            "mapped_pages": ftl.mapped_pages,
            "media_pages_programmed": media.pages_programmed,
            "media_pages_read": media.pages_read,
            "media_syncs": media.syncs,
            "erase_count_min": counts.min(),
            "erase_count_max": counts.max(),
            "erase_count_mean": counts.mean(),
            "num_erase_blocks": ftl.geometry.num_erase_blocks,
            "bad_erase_blocks": np.count_nonzero(superblocks.bad_planes),
            "damaged_superblocks": len(superblocks.damaged),
            "rated_cycles": ftl.options.rated_cycles,
            "num_parity_dies": ftl.geometry.parity,
            "lifetime_pages_programmed": ftl.lifetime_pages_programmed,
            "lifetime_versions": ftl.lifetime_versions,
        }
        fields |= {f"{state.name.lower()}_superblocks": superblocks.count(state) for state in State}
        for name, value in (fields | ftl.counters.as_dict()).items():
            record[name] = value
        top = max(int(counts.max()), 1)
        record["wear_histogram"] = np.histogram(counts, bins=WEAR_BINS, range=(0, top))[0]
        return record

    def _superblocks(self) -> np.ndarray:
        found = self._ftl.superblocks
        record = np.zeros(self._ftl.geometry.num_superblocks, SUPERBLOCK_RECORD)
        record["state"] = [State(state).name.lower().encode() for state in found.states]
        record["bad_erase_blocks"] = np.count_nonzero(found.bad_planes, axis=1)
        record["is_damaged"][list(found.damaged)] = 1
        record["valid_pages"] = self._ftl.valid_pages()
        record["capacity_pages"] = found.capacity
        record["erase_count"] = found.erase_counts
        record["newest_program_number"] = found.newest
        record["stream"] = np.where(found.stream == GC_STREAM, STREAM_COLLECTED, found.stream + 1)
        return record

    def _flash_check(self) -> np.ndarray:
        findings = self._findings[:MAX_FINDINGS]
        header, records = np.zeros(1, FLASH_CHECK_HEADER), np.zeros(len(findings), FLASH_FINDING)
        header["num_findings"], header["num_records"] = len(self._findings), len(findings)
        for record, finding in zip(records, findings, strict=True):
            for name, value in vars(finding).items():
                record[name] = NOT_GIVEN if value is None else value
        return np.concatenate([header.view(np.uint8), records.view(np.uint8)])
