"""What the tests of `enable` ask of models: answers in many ways, with kvfs and without."""

import copy

import torch
from transformers.generation.streamers import BaseStreamer


def greedy(model, ids, num_tokens=12, **options):
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=num_tokens, do_sample=False, **options)


def plain(model, ids, generate=greedy, **options):
    """Without kvfs: of a copy, which is not enabled."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa" if model.config._attn_implementation == "sdpa" else "eager")
    return generate(other, ids, **options)


def sampled(model, ids, **options):
    torch.manual_seed(3)
    return model.generate(ids, max_new_tokens=12, do_sample=True, top_k=20, **options)


WAYS = {
    "sampling": (sampled, {}),
    "beams": (greedy, {"num_beams": 3}),
    "several answers": (sampled, {"num_return_sequences": 2}),
    "chunked prefill": (greedy, {"prefill_chunk_size": 100}),
    "prompt lookup": (greedy, {"prompt_lookup_num_tokens": 3}),
    "drafts of its own first layer": (greedy, {"assistant_early_exit": 1}),
    "dict": (
        lambda *arguments, **options: greedy(*arguments, **options).sequences,
        {"return_dict_in_generate": True},
    ),
}


class Streamed(BaseStreamer):
    """What a user sees, token by token; `at(count)` is called when so many have come."""

    def __init__(self, at=lambda count: None):
        self.tokens, self._at = [], at

    def put(self, value):
        self.tokens += value.reshape(-1).tolist()
        self._at(len(self.tokens))

    def end(self):
        pass


def names(store, session):
    """Of the stored sequences of a session."""
    return [row.name for row in store.catalogue_rows() if row.name.startswith(session)]
