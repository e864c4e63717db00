"""How much of a drive a model's sessions may take: the oldest ones go before new tokens need their room.

The unit is a stored sequence: a session has one for each row of its batch. What was kept longest ago goes
first; never what is pinned (the attribute `user.kvfs.pinned`), the session that is open here, or what an answer
works on.

Bytes are those of each sequence by itself, also where several share groups, so they are never less than what
the drive has given. Only what an answer has of its own session's groups counts once.
"""

import logging
import re
from contextlib import suppress

from kvfs.engines.errors import CapReached
from kvfs.engines.session_sequences import SETTINGS
from kvfs.errors import InvalidArgument, NoSuchModel, NoSuchSequence, OutOfSpace
from kvfs.objects.object_cache import check_capacity
from kvfs.sequence_attributes import PINNED

log = logging.getLogger(__name__)

_WORK = re.compile(r".+\.\d+-\d+\.\d+(\.\d+)?(\.rearranging)?")  # SessionSequences.new_name, and rows of it


class SessionRoom:
    """Of one enabled model in one store.

    session: the open one; capacity_bytes, max_sequences: None: no such cap; evict_when_full: whether a full
    drive has sessions evicted as well. evictions: sequences deleted since this was made.

    Raises InvalidArgument.
    """

    def __init__(self, store, session, capacity_bytes=None, max_sequences=None, evict_when_full=False):
        if max_sequences is not None and (not isinstance(max_sequences, int) or max_sequences < 1):
            raise InvalidArgument(f"a number of sequences is at least one, not {max_sequences!r}")
        self.capacity_bytes, self.max_sequences = check_capacity(capacity_bytes), max_sequences
        self.evictions = 0
        self._store = store
        self._own = re.compile(re.escape(session) + r"(\.\d+)?")
        self._evict_when_full = evict_when_full
        self._is_session: dict[int, bool] = {}  # by number of a sequence; attributes need it opened

    def make_room(self, model_name, work=(), num_tokens=0, num_shared=0):
        """Evict until an answer may have so many tokens in each of its sequences.

        work: their names; num_shared: groups that they have of the open session's

        Raises CapReached, with none evicted, if that cannot be.
        """
        if self.capacity_bytes is None and self.max_sequences is None:
            return
        try:
            model = self._store.model(model_name)
        except NoSuchModel:
            return  # nothing of it is stored
        rows = [row for row in self._rows(model) if row.name not in work]
        own = [row for row in rows if self._own.fullmatch(row.name)]
        others = [row for row in rows if not self._is_in_use(row)]
        num_shared = min(num_shared, sum(row.num_tokens // model.group_tokens for row in own))
        num_bytes = sum(sequence_bytes(model, row.num_tokens) for row in rows)
        num_bytes += len(work) * sequence_bytes(model, num_tokens) - num_shared * group_bytes(model)
        count = len(others) + max(len(own), len(work))
        victims = []
        while self._is_too_much(num_bytes, count):
            victim = next((row for row in others if not self._is_pinned(row)), None)
            if victim is None:
                raise CapReached(num_bytes, self.capacity_bytes, count, self.max_sequences)
            others = others[others.index(victim) + 1 :]
            victims.append(victim)
            num_bytes, count = num_bytes - sequence_bytes(model, victim.num_tokens), count - 1
        for victim in victims:
            self._evict(victim)

    def with_room(self, model_name, work):
        """What work() returns; if a full drive may, it has a session evicted and calls it again."""
        while True:
            try:
                return work()
            except OutOfSpace:
                if not self._evict_when_full or not self._evict_oldest(model_name):
                    raise

    def _is_too_much(self, num_bytes, count):
        is_too_large = self.capacity_bytes is not None and num_bytes > self.capacity_bytes
        return is_too_large or (self.max_sequences is not None and count > self.max_sequences)

    def _rows(self, model):
        """Of the model's sessions and answers, those kept longest ago first."""
        rows = [row for row in self._store.catalogue_rows() if row.model_id == model.id]
        self._is_session = {
            row.id: self._is_session.get(row.id) or bool(_WORK.fullmatch(row.name)) or self._has(row, SETTINGS)
            for row in rows
        }
        return sorted((row for row in rows if self._is_session[row.id]), key=lambda r: (r.changed_ns, r.id))

    def _is_in_use(self, row):
        return bool(self._own.fullmatch(row.name) or _WORK.fullmatch(row.name))

    def _is_pinned(self, row):
        return self._has(row, PINNED, b"1")

    def _has(self, row, attribute, value=None):
        with suppress(NoSuchSequence):  # deleted meanwhile
            attributes = self._store.sequence(row.name).attributes()
            return attribute in attributes if value is None else attributes.get(attribute) == value
        return False

    def _evict_oldest(self, model_name):
        """Returns whether there was one to evict."""
        rows = self._rows(self._store.model(model_name))
        victim = next((row for row in rows if not self._is_in_use(row) and not self._is_pinned(row)), None)
        if victim is not None:
            self._evict(victim)
        return victim is not None

    def _evict(self, row):
        log.info("session %s of %d tokens is evicted", row.name, row.num_tokens)
        with suppress(NoSuchSequence):  # by others
            self._store.delete_sequence(row.name)
        self.evictions += 1


def group_bytes(model):
    return model.layout.group_lbas * model.layout.page_size


def sequence_bytes(model, num_tokens):
    """Of flash, at most: whole groups, and the record of tokens that fill no page."""
    layout = model.layout
    tail_lbas = layout.group_lbas // layout.pages_per_head + 1
    num_groups = -(-num_tokens // model.group_tokens)
    return num_groups * group_bytes(model) + bool(num_tokens) * tail_lbas * layout.page_size
