"""ICReq and ICResp: what two ends of a connection agree on before its first command."""

from dataclasses import dataclass

import numpy as np

from spdk_glue.fabrics import pdu
from spdk_glue.fabrics.pdu import FatalPduError, PduFlag, PduType
from spdk_glue.status import ConnectionRefused

RESPONSE_BYTES = pdu.IC_RESPONSE.itemsize
MIN_H2C_DATA_BYTES = 4096  # the specification's least


@dataclass(frozen=True)
class Agreement:
    """header_digest, data_digest: of every PDU; data_alignment: of the data that the host sends in their PDU;
    max_h2c_data_bytes: of data in one H2CData."""

    header_digest: bool
    data_digest: bool
    data_alignment: int
    max_h2c_data_bytes: int


def request(header_digest: bool, data_digest: bool) -> bytes:
    """ICReq: one R2T at a time, data to the host at any multiple of four."""
    return pdu.ic_request(header_digest=header_digest, data_digest=data_digest).tobytes()


def agree(received: bytes, header_digest: bool, data_digest: bool) -> Agreement:
    """From the first RESPONSE_BYTES that came back. Raises ConnectionRefused.

    header_digest, data_digest: as asked for. A target that does not grant one is refused: the user wants it.
    """
    if received and received[0] == PduType.C2H_TERMINATE:
        raise ConnectionRefused("the target ends the connection at once")
    try:
        found = pdu.take_pdu(received, pdu.Framing(from_host=False))
    except FatalPduError as error:
        raise ConnectionRefused(f"what answers is not NVMe/TCP: {error}") from error
    if found is None or found[0].type != PduType.IC_RESPONSE:
        raise ConnectionRefused("what answers is not NVMe/TCP")
    response = np.frombuffer(received, pdu.IC_RESPONSE, 1)[0]
    if response["pfv"] != pdu.PFV:
        raise ConnectionRefused(f"the target speaks version {int(response['pfv'])} of NVMe/TCP, not {pdu.PFV}")
    wanted = PduFlag.HEADER_DIGEST * header_digest | PduFlag.DATA_DIGEST * data_digest
    if int(response["digests"]) != wanted:
        raise ConnectionRefused("the target does not use digests as asked")
    if response["cpda"] > pdu.MAX_PDA or response["maxh2cdata"] < MIN_H2C_DATA_BYTES:
        raise ConnectionRefused(
            f"the target's limits are impossible: cpda {int(response['cpda'])}, "
            f"maxh2cdata {int(response['maxh2cdata'])}"
        )
    alignment, limit = 4 * (int(response["cpda"]) + 1), int(response["maxh2cdata"])
    return Agreement(header_digest, data_digest, alignment, limit // 4 * 4)
