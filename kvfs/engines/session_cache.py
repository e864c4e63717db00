"""A KvfsCache that knows the ids of its tokens: what `enable` gives to `generate`.

Ids are noted as the model takes them in, so they say exactly what the stored keys and values are of, whatever
`generate` does with candidates and beams.
"""

from __future__ import annotations

import torch

from kvfs.engines.errors import TROUBLE, is_for_the_user
from kvfs.engines.transformers_cache import KvfsCache
from kvfs.owner_process import this_process
from kvfs.sequence_attributes import OWNER


class SessionCache(KvfsCache):
    """Rows that may begin with restored tokens.

    token_ids: int64 [num_rows, num_tokens] of what is stored, on the CPU; None once embeddings without ids came
    is_padded: a mask hid tokens, so that ids do not tell what keys and values there are
    room, num_shared: see SessionRoom; new tokens are stored when there is room for them
    failure: an error in between two steps, after which only the ids are right
    """

    def __init__(self, store, name, *, dtype, model, config, token_ids, room, num_shared, **sparse):
        super().__init__(store, name, dtype=dtype, model=model, **sparse)
        self._noted = {OWNER: this_process()}
        self._room = room
        self._num_shared = num_shared
        self._granted = None  # (rows, groups of each)
        self.model_name = model
        self.config = config
        self.token_ids: torch.Tensor | None = token_ids
        self.is_padded = False
        self.failure: Exception | None = None
        self.is_abandoned = False  # the answer goes on in memory
        self.wants_whole_prompt = False  # the first forward gets stored tokens, too (assisted decoding)

    def fit_rows(self, num_rows):
        """Several beams or answers for each prompt: its row as often as that, next to each other."""
        known = len(self.sequences)
        if known and num_rows != known and num_rows % known == 0:
            self.batch_repeat_interleave(num_rows // known)

    def took(self, input_ids, attention_mask):
        """The model has taken in these ids [num_rows, num_new_tokens], None for embeddings."""
        if attention_mask is not None and attention_mask.ndim == 2 and not bool(attention_mask.all()):
            self.is_padded = True
        if input_ids is None or self.token_ids is None:
            self.token_ids = None
            return
        new = input_ids.detach().cpu().to(torch.int64)
        past = self.token_ids if len(self.token_ids) else new[:, :0]
        self.token_ids = torch.cat([past, new], dim=1)

    def append(self, fresh, module, queries):
        if fresh.layer == 0 and not fresh.stored:
            if not self._layer_tokens:
                self._bind(module, queries, fresh.keys)
            self._take_room(fresh.num_past + fresh.keys.shape[2])
        super().append(fresh, module, queries)

    def _take_room(self, num_tokens):
        wanted = len(self._rows), -(-num_tokens // self._model.group_tokens)
        if wanted != self._granted:
            self._room.make_room(
                self._model.name, {row.name for row in self._rows}, num_tokens, self._num_shared
            )
            self._granted = wanted

    @property
    def tells_all(self):
        """Whether the ids say what is stored: only then others may take it."""
        return (
            not (self.is_padded or self.is_abandoned)
            and self.token_ids is not None
            and len(self.token_ids) == len(self.sequences) > 0
            and self.token_ids.shape[1] == self.get_seq_length()
        )

    def _truncate_to(self, num_tokens):
        self._noting_failure(super()._truncate_to, num_tokens)
        if self._model is not None:
            self._num_shared = min(self._num_shared, len(self._rows) * (num_tokens // self._model.group_tokens))
        if self.token_ids is not None:
            self.token_ids = self.token_ids[:, :num_tokens]

    def _rearrange(self, sources):
        self._noting_failure(super()._rearrange, sources)
        if self.token_ids is not None and len(self.token_ids):
            self.token_ids = self.token_ids[sources]

    def _noting_failure(self, change, argument):
        try:
            change(argument)
        except TROUBLE as error:
            if is_for_the_user(error) or self.token_ids is None:
                raise
            self.failure = error
