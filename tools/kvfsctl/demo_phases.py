"""The demo's phases, each a process of its own: `python -m kvfsctl.demo_phases` reads a Task from stdin.

Separate processes keep the figures honest: peak memory is one phase's, and reopening the drive starts from
nothing but its file. On stdout goes one JSON object a line: {"progress": tokens so far}, then {"result":
{...}}, or {"error": "..."} with a reason.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

import kvfs
import kvfs.errors
from kvfs.layout import default_group_tokens, row_dtype
from kvfsctl.demo_document import DemoError, document_ids, load_model
from kvfsctl.demo_load import LoadMeter
from kvfsctl.demo_processes import Task
from kvfsctl.demo_rivals import PAGE_SIZE, FileCache, rounded_cache

SEQUENCE = "demo"

WARM_UP_NEW_TOKENS = 4
LOSS_TOKENS = 128  # of the document, behind the prompt


class TokenClock(BaseStreamer):
    """Receives the tokens of generate(); knows when the first and the last came.

    at_first_token runs when the prefill is over and before decoding is timed.
    """

    def __init__(self, report_progress: bool, at_first_token: Callable[[], None] = lambda: None):
        self.tokens: list[int] = []
        self.prefill_s = 0.0
        self._at_first_token = at_first_token
        self._report_progress = report_progress
        self._started = None
        self._decode_started = None
        self._last = None
        self._load = None
        self.cpus_elsewhere = None

    def put(self, value):
        """The prompt first, then each token."""
        now = time.perf_counter()
        if self._started is None:
            self._started = now
            return
        self.tokens.append(int(value.reshape(-1)[-1]))
        if len(self.tokens) == 1:
            self.prefill_s = now - self._started
            self._at_first_token()
            self._load = LoadMeter()
            now = self._decode_started = time.perf_counter()
        self._last = now
        if self._report_progress:
            _say({"progress": len(self.tokens)})

    def end(self):
        """The last token has come."""
        self.cpus_elsewhere = self._load.cpus_elsewhere()

    def tokens_per_second(self):
        """Of the decode steps, that is of all tokens but the first, which the prefill yields."""
        return (len(self.tokens) - 1) / (self._last - self._decode_started) if len(self.tokens) > 1 else None


def _say(message):
    print(json.dumps(message), flush=True)


def _generate(model, ids, cache, num_tokens, clock):
    with torch.inference_mode():
        model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            past_key_values=cache,
            max_new_tokens=num_tokens,
            do_sample=False,
            streamer=clock,
        )
    return clock


def _warm_up_tokens(model, dtype):
    """Enough for every kernel that the measured part needs: more than a group, so that it is on flash."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return default_group_tokens(dtype, head_dim, PAGE_SIZE) + 64


def _warm_up(model, ids, cache, dtype):
    """Compile and load everything that the timed part uses."""
    prompt = ids[: _warm_up_tokens(model, dtype)]
    _generate(model, prompt, cache, WARM_UP_NEW_TOKENS, TokenClock(report_progress=False))


def _result(clock, **more):
    return {
        "tokens": clock.tokens,
        "prefill_s": clock.prefill_s,
        "tokens_per_second": clock.tokens_per_second(),
        "cpus_elsewhere": clock.cpus_elsewhere,
        "peak_rss_bytes": peak_rss_bytes(),
        **more,
    }


def peak_rss_bytes():
    """Highest resident memory of this process; not ru_maxrss, which a child inherits from its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


# -- rivals ----------------------------------------------------------------------------------------------------


def in_memory(task):
    """Plain Transformers: SDPA over K/V in memory, in the model's own dtype."""
    return _in_memory(task, DynamicCache)


def in_memory_rounded(task):
    """The same over K/V as they are stored."""
    return _in_memory(task, lambda: rounded_cache(task.dtype))


def _in_memory(task, new_cache):
    model, tokenizer = load_model(task.model_dir)
    ids = document_ids(tokenizer, task.context_tokens)
    _warm_up(model, ids, new_cache(), task.dtype)
    clock = _generate(model, ids, new_cache(), task.new_tokens, TokenClock(report_progress=True))
    text = document_ids(tokenizer, task.context_tokens + 1, LOSS_TOKENS - 1)
    return _result(clock, loss=_loss(model, text, task.context_tokens, new_cache()))


def _loss(model, ids, context_tokens, cache):
    """Mean negative log-likelihood (nats) of a document's tokens behind its first context_tokens."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:context_tokens]]), past_key_values=cache).logits[:, -1]
        total = 0.0
        for token in ids[context_tokens:]:
            total -= float(logits.log_softmax(-1)[0, token])
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[:, -1]
    return total / (len(ids) - context_tokens)


def offloading(task):
    """K/V in a file, each layer read back whole at each step, SDPA."""
    model, tokenizer = load_model(task.model_dir)
    ids = document_ids(tokenizer, task.context_tokens)

    def new_cache(name):
        capacity_tokens = task.context_tokens + task.new_tokens
        return FileCache(
            Path(task.directory) / name,
            model.config.num_hidden_layers,
            capacity_tokens,
            getattr(torch, row_dtype(task.dtype)),
        )

    warm = new_cache("offload-warm-up")
    _warm_up(model, ids, warm, task.dtype)
    warm.close()
    cache = new_cache("offload")
    counted = []
    clock = TokenClock(report_progress=True, at_first_token=lambda: counted.append(cache.link_bytes()))
    _generate(model, ids, cache, task.new_tokens, clock)
    link_bytes = cache.link_bytes() - counted[0]
    cache.close()
    return _result(clock, link_bytes_per_token=link_bytes / max(1, task.new_tokens - 1))


# -- kvfs ------------------------------------------------------------------------------------------------------


def kvfs_generate(task):
    """Format a drive, prefill the document, generate; everything is flushed when the phase ends."""
    model, tokenizer = load_model(task.model_dir)
    ids = document_ids(tokenizer, task.context_tokens)
    kvfs.format(task.drive, size=task.drive_bytes)
    with kvfs.open(task.drive, **task.open_options) as store:
        _warm_up_store(store, model, ids, task.dtype)
        return _decode_on(store, model, ids, task)


def kvfs_continue(task):
    """Open the drive and continue the sequence from flash: its tokens come from the drive too."""
    model, tokenizer = load_model(task.model_dir)
    began = time.perf_counter()
    with kvfs.open(task.drive, **task.open_options) as store:
        sequence = store.sequence(SEQUENCE)
        ids = [int(token) for token in sequence.tokens]
        open_s = time.perf_counter() - began
        stored = sequence.num_tokens
        if stored != len(ids) - 1:
            raise DemoError(f"the drive holds K/V of {stored} tokens and {len(ids)} token ids: cannot continue")
        _warm_up_store(store, model, document_ids(tokenizer, _warm_up_tokens(model, task.dtype)), task.dtype)
        return _decode_on(store, model, ids, task) | {"open_s": open_s, "tokens_from_flash": stored}


def _warm_up_store(store, model, ids, dtype):
    from kvfs.engines.transformers import KvfsCache

    cache = KvfsCache(store, "warm-up", dtype=dtype)
    _warm_up(model, ids, cache, dtype)
    store.delete_sequence("warm-up")


def _decode_on(store, model, ids, task):
    from kvfs.engines.transformers import KvfsCache

    cache = KvfsCache(store, SEQUENCE, dtype=task.dtype)
    num_known = len(cache.sequences[0].tokens) if cache.sequences else 0
    before_decode = {}

    def prefill_is_over():
        cache.flush()  # the prefill's writes are not decode's: keep them out of its time and its link bytes
        before_decode.update(store.counters())

    clock = _generate(model, ids, cache, task.new_tokens, TokenClock(True, prefill_is_over))
    sequence = cache.sequences[0]
    sequence.append_tokens((ids + clock.tokens)[num_known:])
    cache.flush()
    after = store.counters()
    link = {name: after["link"][name] - before_decode["link"][name] for name in after["link"]}
    return _result(
        clock,
        link_bytes_per_token=(link["bytes_to_drive"] + link["bytes_from_drive"]) / max(1, task.new_tokens - 1),
        link_bytes_to_drive_per_token=link["bytes_to_drive"] / max(1, task.new_tokens - 1),
        link_bytes_from_drive_per_token=link["bytes_from_drive"] / max(1, task.new_tokens - 1),
        commands_per_token=link["commands"] / max(1, task.new_tokens - 1),
        flash=after["flash"],
        attention=after["attention"],
        num_query_heads=sequence.model.num_query_heads,
        num_kv_heads=sequence.model.num_kv_heads,
    )


PHASES = {
    "in_memory": in_memory,
    "in_memory_rounded": in_memory_rounded,
    "offloading": offloading,
    "kvfs_generate": kvfs_generate,
    "kvfs_continue": kvfs_continue,
}


def main():
    """Run the task on stdin. Reasons go to stdout as one line; anything unexpected keeps its traceback."""
    task = Task(**json.load(sys.stdin))
    try:
        _say({"result": PHASES[task.phase](task)})
    except (DemoError, kvfs.errors.KvfsError, kvfs.errors.NvmeStatusError, OSError) as error:
        _say({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
