"""What a look-up answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from kvfs.errors import InvalidArgument
from kvfs.model import Model
from kvfs.sequence_attributes import is_tenant


class Miss(StrEnum):
    """Why no more of a prompt's whole groups was found."""

    UNKNOWN = "unknown"  # this tenant has published no such tokens
    OTHER_MODEL = "other_model"  # it has, of another model
    OTHER_DTYPE = "other_dtype"  # of a model that differs in its dtype alone
    OTHER_SETTINGS = "other_settings"  # of this model, with other settings
    NOT_ON_FLASH = "not_on_flash"  # a published sequence has them, and not stored them in every layer yet
    TOKENS_DIFFER = "tokens_differ"  # a group of this name holds other tokens
    DAMAGED = "damaged"  # the drive cannot give a group back
    DRIVE_LOST = "drive_lost"  # a drive of the set is lost, and may hold it
    TOO_SHORT = "too_short"  # the prompt fills no group


@dataclass(frozen=True)
class PrefixMatch:
    """The longest stored prefix of a prompt, for Store.restore_prefix.

    token_ids: uint32 [num_tokens], a copy; miss: why it is not all of the prompt's whole groups, None if it is
    """

    model: Model
    tenant: str
    settings: Mapping[str, Any] = field(hash=False)
    token_ids: np.ndarray = field(hash=False, compare=False, repr=False)
    miss: Miss | None

    @property
    def num_tokens(self) -> int:
        """Whole token groups, so a multiple of model.group_tokens; 0: nothing was found."""
        return len(self.token_ids)


def check_tenant(tenant: str) -> None:
    """Raises InvalidArgument."""
    try:
        is_good = tenant == "" or is_tenant(tenant.encode())
    except (AttributeError, UnicodeEncodeError):
        is_good = False
    if not is_good:
        raise InvalidArgument(f"a tenant is text of up to 255 printable bytes, not {tenant!r}")
