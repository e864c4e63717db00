"""An Attention Submit and its Fetch that came together: what is small and cached is answered there and then.

No ticket is made of it, and its bytes are read where they arrived: beside so short a computation the host waits
for little but Python. Whatever is unusual about the two is left to the way that all commands go.
"""

import struct

import numpy as np

from spdk_glue import dma
from spdk_glue.command import NSID, NSID_ALL, IoOpcode
from spdk_glue.controller import ADMIN_QUEUE
from spdk_glue.fabrics.pdu import FRAME, PduFlag
from spdk_glue.fabrics.records import PSDT_SGL, SGL_IN_CAPSULE, SGL_TRANSPORT
from spdk_glue.fabrics.target.states import State
from spdk_glue.request_id import working_for
from spdk_glue.vendor_command import record_struct

PAIR = 2
_CAPSULE_ENTRY = 8  # of a capsule's header, where its SUBMISSION_ENTRY begins
_SUBMIT, _FETCH = int(IoOpcode.ATTENTION_SUBMIT), int(IoOpcode.ATTENTION_FETCH)
_LAST = int(PduFlag.LAST)
_NAMESPACES = (NSID, NSID_ALL)

_unpack_frames = record_struct(FRAME).iter_unpack
# Of a SUBMISSION_ENTRY: opcode, flags, cid, nsid; the SGL's address, length and type; CDW10; the request
_unpack_entry = struct.Struct("<BBHI16xQI3xBI12xQ").unpack_from


class AttentionPairs:
    """A part of Connection."""

    def _answer_pair(self, frames: np.ndarray, buffer: np.ndarray) -> bool:
        """Answer two capsules; False, with nothing done, if they are no such pair or there is no short way."""
        if frames["header"][0, _CAPSULE_ENTRY] != _SUBMIT or self.state is not State.LIVE:
            return False
        submit, fetch = _unpack_frames(frames.tobytes())
        opcode, flags, submit_cid, nsid, offset, length, sgl, ticket, request = _unpack_entry(
            submit[0], _CAPSULE_ENTRY
        )
        _, data_at, data_length, _, _, is_intact, _ = submit
        if (
            self.qid == ADMIN_QUEUE
            or flags != PSDT_SGL
            or nsid not in _NAMESPACES
            or (sgl, offset, length) != (SGL_IN_CAPSULE, 0, data_length)
            or not 0 < length <= self._limits.in_capsule_bytes
            or not is_intact
        ):
            return False
        opcode, flags, cid, nsid, _, length, sgl, its_ticket, _ = _unpack_entry(fetch[0], _CAPSULE_ENTRY)
        if (
            (opcode, flags, sgl, its_ticket) != (_FETCH, PSDT_SGL, SGL_TRANSPORT, ticket)
            or nsid not in _NAMESPACES
            or not 0 < length <= self._limits.max_transfer_bytes
            or fetch[2]  # data in its capsule
            or cid == submit_cid
            or cid in self._outstanding
            or submit_cid in self._outstanding
        ):
            return False
        association = self.association
        reservations = self._subsystems.reservations
        if not association.tickets.may_start(ticket) or any(
            reservations.refuses(association.host_id, opcode) for opcode in (_SUBMIT, _FETCH)
        ):
            return False
        if len(self._answer) < length:
            self._answer = dma.allocate(length)  # used again: it is sent before the next PDU is looked at
        descriptor, answer = buffer[data_at : data_at + data_length], self._answer[:length]
        with working_for(request or None):
            if not self._subsystems.drive.attend_small_now(descriptor, answer):
                return False
        sqhd = self._sqhd = (self._sqhd + PAIR) % self._num_entries
        self._out.response(submit_cid, sqhd, self.qid)
        self._out.data(cid, answer, _LAST)
        self._out.response(cid, sqhd, self.qid, cdw0=length)
        return True
