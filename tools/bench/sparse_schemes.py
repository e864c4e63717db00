"""Ways to read less of a past, simulated in torch over all of it; what they would read is counted in pages.

All page-level choices are made per query and KV head, by the sum over its query heads, as a decoding drive
makes them. Pages of index structures count like any others. The sketch and SparF follow accel.sketch and
accel.sparf; means, windows and the oracle are what these are compared with.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch

from accel.sketch.codebook import SCORE_VARIANCE
from accel.sketch.encoder import encode
from accel.sketch.reference import decode, sketch_layout, token_order
from accel.sketch.selection import choose_units, run_of, units_within
from accel.sparf.selection import choose_channels
from kvfs_bench.sparse_model import Past
from spdk_glue.derived_layout import MEAN_TOKENS, groups_per_segment
from spdk_glue.vendor_command import Derive, KvDtype

PAGE_SIZE = 4096
ELEMENT_BYTES = 2
QUERIES_AT_ONCE = 32  # scores of so many fit in the CPU's caches
SINK_TOKENS = 32


@dataclass
class PagesRead:
    """Summed over queries, layers and KV heads."""

    read: float = 0.0
    dense: float = 0.0

    @property
    def share(self) -> float:
        return self.read / self.dense if self.dense else 0.0


class Scheme(ABC):
    """A PastAttention that a subclass defines for one head."""

    def __init__(self, past: Past):
        self.past = past
        self.pages = PagesRead()
        self.head_dim = past.keys[0].shape[-1]
        self.page_tokens = PAGE_SIZE // (ELEMENT_BYTES * self.head_dim)
        self.num_pages = -(-past.num_tokens // self.page_tokens)  # of K, and as many of V
        self.dense_pages = 2 * self.num_pages

    def attend(self, layer: int, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of PastAttention."""
        outs, lses = torch.empty(queries.shape), torch.empty(queries.shape[:-1])
        for head in range(queries.shape[1]):
            for start in range(0, len(queries), QUERIES_AT_ONCE):
                part = slice(start, start + QUERIES_AT_ONCE)
                out, lse, read = self.attend_head(layer, head, queries[part, head])
                outs[part, head], lses[part, head] = out, lse
                self.pages.read += read
                self.pages.dense += self.dense_pages * len(out)
        return outs, lses

    @abstractmethod
    def attend_head(
        self, layer: int, head: int, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(out, lse, pages read by all queries) of queries [num_queries, group_size, head_dim]."""

    def keys_values(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.past.keys[layer][head], self.past.values[layer][head]


def _softmax(*parts: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) over parts (scores [..., n], values [n, head_dim]) together."""
    lse = torch.stack([scores.logsumexp(-1) for scores, _ in parts]).logsumexp(0)
    out = sum((scores - lse[..., None]).exp() @ values for scores, values in parts)
    return out, lse


def _ranked(mass: torch.Tensor, count: int) -> torch.Tensor:
    """bool [num_queries, n]: the `count` entries of log mass [num_queries, group_size, n] that hold the largest
    share of the softmax, summed over the group."""
    share = mass.softmax(-1).sum(1)
    best = share.topk(min(count, share.shape[-1]), -1).indices
    return torch.zeros(share.shape, dtype=torch.bool).scatter_(1, best, True)


def _by_page(scores: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """Log mass of each page, of scores [..., num_tokens]; the last page may be shorter."""
    short = -scores.shape[-1] % page_tokens
    padded = torch.nn.functional.pad(scores, (0, short), value=-math.inf)
    return padded.unflatten(-1, (-1, page_tokens)).logsumexp(-1)


def _of_tokens(pages: torch.Tensor, page_tokens: int, num_tokens: int) -> torch.Tensor:
    """bool [num_queries, 1, num_tokens] of bool [num_queries, num_pages]."""
    return pages.repeat_interleave(page_tokens, -1)[:, None, :num_tokens]


class Dense(Scheme):
    def attend_head(self, layer, head, queries):
        keys, values = self.keys_values(layer, head)
        return *_softmax((queries @ keys.T, values)), self.dense_pages * len(queries)


class Window(Scheme):
    """The first tokens and the last ones: arXiv:2309.17453."""

    def __init__(self, past: Past, share: float):
        super().__init__(past)
        sink_pages = -(-SINK_TOKENS // self.page_tokens)
        self._num_recent = max(1, int(share * self.num_pages) - sink_pages)
        self._read = 2 * (sink_pages + self._num_recent)
        self.num_tokens = (
            past.num_tokens - (self.num_pages - self._num_recent) * self.page_tokens
        )  # recent ones

    def attend_head(self, layer, head, queries):
        first = (self.num_pages - self._num_recent) * self.page_tokens
        keys, values = (torch.cat([part[:SINK_TOKENS], part[first:]]) for part in self.keys_values(layer, head))
        return *_softmax((queries @ keys.T, values)), self._read * len(queries)


class Oracle(Scheme):
    """The pages with the largest true share of the softmax, known without reading anything."""

    def __init__(self, past: Past, share: float):
        super().__init__(past)
        self._count = max(1, int(share * self.num_pages))

    def attend_head(self, layer, head, queries):
        keys, values = self.keys_values(layer, head)
        scores = queries @ keys.T
        chosen = _ranked(_by_page(scores, self.page_tokens), self._count)
        unread = ~_of_tokens(chosen, self.page_tokens, len(keys))
        return *_softmax((scores.masked_fill(unread, -math.inf), values)), 2 * self._count * len(queries)


class MeanPages(Scheme):
    """Pages ranked by their mean key; mean key and mean value stand for those that are not read."""

    def __init__(self, past: Past, share: float):
        super().__init__(past)
        self._summary_pages = -(-self.dense_pages // self.page_tokens)
        self._count = max(1, int((share * self.dense_pages - self._summary_pages) / 2))

    def attend_head(self, layer, head, queries):
        keys, values = self.keys_values(layer, head)
        mean_keys, mean_values = (
            torch.stack([page.mean(0) for page in part.split(self.page_tokens)]) for part in (keys, values)
        )
        scores, mass = queries @ keys.T, queries @ mean_keys.T + math.log(self.page_tokens)
        chosen = _ranked(mass, self._count)
        unread = ~_of_tokens(chosen, self.page_tokens, len(keys))
        out, lse = _softmax(
            (scores.masked_fill(unread, -math.inf), values),
            (mass.masked_fill(chosen[:, None], -math.inf), mean_values),
        )
        return out, lse, (2 * self._count + self._summary_pages) * len(queries)


@dataclass
class SketchedHead:
    """What sketch and refinements stand for, float32 [num_tokens, head_dim] each, as the sketch orders them;
    sizes: of a key without its mean, mean square per channel, [num_tokens]."""

    keys: torch.Tensor
    values: torch.Tensor
    refined_keys: torch.Tensor
    refined_values: torch.Tensor
    sizes: torch.Tensor


@dataclass
class Sketches:
    """A past as the drive's sketches hold it, coded by accel.sketch; made when first asked for, and shared."""

    past: Past
    index_pages: int = 0  # of one head of one layer, as the rest
    refinement_pages: int = 0
    unit_tokens: int = 0
    _heads: dict[tuple[int, int], SketchedHead] = field(default_factory=dict)

    def __post_init__(self):
        for layout in self._layouts():
            self.index_pages += layout.index_pages
            self.refinement_pages += layout.refinement_pages
            self.unit_tokens = layout.unit_tokens

    def _layouts(self):
        """Of the segments: full ones, then what is left."""
        head_dim = self.past.keys[0].shape[-1]
        full = groups_per_segment(Derive.SKETCH, PAGE_SIZE, head_dim, KvDtype.FLOAT16, 1)
        for first in range(0, self.past.num_tokens, full):
            yield sketch_layout(PAGE_SIZE, head_dim, min(full, self.past.num_tokens - first))

    def head(self, layer: int, head: int) -> SketchedHead:
        if (layer, head) not in self._heads:
            self._heads[layer, head] = self._coded(self.past.keys[layer][head], self.past.values[layer][head])
        return self._heads[layer, head]

    def _coded(self, keys: torch.Tensor, values: torch.Tensor) -> SketchedHead:
        parts, first = [], 0
        for layout in self._layouts():
            rows = slice(first, first := first + layout.num_tokens)
            pages = encode(keys[rows].numpy(), values[rows].numpy(), layout)
            none, every = (np.full(layout.refinement_pages, refined) for refined in (False, True))
            decoded = (*decode(pages, layout, none), *decode(pages, layout, every))
            order = token_order(pages, layout)
            ordered = keys[rows].numpy()[order]
            means = np.repeat(_means(ordered), MEAN_TOKENS, axis=0)[: len(order)]
            sizes = np.square(ordered - means).mean(axis=1)
            parts.append((*(each[order] for each in decoded), sizes))
        return SketchedHead(*(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)))


def _means(rows: np.ndarray) -> np.ndarray:
    """Of each MEAN_TOKENS rows."""
    return np.stack(
        [rows[first : first + MEAN_TOKENS].mean(axis=0) for first in range(0, len(rows), MEAN_TOKENS)]
    )


class Sketch(Scheme):
    """All tokens by 2-bit codes, the units that matter by 6-bit ones: see accel/sketch."""

    def __init__(self, past: Past, sketches: Sketches, compression: float):
        super().__init__(past)
        self._sketches = sketches
        self._count = units_within(
            compression, self.dense_pages, sketches.index_pages, sketches.refinement_pages
        )

    def attend_head(self, layer, head, queries):
        coded, sketches = self._sketches.head(layer, head), self._sketches
        scores = queries @ coded.keys.T
        scores -= 0.5 * SCORE_VARIANCE * queries.square().sum(-1, keepdim=True) * coded.sizes
        read = (sketches.index_pages + self._count) * len(queries)
        if not self._count:
            return *_softmax((scores, coded.values)), read
        mass = _by_page(scores, sketches.unit_tokens).swapaxes(1, 2).numpy()
        best = torch.from_numpy(choose_units(mass, self._count, run=run_of(sketches.unit_tokens)))
        chosen = torch.zeros(mass.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        chosen = _of_tokens(chosen, sketches.unit_tokens, self.past.num_tokens)
        refined = (queries @ coded.refined_keys.T).masked_fill(~chosen, -math.inf)
        scores.masked_fill_(chosen, -math.inf)
        return *_softmax((scores, coded.values), (refined, coded.refined_values)), read


class SparF(Scheme):
    """As published (arXiv:2409.04992): r channels, then k tokens, the union over a KV head's query heads."""

    def __init__(self, past: Past, channels: int, tokens: int):
        super().__init__(past)
        self._channels, self._tokens = channels, tokens
        # of one channel; a page of means of V for each segment
        self._segments = -(-past.num_tokens * ELEMENT_BYTES // PAGE_SIZE)

    def attend_head(self, layer, head, queries):
        keys, values = self.keys_values(layer, head)
        outs, lses, read = [], [], 0
        for query in queries:
            channels, weights = choose_channels(query.numpy(), self._channels, 1.0)
            approximate = torch.from_numpy(weights) @ keys[:, channels].T
            chosen = torch.zeros(len(keys), dtype=torch.bool)
            chosen[approximate.topk(min(self._tokens, len(keys)), -1).indices.flatten()] = True
            tokens = chosen.nonzero()[:, 0]
            alpha = approximate.softmax(-1)[:, tokens].sum(-1).clamp(1e-30, 1)
            out, lse = _softmax((query @ keys[tokens].T, values[tokens]))
            outs.append(alpha[:, None] * out + (1 - alpha)[:, None] * values.mean(0))
            lses.append(lse - alpha.log())
            read += (len(channels) + 1) * self._segments
            read += 2 * len((tokens // self.page_tokens).unique())
        return torch.stack(outs), torch.stack(lses), read
