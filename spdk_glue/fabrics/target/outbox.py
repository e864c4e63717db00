"""What one connection is about to send: PDUs of a controller, built in memory of the connection's own.

A batch that was taken is to be sent before the next PDU is put in: the memory is used again.
"""

import numpy as np

from spdk_glue import dma
from spdk_glue.command import COMPLETION_ENTRY
from spdk_glue.fabrics import pdu
from spdk_glue.fabrics.pdu import (
    CAPSULE_RESPONSE,
    DATA,
    MAX_HEADER_BYTES,
    PIECE,
    R2T,
    Framing,
    PduFlag,
    PduType,
)
from spdk_glue.vendor_command import record_struct

MAX_PDUS = 2048  # in one batch: twice what the deepest queue has outstanding
_RECORD_BYTES = 24  # of every PDU that is sent often
_pack_data, _pack_response = record_struct(DATA).pack_into, record_struct(CAPSULE_RESPONSE).pack_into
_pack_completion, _pack_piece = record_struct(COMPLETION_ENTRY).pack, record_struct(PIECE).pack_into
_RESERVED = bytes(4)
assert DATA.itemsize == R2T.itemsize == CAPSULE_RESPONSE.itemsize == _RECORD_BYTES


class Outbox:
    """framing: what was agreed with the host, to be replaced once that is known."""

    def __init__(self, framing: Framing):
        self._records = np.zeros((MAX_PDUS, _RECORD_BYTES), np.uint8)
        self._address = dma.address_of(self._records)
        self._pieces = np.zeros(MAX_PDUS, PIECE)
        # Memory for `struct`, which takes a tenth of NumPy's time for one record.
        self._record_bytes = memoryview(self._records).cast("B")
        self._piece_bytes = memoryview(self._pieces.view(np.uint8))
        self._count = 0
        self._kept: list[object] = []
        self.framing = framing

    @property
    def framing(self) -> Framing:
        return self._framing

    @framing.setter
    def framing(self, framing: Framing) -> None:
        self._framing = framing
        response = pdu.headers(PduType.CAPSULE_RESPONSE, 1, framing)
        r2t = pdu.headers(PduType.R2T, 1, framing)
        data = pdu.headers(PduType.C2H_DATA, 1, framing, np.array([1]))
        # As every such PDU begins; of data, plen is that much more than their length.
        self._response_start = response[list(pdu.COMMON_HEADER.names)].item()
        self._r2t_start = r2t[list(pdu.COMMON_HEADER.names)].item()
        *self._data_start, plen = data[list(pdu.COMMON_HEADER.names)].item()
        self._data_overhead = plen - 1

    def __len__(self) -> int:
        return self._count

    def _put(self, data_address: int = 0, data_length: int = 0) -> int:
        """The offset of the next record, which is now a piece."""
        index = self._count
        if index == MAX_PDUS:
            raise OverflowError("more PDUs than a queue's depth can cause")
        self._count += 1
        at = index * _RECORD_BYTES
        _pack_piece(self._piece_bytes, index * PIECE.itemsize, self._address + at, data_address, data_length)
        return at

    def response(self, cid: int, sqhd: int, sqid: int, status: int = 0, cdw0: int = 0, cdw1: int = 0) -> None:
        """status: the completion's status field"""
        entry = _pack_completion(cdw0, cdw1, sqhd, sqid, cid, status)
        _pack_response(self._record_bytes, self._put(), *self._response_start, entry)

    def data(self, cid: int, data: np.ndarray, flags: int) -> None:
        """One C2HData with all of a command's data, which stay as they are until the batch is sent."""
        self._kept.append(data)
        kind, common_flags, hlen, pdo = self._data_start
        at = self._put(dma.address_of(data), data.nbytes)
        start = kind, common_flags | flags, hlen, pdo, self._data_overhead + data.nbytes
        _pack_data(self._record_bytes, at, *start, cid, 0, 0, data.nbytes, _RESERVED)

    def r2t(self, cid: int, ttag: int, offset: int, length: int) -> None:
        _pack_data(self._record_bytes, self._put(), *self._r2t_start, cid, ttag, offset, length, _RESERVED)

    def whole(self, raw: bytes) -> None:
        """A PDU that is all header, or a terminate request."""
        record = np.frombuffer(raw, np.uint8)
        self._kept.append(record)
        hlen = record[pdu.HLEN_OFFSET]
        assert hlen <= MAX_HEADER_BYTES
        self._put()
        address = dma.address_of(record)
        self._pieces[self._count - 1] = address, address + int(hlen), len(record) - int(hlen)

    def read_answers(
        self, completions: np.ndarray, addresses: np.ndarray, lengths: np.ndarray, may_omit_responses: bool
    ) -> None:
        """Of COMPLETION_ENTRY [n], all good: the data of each, int64 [n] at `addresses`, and its response.

        may_omit_responses: let the data stand for them
        """
        num = len(completions)
        flags = PduFlag.LAST | (PduFlag.SUCCESS if may_omit_responses else 0)
        data = pdu.data(PduType.C2H_DATA, completions["cid"], lengths, self._framing, flags=flags)
        step = 1 if may_omit_responses else 2
        first, stop = self._count, self._count + step * num
        self._records[first:stop:step] = data.view(np.uint8).reshape(num, _RECORD_BYTES)
        pieces = self._pieces[first:stop]
        places = np.arange(first, stop, dtype=np.uint64) * np.uint64(_RECORD_BYTES)
        pieces["header_address"] = np.uint64(self._address) + places
        pieces["data_address"][::step], pieces["data_length"][::step] = addresses, lengths
        if not may_omit_responses:
            responses = pdu.capsule_responses(completions, self._framing)
            self._records[first + 1 : stop : 2] = responses.view(np.uint8).reshape(num, _RECORD_BYTES)
            pieces["data_address"][1::2] = pieces["data_length"][1::2] = 0
        self._count = stop

    def take(self) -> np.ndarray:
        """PIECE [n], to be sent now; the outbox is empty again."""
        pieces, self._count = self._pieces[: self._count], 0
        self._sent_kept, self._kept = self._kept, []
        return pieces
