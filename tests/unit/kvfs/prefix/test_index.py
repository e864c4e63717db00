"""Names of groups and the look-up of them, without a store."""

import numpy as np
import pytest

from kvfs.layout import KvGeometry
from kvfs.prefix import hashing
from kvfs.prefix.index import PrefixIndex
from kvfs.prefix.prefix_catalogue import Scope

GROUP_BYTES = 16
GEOMETRY = KvGeometry(1, 1, 1, 32, "float16", GROUP_BYTES // 4)
SALT = b"s" * hashing.SALT_BYTES


def chain(num_groups: int) -> list[bytes]:
    tokens = np.arange(num_groups * GROUP_BYTES // 4, dtype="<u4").tobytes()
    return Scope(1, 1, "m", GEOMETRY, "{}", SALT).chain(tokens)


class Entries:
    """A catalogue that has the first groups of one chain, and notes what it is asked for."""

    def __init__(self, names: list[bytes]):
        self.names = set(names)
        self.asked: list[bytes] = []

    def has(self, scope_id: int, name: bytes) -> bool:
        self.asked.append(name)
        return name in self.names


def test_chain_continued():
    """What later flushes add is called as if all had come at once, wherever neighbourhoods begin."""
    tokens = np.arange(200 * GROUP_BYTES // 4, dtype="<u4").tobytes()
    first = hashing.root(SALT, "m", GEOMETRY, "{}")
    whole = hashing.chain(SALT, first, 0, tokens, GROUP_BYTES)
    pieces, previous = [], first
    for start, stop in ((0, 1), (1, 63), (63, 64), (64, 130), (130, 200)):
        part = tokens[start * GROUP_BYTES : stop * GROUP_BYTES]
        pieces += hashing.chain(SALT, previous, start, part, GROUP_BYTES)
        previous = pieces[-1]
    assert pieces == whole and len({*whole}) == 200
    places = [name[: hashing.PLACE_BYTES] for name in whole]
    assert len({*places}) == -(-200 // hashing.NEIGHBOURS)
    assert all(place == places[i // 64 * 64] for i, place in enumerate(places))


def test_other_tokens_other_names():
    """A name tells all tokens before its group: none is kept where the first group differs."""
    one, other = (np.arange(start, start + 400, dtype="<u4") for start in (0, 0))
    other[0] ^= 1
    scope = Scope(1, 1, "m", GEOMETRY, "{}", SALT)
    assert not {*scope.chain(one.tobytes())} & {*scope.chain(other.tobytes())}


@pytest.mark.parametrize("num_groups", [1, 2, 64, 65, 129, 512])
def test_longest_prefix(num_groups):
    """Whatever is there, all of it is found, with few questions, and few about other neighbourhoods."""
    names = chain(num_groups)
    scope = Scope(1, 1, "m", GEOMETRY, "{}", SALT)
    for present in range(num_groups + 1):
        entries = Entries(names[:present])
        assert PrefixIndex(entries, None)._bisect(scope, names) == present
        assert len(entries.asked) <= 14
        assert len({name[: hashing.PLACE_BYTES] for name in entries.asked}) <= 6


def test_no_groups():
    assert PrefixIndex(Entries([]), None)._bisect(Scope(None, 1, "m", GEOMETRY, "{}", SALT), []) == 0
