"""How many pages hold a token that SparF chooses: `python -m machine_model.sparf_locality`.

SparF's tokens are chosen one by one, flash is read by the page. Tokens at random would be on 64% of pages of
16; real ones lie together. Measured on the shipped model over this repository's own source code, for each query
head alone, as in multi-head attention: the largest S/16 of approximate scores by head_dim/8 channels. Needs
torch and Transformers.
"""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

import kvfs
from kvfs_bench.sparse_model import load_model, next_log_probabilities, prefill
from kvfs_bench.sparse_schemes import Dense
from machine_model.layout_bytes import SPARF_PAGE_TOKENS

MODEL = Path(__file__).resolve().parents[1] / "kvfsctl" / "demo_model"
COMPRESSION = 8
CONTEXTS = (1536, 3072)
NEW_TOKENS = 64
MODEL_TOKENS = 4096


class _Touched(Dense):
    """Dense attention that notes which pages SparF would read."""

    def __init__(self, past):
        super().__init__(past)
        self.shares: list[float] = []

    def attend_head(self, layer, head, queries):
        keys, _ = self.keys_values(layer, head)
        rows = queries.reshape(-1, self.head_dim)
        size = rows.abs()
        mask = torch.zeros_like(rows).scatter_(1, size.topk(self.head_dim // COMPRESSION, -1).indices, 1.0)
        tau = (size * mask).sum(1) / size.sum(1)
        scores = (rows * mask / tau.sqrt()[:, None]) @ keys.T
        chosen = torch.zeros(scores.shape, dtype=torch.bool)
        chosen.scatter_(1, scores.topk(len(keys) // (2 * COMPRESSION), -1).indices, True)
        pages = chosen[:, : len(keys) // SPARF_PAGE_TOKENS * SPARF_PAGE_TOKENS]
        touched = pages.unflatten(-1, (-1, SPARF_PAGE_TOKENS)).any(-1)
        self.shares.append(touched.float().mean().item())
        return super().attend_head(layer, head, queries)


def pages_touched(num_tokens: int) -> float:
    """Share of pages behind num_tokens of source code, mean over layers, heads and queries."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    text = "".join(path.read_text() for path in sorted(Path(kvfs.__file__).parent.glob("*.py")))
    ids = torch.tensor(tokenizer(text)["input_ids"][: num_tokens + NEW_TOKENS])
    model = load_model(MODEL, MODEL_TOKENS)
    counted = _Touched(prefill(model, ids[:num_tokens]))
    next_log_probabilities(model, ids[num_tokens:], counted, num_tokens)
    return sum(counted.shares) / len(counted.shares)


if __name__ == "__main__":
    for count in CONTEXTS:
        print(f"{count:,} tokens: {pages_touched(count):.3f} of pages of {SPARF_PAGE_TOKENS} tokens")
