"""The sequences of a session: what a conversation left, what an answer works on, what becomes of it.

An answer works on sequences of its own, with names that nobody else uses. They begin with the longest stored
prefix of the prompt, by reference: of the session's own sequence, token by token, or of anything published with
the same tenant, model and settings, by whole groups. When the answer is there they take the session's name and
are published. So two processes with one session never write into one sequence; who ends last leaves his.
"""

import itertools
import json
import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from kvfs.engines.errors import CacheMismatch
from kvfs.engines.sequence_rows import row_names
from kvfs.errors import DriveLost, NoSuchModel, NoSuchSequence, SequenceExists
from kvfs.owner_process import this_process
from kvfs.sequence_attributes import OWNER, TENANT

log = logging.getLogger(__name__)

# Attribute of a session's sequences: JSON of the settings that their keys and values belong to.
SETTINGS = "user.kvfs_session"
# A continuation of less costs more in attention over two parts than it saves.
MIN_REUSED_TOKENS = 32

_counter = itertools.count()


@dataclass(frozen=True)
class Beginning:
    """What an answer begins with.

    name: of its sequences (row_names); num_tokens: of each row's prompt that are stored in them
    num_shared: whole groups in them that are the session's own
    miss: why not more, in a word (kvfs.prefix.match.Miss and a few of our own); None: all there is to be had,
        or a model that the store does not know yet
    """

    name: str
    num_tokens: int
    miss: str | None
    num_shared: int = 0


class SessionSequences:
    """Of one enabled model in one store."""

    def __init__(self, store, session, tenant):
        self._store = store
        self._session = session
        self._tenant = tenant
        self._remove_leftovers()

    def new_name(self):
        """Of an answer's sequences, that nobody else uses."""
        return f"{self._session}.{_process(os.getpid())}.{next(_counter)}"

    def begin(self, model_name, settings, prompts) -> Beginning:
        """Sequences for prompts, with what is stored of them.

        prompts: int64 [num_rows, num_tokens], or None where the ids do not tell all: then nothing is sought
        """
        name = self.new_name()
        if prompts is None:
            return Beginning(name, 0, "not_ids_alone")
        try:
            model = self._store.model(model_name)
        except NoSuchModel:
            for own_name in row_names(self._session, len(prompts)):
                self._own_row(own_name)
            return Beginning(name, 0, None)
        ids = prompts.numpy().astype(np.uint32)
        own = self._own_tokens(model_name, settings, ids)
        matches = [self._find(model, settings, row) for row in ids]
        found = [match.num_tokens for match in matches]
        num_tokens = min(map(max, own, found))
        miss = next((str(match.miss) for match in matches if match.miss), None)
        # The last token has to go through the model: its logits are what is asked for.
        num_tokens = min(num_tokens, ids.shape[1] - 1)
        if num_tokens < MIN_REUSED_TOKENS:
            return Beginning(name, 0, miss or "unknown")
        num_forks = sum(kept >= num_tokens for kept in own)
        num_tokens = self._take(name, num_tokens, own, matches, ids, settings)
        num_shared = num_forks * (num_tokens // model.group_tokens)
        return Beginning(name, num_tokens, None if num_tokens == ids.shape[1] - 1 else miss, num_shared)

    def _take(self, name, num_tokens, own, matches, ids, settings):
        """Make the rows of a new answer; returns how many tokens all of them have: no rows where too few."""
        own_names, new_names = row_names(self._session, len(own)), row_names(name, len(own))
        try:
            rows = []
            for own_name, new_name, kept, match in zip(own_names, new_names, own, matches, strict=True):
                if kept >= num_tokens:
                    rows.append(self._store.sequence(own_name).fork(new_name))
                    rows[-1].set_attribute(OWNER, this_process())
                else:
                    noted = {SETTINGS: _json(settings), OWNER: this_process()}
                    rows.append(self._store.restore_prefix(match, new_name, noted))
            # Somebody may have deleted or replaced what was found.
            tokens = [
                _common(row.tokens[: row.num_tokens], prompt) for row, prompt in zip(rows, ids, strict=True)
            ]
            num_tokens = min(num_tokens, *tokens)
            for row in rows:
                if row.num_tokens > num_tokens:
                    row.truncate(num_tokens)
            if num_tokens >= MIN_REUSED_TOKENS:
                return num_tokens
        except BaseException:
            self.drop(new_names)
            raise
        self.drop(new_names)
        return 0

    def _own_row(self, name):
        """A sequence of the session, None if it is not there. Raises CacheMismatch for somebody else's."""
        try:
            row = self._store.sequence(name)
            if SETTINGS in row.attributes():
                return row
        except NoSuchSequence:
            return None
        raise CacheMismatch(f"sequence {name!r} was not made by a session: choose another name for the session")

    def _own_tokens(self, model_name, settings, ids):
        """How many tokens of each prompt the session's own sequences begin with."""
        names = row_names(self._session, len(ids))
        return [self._num_own(*each, model_name, settings) for each in zip(names, ids, strict=True)]

    def _num_own(self, name, prompt, model_name, settings):
        try:
            row = self._own_row(name)
            is_usable = (
                row is not None
                and row.model.name == model_name
                and row.attributes().get(SETTINGS) == _json(settings)
                and row.attributes().get(TENANT, b"").decode() == self._tenant
            )
            count = _common(row.tokens[: row.num_tokens], prompt) if is_usable else 0
            if count:
                row.read(0, 0, 0)  # whether all of it can be used
            return count
        except DriveLost as error:
            log.warning("session %s: %s: it is not gone on with", self._session, error)
            return 0

    def _find(self, model, settings, prompt):
        return self._store.find_prefix(model, prompt, self._tenant, settings)

    def why_missed(self, model, settings, prompt):
        """Ask for a prompt whose model was new, so that it is counted; a reason or None."""
        found = self._find(model, settings, prompt.numpy().astype(np.uint32))
        return str(found.miss) if found.miss else None

    def keep(self, cache, settings, rows):
        """Let the session's sequences be these rows of a cache, published and durable; delete the others."""
        for position, name in zip(rows, row_names(self._session, len(rows)), strict=True):
            row = cache.sequences[position]
            row.append_tokens(cache.token_ids[position, row.num_token_ids :].numpy())
            row.set_attribute(SETTINGS, _json(settings))
            if self._tenant:
                row.set_attribute(TENANT, self._tenant.encode())
            row.publish(self._tenant, settings)
            row.remove_attribute(OWNER)
            self._give_name(row, name)
            row.flush()
        self.drop([row.name for position, row in enumerate(cache.sequences) if position not in rows])

    def _give_name(self, row, name):
        while row.name != name:  # or it was there already, when a drive was full the first time
            try:
                return self._store.rename_sequence(row.name, name)
            except SequenceExists:
                self._own_row(name)
                with suppress(NoSuchSequence):  # another process was as quick
                    self._store.delete_sequence(name)

    def drop_answer(self, cache):
        """Delete what an answer has worked on."""
        names = {row.name for row in cache.sequences} | set(row_names(cache.name, max(1, len(cache.sequences))))
        self.drop(sorted(names | {f"{row}.rearranging" for row in names}))

    def drop(self, names):
        """Delete sequences; what is gone already is fine."""
        for name in names:
            with suppress(NoSuchSequence):
                self._store.delete_sequence(name)

    def _remove_leftovers(self):
        """Delete what answers of processes that were killed have left."""
        pattern = re.compile(re.escape(self._session) + r"\.(\d+)-(\d+)\.\d+(\.\d+)?(\.rearranging)?")
        for row in self._store.catalogue_rows():
            found = pattern.fullmatch(row.name)
            if found and _process(int(found[1])) != f"{found[1]}-{found[2]}":
                log.info("session %s: %s was left by a process that is gone: deleted", self._session, row.name)
                self.drop([row.name])


def _process(pid):
    """`pid-start`, which no other process of this machine has had since it was started; '' for none."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            start = stat.read().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return f"{pid}-{start}"


def _json(settings):
    return json.dumps(settings, sort_keys=True).encode()


def _common(tokens, prompt):
    """How many tokens two rows of ids begin with alike."""
    length = min(len(tokens), len(prompt))
    different = np.flatnonzero(tokens[:length] != prompt[:length])
    return int(different[0]) if len(different) else length


def best_rows(token_ids, results, num_prompts):
    """Of each prompt's rows the one that the first of its results continues for longest.

    Returns [num_prompts] positions.
    token_ids: int64 [num_prompts * num_beams, num_tokens]; results: int64 [num_prompts * num_results, any]
    """
    per_prompt = len(token_ids) // num_prompts
    best = []
    for prompt in range(num_prompts):
        result = results[prompt * (len(results) // num_prompts)].cpu().to(torch.int64).numpy()
        rows = range(prompt * per_prompt, (prompt + 1) * per_prompt)
        best.append(max(rows, key=lambda row: _common(token_ids[row].numpy(), result)))
    return best
