"""How good sparse attention is: predictions of real text behind a long context, against dense ones."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from kvfs_bench.sparse_model import Past, next_log_probabilities
from kvfs_bench.sparse_schemes import (
    SINK_TOKENS,
    Dense,
    MeanPages,
    Oracle,
    Scheme,
    Sketch,
    Sketches,
    SparF,
    Window,
)

DENSE, SKETCH, SPARF, WINDOW, ORACLE, MEANS = "dense", "sketch", "sparf", "window", "oracle", "means"
COMPRESSION = 8.0
COMPRESSIONS = (9.4, COMPRESSION, 6.0, 4.0)
SHARES = (1 / 16, 1 / 8, 1 / 6, 1 / 4)  # of the dense pages
CLEAR_NATS = 0.2
PUBLISHED_CHANNELS, PUBLISHED_PART = 16, 16  # at a head_dim of 128: r = head_dim / 8, k = tokens / 16
# (channels, part of the tokens) at a head_dim of 64; the paper's setting is the third
SPARF_PARTS = ((4, 64), (8, 32), (8, 16), (16, 8), (32, 4))


@dataclass(frozen=True)
class Setting:
    """A point of a curve.

    label: what was set, in words; simulate: past, its sketches -> what attends; on_drive: past -> options of
    Store.attend, None for what drives cannot do
    """

    scheme: str
    label: str
    simulate: Callable[[Past, Sketches], Scheme]
    on_drive: Callable[[Past], dict] | None = None


def sketch(compression: float) -> Setting:
    return Setting(
        SKETCH,
        f"compression {compression:g}",
        lambda past, sketches: Sketch(past, sketches, compression),
        lambda past: {"compression": compression},
    )


def sparf(channels: int, part: int) -> Setting:
    """As published, k of tokens / part."""
    return Setting(
        SPARF,
        f"r {channels}, k 1/{part}",
        lambda past, _: SparF(past, channels, past.num_tokens // part),
        lambda past: {"sparf": (channels, past.num_tokens // part)},
    )


def window(share: float) -> Setting:
    """Sinks and recent tokens that take this share of the pages."""
    return Setting(
        WINDOW,
        f"1/{1 / share:g}",
        lambda past, _: Window(past, share),
        lambda past: {"window": Window(past, share).num_tokens, "sink_tokens": SINK_TOKENS},
    )


def oracle(share: float) -> Setting:
    return Setting(ORACLE, f"1/{1 / share:g}", lambda past, _: Oracle(past, share))


def means(share: float) -> Setting:
    return Setting(MEANS, f"1/{1 / share:g}", lambda past, _: MeanPages(past, share))


PUBLISHED = sparf(8, PUBLISHED_PART)
DENSE_SETTING = Setting(DENSE, "all pages", lambda past, _: Dense(past), lambda _: {})
CURVES = [
    *(sketch(compression) for compression in COMPRESSIONS),
    *(sparf(*parts) for parts in SPARF_PARTS),
    *(make(share) for make in (window, oracle, means) for share in SHARES),
]
QUICK_CURVES = [sketch(COMPRESSION), PUBLISHED, *(make(1 / 6) for make in (window, oracle, means))]


@dataclass(frozen=True)
class Text:
    """past: of all tokens before ids; ids: int64 [n + 1], the last of which is only a target; expected: float32
    [n, vocabulary], the log probabilities that dense attention gives."""

    past: Past
    ids: torch.Tensor
    expected: torch.Tensor

    def first(self, num_tokens: int) -> "Text":
        """With so many tokens behind the past."""
        return Text(self.past, self.ids[: num_tokens + 1], self.expected[:num_tokens])


@dataclass
class Score:
    """Sums over the tokens of one text, with one setting.

    pages_read, pages_dense: of these, and of dense attention; loss, dense_loss, kl: nats; agreed: tokens whose
    likeliest successor is that of dense attention; clear, clear_agreed: of tokens for which dense attention
    prefers its first choice to its second by CLEAR_NATS or more
    """

    num_tokens: int
    pages_read: float
    pages_dense: float
    loss: float
    dense_loss: float
    kl: float
    agreed: int
    clear: int
    clear_agreed: int


def score(model, text: Text, past_attention) -> Score:
    """past_attention: a PastAttention with `pages`."""
    found = next_log_probabilities(model, text.ids[:-1], past_attention, text.past.num_tokens)
    targets, dense = text.ids[1:, None], text.expected
    best = dense.topk(2, -1).values
    clear = best[:, 0] - best[:, 1] >= CLEAR_NATS
    agreed = found.argmax(-1) == dense.argmax(-1)
    return Score(
        num_tokens=len(targets),
        pages_read=past_attention.pages.read,
        pages_dense=past_attention.pages.dense,
        loss=-float(found.gather(1, targets).sum()),
        dense_loss=-float(dense.gather(1, targets).sum()),
        kl=float((dense.exp() * (dense - found)).sum()),
        agreed=int(agreed.sum()),
        clear=int(clear.sum()),
        clear_agreed=int((agreed & clear).sum()),
    )


@dataclass
class Quality:
    """Of one setting, means over `num_tokens` tokens of all texts; `.._worst`: of the text that is worst.

    bytes_share: page bytes read over dense page bytes; perplexity_ratio: over dense perplexity, the worst is
    the farthest from 1; agreement: share of tokens whose likeliest successor is the same, clear_agreement: of
    those that are no near tie; kl: nats, of dense predictions to these
    """

    scheme: str
    label: str
    context: int
    num_texts: int
    num_tokens: int
    bytes_share: float
    bytes_share_worst: float
    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_worst: float
    agreement: float
    agreement_worst: float
    clear_agreement: float
    kl: float
    kl_worst: float

    def as_dict(self) -> dict:
        return asdict(self)


def quality(scheme: str, label: str, context: int, scores: list[Score]) -> Quality:
    """scores: of the texts."""

    def shares(over: str, under: str) -> tuple[list[float], float]:
        """Of each text, and of all."""
        parts = [(getattr(each, over), getattr(each, under)) for each in scores]
        sums = [sum(column) for column in zip(*parts, strict=True)]
        return [a / b if b else 1.0 for a, b in parts], sums[0] / sums[1] if sums[1] else 1.0

    num_tokens = sum(each.num_tokens for each in scores)
    read, bytes_share = shares("pages_read", "pages_dense")
    agreements, agreement = shares("agreed", "num_tokens")
    divergences, divergence = shares("kl", "num_tokens")
    losses, loss = shares("loss", "num_tokens")
    dense_losses, dense_loss = shares("dense_loss", "num_tokens")
    gains = [found - dense for found, dense in zip(losses, dense_losses, strict=True)]
    return Quality(
        scheme=scheme,
        label=label,
        context=context,
        num_texts=len(scores),
        num_tokens=num_tokens,
        bytes_share=bytes_share,
        bytes_share_worst=max(read),
        perplexity=math.exp(loss),
        perplexity_ratio=math.exp(loss - dense_loss),
        perplexity_ratio_worst=math.exp(max(gains, key=abs)),
        agreement=agreement,
        agreement_worst=min(agreements),
        clear_agreement=shares("clear_agreed", "clear")[1],
        kl=divergence,
        kl_worst=max(divergences),
    )
