"""Finding the longest stored prefix of a prompt, and having a new sequence begin with it.

The names of the prompt's groups are looked up by bisection: where a group can be found, so can all before it
(prefix_catalogue.py), and a look-up of 512 groups asks ten times, of six pages. What bisection finds is one
sequence's groups. Who takes them has that sequence's tokens compared with the prompt's first, so neither two
groups of one name nor a hole in the chain can make more than a miss. A look-up by itself compares no tokens:
that would be most of its time.

What a look-up does depends on its own tenant's entries alone. Another's have names that were made with another
salt: to bisect is to miss at the first question, whether they are there or not.
"""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kvfs.layout import KvGeometry
from kvfs.model import Model
from kvfs.prefix import hashing
from kvfs.prefix.counters import PrefixCounters
from kvfs.prefix.match import Miss
from kvfs.prefix.prefix_catalogue import PrefixCatalogue, Scope, Usage
from spdk_glue.namespace import Namespace

log = logging.getLogger(__name__)

MAX_SUSPECTS = 1024


class LookUp(NamedTuple):
    """sequence_id: one that has the groups, where it was looked for; miss: what was wrong with more of them,
    None for nothing that was there; num_dropped: entries given up for that."""

    num_groups: int
    sequence_id: int | None
    miss: Miss | None
    num_dropped: int


class PrefixIndex:
    """Used under the store's lock."""

    def __init__(self, catalogue: PrefixCatalogue, namespace: Namespace):
        self._catalogue = catalogue
        self._namespace = namespace
        self._salt_of_none = hashing.new_salt()  # of who has published nothing: the work is the same
        self._suspects: set[int] = set()  # LBAs that could not be read, of whatever
        self.counters = PrefixCounters()

    def suspect(self, lba: int) -> None:
        """A read has failed there: groups with this block are verified before they are found again."""
        if len(self._suspects) < MAX_SUSPECTS:
            self._suspects.add(lba)

    def find(
        self, model: Model, tenant: str, settings: str, prompt: np.ndarray, verify: bool, sequences
    ) -> tuple[int, Miss | None]:
        """(groups found, why no more), counted. prompt: uint32; sequences: those open, by name."""
        group_tokens = model.geometry.group_tokens
        wanted = len(prompt) // group_tokens
        tokens = _bytes(prompt[: wanted * group_tokens])
        scope = self._scope(model, tenant, settings)
        counters = self.counters.of(tenant, model.name)
        found, _, miss, num_dropped = self._search(scope, tokens, compare=verify, verify=verify)
        if not wanted:
            miss = Miss.TOO_SHORT
        elif found < wanted and miss is None:
            miss = self._why(model, tenant, scope, prompt, found, sequences)
        counters.groups_dropped += num_dropped
        counters.count(wanted * group_tokens, found * group_tokens, miss)
        return found, miss

    def look_up(
        self, model: Model, tenant: str, settings: str, tokens: np.ndarray, compare: bool, verify: bool = False
    ) -> LookUp:
        """What there is of these tokens, uncounted.

        tokens: uint32; compare: with those stored, of a sequence that has them; verify: have the drive read the
        groups
        """
        return self._search(self._scope(model, tenant, settings), _bytes(tokens), compare or verify, verify)

    def _scope(self, model: Model, tenant: str, settings: str) -> Scope:
        known = self._catalogue.scope(tenant, model.id, settings)
        return known or Scope(None, model.id, model.name, model.geometry, settings, self._salt_of_none)

    def source(self, model: Model, tenant: str, settings: str, tokens: np.ndarray) -> tuple[int, int | None]:
        """(groups of these tokens that are still there, a sequence that has them), their tokens compared."""
        scope = self._scope(model, tenant, settings)
        found, sequence_id, miss, num_dropped = self._search(scope, _bytes(tokens), compare=True)
        self.counters.of(tenant, model.name).compared(miss, num_dropped)
        return found, sequence_id

    def _search(self, scope: Scope, tokens: bytes, compare: bool, verify: bool = False) -> LookUp:
        """Without anything to compare or to suspect no sequence is looked for."""
        names = scope.chain(tokens)
        miss, num_dropped = None, 0
        while found := self._bisect(scope, names):
            if not compare and not self._suspects:
                return LookUp(found, None, miss, num_dropped)
            group_id, sequence_id = self._catalogue.holder(scope, names[found - 1], found - 1)
            position, wrong = 0, Miss.TOKENS_DIFFER
            if sequence_id is not None:
                position, wrong = self._confirm(scope, sequence_id, tokens, found, compare, verify)
                if wrong is None:
                    return LookUp(found, sequence_id, miss, num_dropped)
                group_id = self._catalogue.groups(sequence_id, found)[position][0]
            miss = wrong
            dropped = self._catalogue.drop_from(group_id)
            num_dropped += dropped
            what = "is damaged" if wrong == Miss.DAMAGED else "does not hold the tokens that it is named by"
            log.warning("prefix reuse: group %d %s: %d groups are not found any more", group_id, what, dropped)
        return LookUp(0, None, miss, num_dropped)

    def _bisect(self, scope: Scope, names: list[bytes]) -> int:
        """How many groups there are: a name that can be found, with one behind it that cannot."""
        if not names or not self._catalogue.has(scope.id, names[0]):
            return 0
        low, high = 1, len(names)
        if self._catalogue.has(scope.id, names[high - 1]):  # a prompt that comes again
            return high
        while high - low > 1:
            middle = (low + high) // 2
            begun = (middle - 1) // hashing.NEIGHBOURS * hashing.NEIGHBOURS + 1  # what begins its neighbourhood
            middle = begun if begun > low else middle  # lies on a page that is asked for later, too
            if self._catalogue.has(scope.id, names[middle - 1]):
                low = middle
            else:
                high = middle
        return low

    def _confirm(
        self, scope: Scope, sequence_id: int, tokens: bytes, count: int, compare: bool, verify: bool
    ) -> tuple[int, Miss | None]:
        """(the first group of a sequence that is not as the prompt has it, why not), or why: None."""
        group_bytes = 4 * scope.geometry.group_tokens
        wanted = tokens[: count * group_bytes]
        if compare and (stored := self._catalogue.tokens(sequence_id, len(wanted) // 4)) != wanted:
            starts = range(0, len(wanted), group_bytes)
            same = (
                stored[start : start + group_bytes] == wanted[start : start + group_bytes] for start in starts
            )
            return list(same).index(False), Miss.TOKENS_DIFFER
        if verify or self._suspects:
            for position, (_, first_lba, num_lbas) in enumerate(self._catalogue.groups(sequence_id, count)):
                if self._is_damaged(first_lba, num_lbas, verify):
                    return position, Miss.DAMAGED
        return count, None

    def _is_damaged(self, first_lba: int, num_lbas: int, verify: bool) -> bool:
        """verify: have the drive read all of it; else only what has failed before."""
        suspects = {lba for lba in self._suspects if first_lba <= lba < first_lba + num_lbas}
        if not verify and not suspects:
            return False
        self._suspects -= suspects
        return bool(self._namespace.lost(first_lba, num_lbas))

    def _why(self, model: Model, tenant: str, scope: Scope, prompt: np.ndarray, found: int, sequences) -> Miss:
        """What the tenant's own sequences and scopes say of the first group that was not found."""
        if self._is_on_its_way(scope, prompt, found, sequences):
            return Miss.NOT_ON_FLASH
        if found:
            return Miss.UNKNOWN
        for other in self.others(tenant, prompt):
            if other.id != scope.id:
                return difference(model.name, model.geometry, other.model, other.geometry)
        return Miss.UNKNOWN

    def is_on_its_way(
        self, model: Model, tenant: str, settings: str, prompt: np.ndarray, found: int, sequences
    ) -> bool:
        """Whether a published sequence has a prompt's group number `found`, and has not stored it."""
        return self._is_on_its_way(self._scope(model, tenant, settings), prompt, found, sequences)

    def _is_on_its_way(self, scope: Scope, prompt: np.ndarray, found: int, sequences) -> bool:
        group_tokens = scope.geometry.group_tokens
        part = slice(found * group_tokens, (found + 1) * group_tokens)
        for name in self._catalogue.publishing(scope.id) if scope.id is not None else ():
            sequence = sequences.get(name)
            if sequence is not None and np.array_equal(sequence._tokens[part], prompt[part]):
                return True
        return False

    def others(self, tenant: str, prompt: np.ndarray) -> Iterator[Scope]:
        """A tenant's scopes, of any model and settings, where a prompt's first group can be found."""
        for scope in self._catalogue.recent_scopes(tenant):
            names = scope.chain(_bytes(prompt[: scope.geometry.group_tokens]))
            if names and self._catalogue.has(scope.id, names[0]):
                yield scope

    def usage(self) -> list[Usage]:
        """See Store.prefix_usage."""
        return self._catalogue.usage()

    def drop(self, is_chosen: Callable[[Usage], bool]) -> int:
        """Nothing of what is chosen is found any more; how many groups it were."""
        chosen = [usage for usage in self._catalogue.usage() if is_chosen(usage)]
        self._catalogue.drop_scopes([usage.scope_id for usage in chosen])
        return sum(usage.num_groups for usage in chosen)


def _bytes(tokens: np.ndarray) -> bytes:
    return tokens.astype("<u4", copy=False).tobytes()


def difference(model: str, geometry: KvGeometry, other_model: str, other_geometry: KvGeometry) -> Miss:
    """Why one is not the other: of what is wanted, and of what is there."""
    if other_model == model:
        return Miss.OTHER_SETTINGS
    shapes = [
        (each.num_layers, each.num_query_heads, each.num_kv_heads, each.head_dim)
        for each in (geometry, other_geometry)
    ]
    is_other_dtype = shapes[0] == shapes[1] and geometry.dtype != other_geometry.dtype
    return Miss.OTHER_DTYPE if is_other_dtype else Miss.OTHER_MODEL
