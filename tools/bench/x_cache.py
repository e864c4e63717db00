"""Decoding a multi-head model with X-cache, and without it, on a drive whose flash and link are the limits.

The flash is in memory; reads and what crosses the link sleep, without the GIL, until a drive and a link of the
stated bandwidths would have delivered them. Both are slow enough for this machine's cores to wait, so the
figures tell what the method makes of them. The model is a Llama with random weights, without grouped queries,
in float32; both ways and Transformers alone must give the same tokens. The drive's cache is emptied before each
token.
"""

import statistics
import time

import torch
import transformers

from accel.drive import Drive, DriveConfig, Geometry
from ftl.translation import FlashTranslationLayer
from kvfs.engines.transformers import KvfsCache, XCache
from kvfs.engines.x_cache.share import DRIVE, HOST, best_share
from kvfs.formatting import format_volume
from kvfs.store import Store
from kvfs_bench.figures import Figure
from kvfs_bench.limited import LimitedLink, LimitedMedia

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 6, 4, 64
NUM_TOKENS, ROUNDS = 2048, 5
DRIVE_BANDWIDTH, LINK_BANDWIDTH = 40e6, 30e6  # bytes/s
CACHE_BYTES = 8 << 20
GOAL = 1.3


def _model():
    torch.manual_seed(0)
    hidden = NUM_HEADS * HEAD_DIM
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=2 * NUM_TOKENS,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _greedy(model, ids, cache):
    """(id of the next token, which is not in the cache yet, and seconds)"""
    started = time.perf_counter()
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax()), time.perf_counter() - started


class _Contender:
    """One way to keep the cache, with a prompt in it."""

    def __init__(self, name, model, prompt, cache):
        self.name, self.cache = name, cache
        self._model, self._ids = model, prompt
        self.seconds: list[float] = []
        self.tokens: list[int] = []

    def step(self):
        found, seconds = _greedy(self._model, self._ids, self.cache)
        self._ids = torch.tensor([[found]])
        self.tokens.append(found)
        self.seconds.append(seconds)

    def limited_steps(self, drive, limits):
        """Two, of which the second counts: nothing of it was read ahead without limits."""
        for limit in limits:
            limit.is_limited = True
        for _ in range(2):
            drive.cache.clear()
            self.step()
        for limit in limits:
            limit.is_limited = False
        del self.seconds[-2]


def measure(quick: bool = False) -> list[Figure]:
    """quick: to see that it runs. Raises RuntimeError if tokens differ."""
    num_tokens, rounds = (512, 1) if quick else (NUM_TOKENS, ROUNDS)
    model = _model()
    prompt = torch.randint(1, 256, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    kv_bytes = 2 * num_tokens * NUM_LAYERS * NUM_HEADS * HEAD_DIM * 4
    media = LimitedMedia(Geometry.for_capacity(max(64 << 20, 6 * kv_bytes)), DRIVE_BANDWIDTH)
    FlashTranslationLayer.format(media).close()
    drive = Drive.over(media, DriveConfig(CACHE_BYTES, num_workers=1))
    format_volume(drive, "limited")
    link = LimitedLink(drive.transport, LINK_BANDWIDTH)
    shares = {place: best_share(LINK_BANDWIDTH, DRIVE_BANDWIDTH, 1, place) for place in (DRIVE, HOST)}
    with Store(drive, "limited", writeback_tokens=256) as store:
        ways = {"kv": KvfsCache(store, "kv", model=model)}
        for place, share in shares.items():
            ways[place] = XCache(store, f"x-{place}", model=model, x_share=share, x_placement=place)
        contenders = [_Contender(name, model, prompt, cache) for name, cache in ways.items()]
        contenders.append(_Contender("memory", model, prompt, transformers.DynamicCache()))
        for contender in contenders:
            contender.step()  # the prompt
            for _ in range(2):
                contender.step()
            contender.seconds.clear()
        for contender in contenders[:-1]:
            contender.cache.flush()
        for _ in range(rounds):
            for contender in contenders[:-1]:
                contender.limited_steps(drive, (media, link))
            for _ in range(2):
                contenders[-1].step()
        x_layers = {place: len(ways[place].x_layers) for place in shares}
        for place in shares:
            ways[place].close()
    if len({tuple(contender.tokens) for contender in contenders}) > 1:
        raise RuntimeError("tokens with X-cache differ from those without")
    rates = {contender.name: 1 / statistics.median(contender.seconds) for contender in contenders[:-1]}
    figures = []
    for place, share in shares.items():
        count = x_layers[place] / NUM_LAYERS
        on_drive = kv_bytes * (1 - count / 2 if place == DRIVE else 1 - count)
        over_link = kv_bytes * count / 2 if place == DRIVE else 0.0
        limit = 1 / max(on_drive / DRIVE_BANDWIDTH, over_link / LINK_BANDWIDTH)
        figures.append(
            Figure(
                f"x_cache.{place}.tokens",
                rates[place],
                "tokens/s",
                rival="K and V on the drive",
                rival_value=rates["kv"],
                ratio=rates[place] / rates["kv"],
                limit=limit,
                goal=GOAL * rates["kv"],
            )
        )
        figures.append(Figure(f"x_cache.{place}.share", share, "of layers"))
        figures.append(Figure(f"x_cache.{place}.layers", x_layers[place], "layers"))
    return figures


def settings(quick: bool = False) -> dict[str, str]:
    return {
        "model": f"Llama, random weights, float32, {NUM_LAYERS} layers, {NUM_HEADS} heads of {HEAD_DIM}, "
        "each with K and V of its own",
        "context": f"{512 if quick else NUM_TOKENS} tokens",
        "flash": f"in memory, limited to {DRIVE_BANDWIDTH / 1e6:.0f} MB/s by sleeping",
        "link": f"limited to {LINK_BANDWIDTH / 1e6:.0f} MB/s by sleeping; not for what stays in host memory",
        "limit": "what flash and link give for the bytes of a token, if each is always busy",
    }
