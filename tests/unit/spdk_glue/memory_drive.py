"""A drive of the NVMe layer's tests: blocks in an array behind a real controller and transport."""

import threading

import numpy as np

from spdk_glue.command import (
    DATASET_RANGE,
    DIRECTIVE_DATA_PLACEMENT,
    FDP_ENABLED,
    HANDLE_STATUS_DESCRIPTOR,
    HANDLE_STATUS_HEADER,
    NSID,
    RECLAIM_UNIT_HANDLE_STATUS,
    AdminOpcode,
    Feature,
    IoOpcode,
)
from spdk_glue.controller import Controller
from spdk_glue.identify import (
    CAPABILITIES_SIGNATURE,
    CTRATT_FLEXIBLE_DATA_PLACEMENT,
    ERROR_LOG_ENTRY,
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    Cns,
    LogPage,
)
from spdk_glue.status import CommandFailed, Status
from spdk_glue.transports.inproc import InprocTransport
from spdk_glue.vendor_command import ATTENTION_VERSION

NUM_LBAS = 1 << 12
MAX_TRANSFER_BYTES = 1 << 16


class MemoryDrive:
    """`seen` has every I/O request in the order of arrival; writes wait for `gate`."""

    def __init__(
        self,
        block_bytes: int = 512,
        mdts: int = 0,
        signature: bytes = CAPABILITIES_SIGNATURE,
        num_lbas: int = NUM_LBAS,
    ):
        self.block_bytes, self.num_lbas = block_bytes, num_lbas
        self.blocks = np.zeros((num_lbas, block_bytes), np.uint8)
        self.seen = []
        self.answers = {}  # ticket to the length that its answer has
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.controller = np.zeros(1, IDENTIFY_CONTROLLER)
        self.controller["mdts"] = mdts
        self.controller["sn"] = b"MEMORY"
        self.controller["attention"]["signature"] = signature
        self.controller["attention"]["version"] = ATTENTION_VERSION
        self.controller["attention"]["max_transfer_bytes"] = MAX_TRANSFER_BYTES
        self.namespace = np.zeros(1, IDENTIFY_NAMESPACE)
        self.namespace["nsze"] = num_lbas
        self.namespace["lbaf"][0, 0]["lbads"] = block_bytes.bit_length() - 1
        self.identities = {Cns.CONTROLLER: self.controller, Cns.NAMESPACE: self.namespace}
        self.io_handlers = {
            IoOpcode.READ: self.read,
            IoOpcode.WRITE: self.write,
            IoOpcode.FLUSH: self.flush,
            IoOpcode.DATASET_MANAGEMENT: self.deallocate,
            IoOpcode.ATTENTION_SUBMIT: self.submit,
            IoOpcode.ATTENTION_FETCH: self.fetch,
            IoOpcode.ATTENTION_CANCEL: self.cancel,
            IoOpcode.SEAL_GROUPS: self.note,
        }
        self.admin_handlers = {AdminOpcode.IDENTIFY: self.identify, AdminOpcode.GET_LOG_PAGE: self.log_page}
        self.device = Controller(self.io_handlers, self.admin_handlers)
        self.transport = InprocTransport(self.device)

    def note(self, requests):
        self.seen.extend(requests)

    def _blocks(self, request):
        stop = request.first_lba + request.num_lbas
        if stop > self.num_lbas:
            request.fail(CommandFailed(Status.LBA_OUT_OF_RANGE, lba=request.first_lba, detail="past the end"))
        elif request.data.nbytes != request.num_lbas * self.block_bytes:
            request.fail(CommandFailed(Status.SGL_LENGTH_INVALID))
        else:
            return self.blocks[request.first_lba : stop].reshape(-1)
        return np.empty(0, np.uint8)

    def read(self, requests):
        self.note(requests)
        for request in requests:
            found = self._blocks(request)
            request.data[: len(found)] = found

    def write(self, requests):
        self.entered.set()
        assert self.gate.wait(60)
        self.note(requests)
        for request in requests:
            place = self._blocks(request)
            place[:] = request.data[: len(place)]

    def flush(self, requests):
        self.note(requests)

    def deallocate(self, requests):
        self.note(requests)
        for request in requests:
            for first, count in request.data.view(DATASET_RANGE)[["first_lba", "num_lbas"]].tolist():
                self.blocks[first : first + count] = 0

    def submit(self, requests):
        self.note(requests)
        for request in requests:
            self.answers[request.cdw10] = int(request.data[0])

    def fetch(self, requests):
        for request in requests:
            if request.cdw10 not in self.answers:
                request.fail(CommandFailed(Status.UNKNOWN_TICKET, detail=f"ticket {request.cdw10}"))
                continue
            request.result = self.answers.pop(request.cdw10)
            request.data[: request.result] = 7

    def cancel(self, requests):
        for request in requests:
            if self.answers.pop(request.cdw10, None) is None:
                request.fail(CommandFailed(Status.UNKNOWN_TICKET))

    def identify(self, requests):
        for request in requests:
            if request.cdw10 == Cns.NAMESPACE and request.nsid != NSID:
                request.fail(CommandFailed(Status.INVALID_NAMESPACE, detail=f"nsid {request.nsid}"))
                continue
            if request.cdw10 not in self.identities:
                request.fail(CommandFailed(Status.INVALID_FIELD, detail=f"CNS {request.cdw10}"))
                continue
            request.data[:] = self.identities[request.cdw10].view(np.uint8)

    def log_page(self, requests):
        for request in requests:
            if request.cdw10 & 0xFF != LogPage.ERROR_INFORMATION:
                request.fail(CommandFailed(Status.INVALID_LOG_PAGE))
                continue
            assert request.data.nbytes % ERROR_LOG_ENTRY.itemsize == 0
            request.data[:] = self.device.error_log.page()[: request.data.nbytes]


class PlacementDrive(MemoryDrive):
    """A drive of somebody else's with flexible data placement. `placed` has, by LBA, the placement identifier
    it was last written with: UNPLACED with none, NEVER where it was not written."""

    NEVER, UNPLACED = -2, -1
    ENDURANCE_GROUP = 5

    def __init__(self, placement_ids=(3, 9, 4), is_enabled: bool = True, **options):
        super().__init__(signature=b"", **options)
        self.placement_ids, self.is_enabled = list(placement_ids), is_enabled
        self.placed = np.full(NUM_LBAS, self.NEVER)
        self.controller["ctratt"] = CTRATT_FLEXIBLE_DATA_PLACEMENT
        self.namespace["endgid"] = self.ENDURANCE_GROUP
        io_handlers = self.io_handlers | {IoOpcode.IO_MANAGEMENT_RECEIVE: self.handle_status}
        admin_handlers = self.admin_handlers | {AdminOpcode.GET_FEATURES: self.get_features}
        self.device = Controller(io_handlers, admin_handlers)
        self.transport = InprocTransport(self.device)

    def get_features(self, requests):
        for request in requests:
            if (request.cdw10, request.cdw11) != (Feature.FLEXIBLE_DATA_PLACEMENT, self.ENDURANCE_GROUP):
                request.fail(CommandFailed(Status.INVALID_FIELD))
            else:
                request.result = FDP_ENABLED if self.is_enabled else 0

    def handle_status(self, requests):
        for request in requests:
            assert (
                request.cdw10 == RECLAIM_UNIT_HANDLE_STATUS and (request.cdw11 + 1) * 4 == request.data.nbytes
            )
            header = np.zeros(1, HANDLE_STATUS_HEADER)
            header["num_descriptors"] = len(self.placement_ids)
            descriptors = np.zeros(len(self.placement_ids), HANDLE_STATUS_DESCRIPTOR)
            descriptors["placement_id"] = self.placement_ids
            raw = np.concatenate([header.view(np.uint8), descriptors.view(np.uint8)])
            request.data[:] = raw[: request.data.nbytes]

    def write(self, requests):
        super().write(requests)
        for request in requests:
            directive, placement_id = request.cdw12 >> 20 & 0xF, self.UNPLACED
            if directive == DIRECTIVE_DATA_PLACEMENT:
                placement_id = request.cdw13 >> 16
            if directive not in (0, DIRECTIVE_DATA_PLACEMENT) or (
                directive and (not self.is_enabled or placement_id not in self.placement_ids)
            ):
                request.fail(CommandFailed(Status.INVALID_FIELD, detail=f"placement {placement_id}"))
            self.placed[request.first_lba : request.first_lba + request.num_lbas] = placement_id
