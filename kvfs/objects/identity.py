"""What the bytes of objects depend on beside their keys, as text."""

import json
from collections.abc import Mapping

from kvfs.errors import InvalidArgument

MAX_BYTES = 4096


def identity_text(identity: Mapping[str, str | int | float | bool] | None) -> str:
    """JSON, the same for the same facts in any order. Raises InvalidArgument."""
    facts = {} if identity is None else identity
    good = isinstance(facts, Mapping) and all(
        isinstance(name, str) and isinstance(value, str | int | float) for name, value in facts.items()
    )
    if not good:
        raise InvalidArgument(f"an identity is a mapping of names to text, numbers and truth, not {identity!r}")
    try:
        text = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise InvalidArgument(f"an identity that has no JSON: {error}") from error
    if len(text) > MAX_BYTES:
        raise InvalidArgument(f"an identity takes {len(text)} bytes, and at most {MAX_BYTES}")
    return text
