"""Names of token groups: chained hashes, so that one says what a group and all before it hold.

hash[i] = BLAKE2b-128(tokens of group i as <u4, key = salt, person = hash[i - 1]), and hash[-1] is that of the
identity: all that keys and values depend on beside the tokens. The salt is random, one per tenant, model and
settings, and never leaves the drive's owner: who does not have it cannot tell what another tenant's groups are
called.

A name is hash[i] behind the first bytes of the hash of the group that begins i's neighbourhood, so names of
neighbours are neighbours in an index: storing or looking up a prompt of 512 groups touches a dozen of its pages
and not one for each name.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b

from kvfs.errors import InvalidArgument
from kvfs.layout import KvGeometry

HASH_BYTES = 16  # two of 2**40 groups are called the same with a chance of 2**-48; tokens are compared as well
PLACE_BYTES = 4
NAME_BYTES = PLACE_BYTES + HASH_BYTES
NEIGHBOURS = 64  # groups; their names take about as much as a page of the catalogue has
SALT_BYTES = 32
MAX_SETTINGS_BYTES = 4096


def new_salt() -> bytes:
    return secrets.token_bytes(SALT_BYTES)


def settings_text(settings: Mapping | None) -> str:
    """JSON of settings, the same for the same ones in any order. Raises InvalidArgument."""
    if settings is not None and not isinstance(settings, Mapping):
        raise InvalidArgument(f"settings are a mapping of names to plain values, not {settings!r}")
    try:
        text = json.dumps(dict(settings or {}), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"settings that have no JSON: {error}") from error
    if len(text) > MAX_SETTINGS_BYTES:
        raise InvalidArgument(f"settings take {len(text)} bytes, and at most {MAX_SETTINGS_BYTES}")
    return text


def root(salt: bytes, model: str, geometry: KvGeometry, settings: str) -> bytes:
    """What comes before the name of the first group. settings: see settings_text."""
    identity = json.dumps([model, asdict(geometry), settings], sort_keys=True, separators=(",", ":"))
    return bytes(PLACE_BYTES) + blake2b(identity.encode(), digest_size=HASH_BYTES, key=salt).digest()


def chain(salt: bytes, previous: bytes, position: int, tokens: bytes, group_bytes: int) -> list[bytes]:
    """The name of each whole group from `position` on.

    previous: the name of the group before; tokens: <u4, `group_bytes` a group.
    """
    names = []
    place, last = previous[:PLACE_BYTES], previous[PLACE_BYTES:]
    for start in range(0, len(tokens) - group_bytes + 1, group_bytes):
        group = tokens[start : start + group_bytes]
        last = blake2b(group, digest_size=HASH_BYTES, key=salt, person=last).digest()
        if position % NEIGHBOURS == 0:
            place = last[:PLACE_BYTES]
        names.append(place + last)
        position += 1
    return names
