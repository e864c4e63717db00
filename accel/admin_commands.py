"""Identify and Get Log Page: what the drive says of itself."""

from collections.abc import Callable, Sequence

import numpy as np

from accel import descriptor
from accel.attention_unit import MAX_TICKETS, AttentionUnit
from accel.flash_commands import FlashCommands
from accel.page_cache import PageCache
from accel.sparse_request import DERIVE_OF
from ftl.translation import FlashTranslationLayer
from spdk_glue.command import NSID, NSID_ALL, AdminOpcode
from spdk_glue.controller import ErrorLog, Handler, Request
from spdk_glue.identify import (
    ATTENTION_COUNTERS_LOG,
    CAPABILITIES_SIGNATURE,
    CONTROLLER_TYPE_IO,
    DEALLOCATED_READS_ZEROS,
    ERROR_LOG_ENTRIES,
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    OACS_GET_LBA_STATUS,
    ONCS_DATASET_MANAGEMENT,
    ONCS_VERIFY,
    VWC_PRESENT,
    Cns,
    LogPage,
)
from spdk_glue.probes import Probes
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import ATTENTION_VERSION, DESCRIPTOR_FLAGS, KvDtype

NVME_VERSION = 0x00020000  # 2.0


class AdminCommands:
    def __init__(
        self,
        ftl: FlashTranslationLayer,
        unit: AttentionUnit,
        cache: PageCache,
        worker_name: str,
        probes: Probes,
    ):
        self._ftl = ftl
        self._unit = unit
        self._cache = cache
        self._worker_name = worker_name
        self._probes = probes
        self._flash = FlashCommands(ftl, cache)
        self.error_log: ErrorLog | None = None  # the controller's, once there is one

    def handlers(self) -> dict[int, Handler]:
        return {
            AdminOpcode.IDENTIFY: self.identify,
            AdminOpcode.GET_LOG_PAGE: self.get_log_page,
            **self._flash.handlers(),
        }

    def identify(self, requests: Sequence[Request]) -> None:
        structures: dict[int, Callable[[], np.ndarray]] = {
            Cns.NAMESPACE: self._namespace,
            Cns.CONTROLLER: self._controller,
            Cns.ACTIVE_NAMESPACES: self._active_namespaces,
        }
        for request in requests:
            structure = structures.get(request.cdw10 & 0xFF)
            if structure is None:
                request.fail(CommandFailed(Status.INVALID_FIELD, detail=f"CNS {request.cdw10 & 0xFF:#x}"))
            elif request.cdw10 & 0xFF == Cns.NAMESPACE and request.nsid not in (NSID, NSID_ALL):
                request.fail(CommandFailed(Status.INVALID_NAMESPACE, detail=f"nsid {request.nsid}"))
            else:
                _answer(request, structure(), 0)

    def _controller(self) -> np.ndarray:
        record = np.zeros(1, IDENTIFY_CONTROLLER)
        record["sn"] = self._ftl.uuid.hex[:20].encode()
        record["mn"] = b"kvfs computational drive"
        record["fr"] = b"1"
        record["ver"] = NVME_VERSION
        record["cntlid"] = 1
        record["cntrltype"] = CONTROLLER_TYPE_IO
        record["elpe"] = ERROR_LOG_ENTRIES - 1
        record["sqes"], record["cqes"] = 0x66, 0x44  # entries of 2**6 and 2**4 bytes
        record["nn"] = 1
        record["oacs"] = OACS_GET_LBA_STATUS
        record["oncs"] = ONCS_DATASET_MANAGEMENT | ONCS_VERIFY
        record["vwc"] = VWC_PRESENT
        record["subnqn"] = f"nqn.2014-08.org.nvmexpress:uuid:{self._ftl.uuid}".encode()
        attention = record["attention"]
        attention["signature"] = CAPABILITIES_SIGNATURE
        attention["version"] = ATTENTION_VERSION
        attention["dtype_mask"] = sum(1 << dtype for dtype in KvDtype)
        attention["max_items"] = descriptor.MAX_ITEMS
        attention["max_queries"] = descriptor.MAX_QUERIES
        attention["max_group_size"] = descriptor.MAX_GROUP_SIZE
        attention["head_dim_min"] = descriptor.HEAD_DIM_MIN
        attention["head_dim_max"] = descriptor.HEAD_DIM_MAX
        attention["max_transfer_bytes"] = descriptor.MAX_TRANSFER_BYTES
        attention["max_tickets"] = MAX_TICKETS
        attention["num_workers"] = self._unit.num_workers
        attention["num_placement_ids"] = self._ftl.num_streams
        attention["sparse_methods"] = sum(1 << method for method in DERIVE_OF)
        attention["descriptor_flags"] = DESCRIPTOR_FLAGS
        attention["worker"] = self._worker_name.encode()[:16]
        return record

    def _namespace(self) -> np.ndarray:
        record = np.zeros(1, IDENTIFY_NAMESPACE)
        record["nsze"] = record["ncap"] = self._ftl.num_lbas
        record["nuse"] = self._ftl.mapped_pages
        record["dlfeat"] = DEALLOCATED_READS_ZEROS
        record["lbaf"][0, 0]["lbads"] = self._ftl.page_size.bit_length() - 1
        return record

    @staticmethod
    def _active_namespaces() -> np.ndarray:
        record = np.zeros(1024, "<u4")
        record[0] = NSID
        return record

    def get_log_page(self, requests: Sequence[Request]) -> None:
        pages: dict[int, Callable[[], np.ndarray]] = {
            LogPage.ERROR_INFORMATION: lambda: self.error_log.page(),
            LogPage.ATTENTION_COUNTERS: self._attention_counters,
            LogPage.LATENCY: self._probes.log_page,
            **self._flash.log_pages(),
        }
        for request in requests:
            page = pages.get(request.cdw10 & 0xFF)
            if page is None:
                request.fail(CommandFailed(Status.INVALID_LOG_PAGE, detail=f"log {request.cdw10 & 0xFF:#x}"))
            else:
                _answer(request, page(), request.cdw12 | request.cdw13 << 32)

    def _attention_counters(self) -> np.ndarray:
        record = np.zeros(1, ATTENTION_COUNTERS_LOG)
        record["version"] = 4
        record["num_workers"] = self._unit.num_workers
        record["cache_bytes"] = self._cache.capacity_bytes
        record["cache_bytes_used"] = self._cache.bytes_used
        for name, value in (self._unit.counters.as_dict() | self._unit.worker_counts.as_dict()).items():
            record[name] = value
        return record


def _answer(request: Request, record: np.ndarray, offset: int) -> None:
    """Copy a structure from `offset` on into the request's buffer, zeros behind its end."""
    raw = record.reshape(-1).view(np.uint8)[offset : offset + request.data.nbytes]
    request.data[: len(raw)] = raw
    request.data[len(raw) :] = 0
