"""Needles in a haystack: made-up names that are defined once, far back, and have to be spelt at the end.

A name is 16 random letters, so that nothing but its definition tells how it goes on. The question gives the
first of them; a needle is found when greedy decoding gives all others. It is asked for in one pass: as long as
each letter is the likeliest after those before it, greedy decoding takes it. The shipped model finds about half
of these with dense attention in 8k; whole names, or values of variables, it never does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvfs_bench.sparse_model import Past, PastAttention, next_log_probabilities

NAME_LETTERS, ANSWER_LETTERS = 16, 2
BEFORE, AFTER = "\n    def ", "(self):\n        pass\n"
NEWLINE = "Ċ"  # of byte-level BPE


@dataclass(frozen=True)
class Needle:
    """Ids. position: of the definition's first token in the text."""

    definition: list[int]
    question: list[int]
    answer: list[int]
    position: int = 0


def make_needles(tokenizer, count: int, seed: int) -> list[Needle]:
    vocabulary = tokenizer.get_vocab()
    letters = sorted(
        number
        for token, number in vocabulary.items()
        if len(token) == 1 and token.isascii() and token.isalpha()
    )
    before, after = (tokenizer(text)["input_ids"] for text in (BEFORE, AFTER))
    random = np.random.default_rng([9, seed])
    needles = []
    for _ in range(count):
        name = random.choice(letters, NAME_LETTERS).tolist()
        known, answer = name[:-ANSWER_LETTERS], name[-ANSWER_LETTERS:]
        needles.append(Needle(before + name + after, before + known, answer))
    return needles


def haystack(
    tokenizer, document: Sequence[int], num_tokens: int, needles: list[Needle]
) -> tuple[list[int], list[Needle]]:
    """(num_tokens ids: the document with the needles' definitions at equal distances, between lines;
    the needles with their positions)."""
    begins_line = {number for token, number in tokenizer.get_vocab().items() if token.startswith(NEWLINE)}
    ids: list[int] = []
    placed, at = [], 0
    for number, needle in enumerate(needles):
        target = int((number + 0.5) * num_tokens / len(needles))
        while len(ids) < target or document[at] not in begins_line:
            ids.append(document[at])
            at += 1
        placed.append(replace(needle, position=len(ids)))
        ids += needle.definition
    ids += document[at : at + num_tokens - len(ids)]
    assert len(ids) == num_tokens, "the last needle ends within the text, and the document is long enough"
    return ids, placed


def is_found(model, needle: Needle, past: Past, past_attention: PastAttention) -> bool:
    ids = torch.tensor(needle.question + needle.answer[:-1])
    found = next_log_probabilities(model, ids, past_attention, past.num_tokens).argmax(-1)
    return found[-len(needle.answer) :].tolist() == needle.answer
