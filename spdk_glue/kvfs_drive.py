"""What a controller says of its attention commands: whether it is a kvfs drive, and of this host's version."""

import numpy as np

from spdk_glue.identify import CAPABILITIES_SIGNATURE
from spdk_glue.status import NotAKvfsDrive, OtherAttentionVersion
from spdk_glue.vendor_command import ATTENTION_VERSION


def attention_of(controller: np.void) -> np.void:
    """ATTENTION_CAPABILITIES of a drive's IDENTIFY_CONTROLLER. Raises NotAKvfsDrive, OtherAttentionVersion."""
    attention = controller["attention"]
    if attention["signature"] != CAPABILITIES_SIGNATURE:
        raise NotAKvfsDrive("the drive does not offer kvfs attention commands")
    if attention["version"] != ATTENTION_VERSION:
        raise OtherAttentionVersion(int(attention["version"]), ATTENTION_VERSION)
    return attention
