"""`enable(model, store, session=...)`: from then on `model.generate(**inputs)` uses kvfs, without another word.

What `generate` is told stays what it is; it is given a cache that begins with the longest stored prefix of the
prompt, and computes the rest. What the drive cannot give or take never changes a token: damaged keys and values
are computed anew from the ids, and where nothing can be stored the answer goes on in memory, with one warning.

Methods of this one model object are replaced, the class stays: other models of it compute as before.
"""

import functools
import inspect
import logging
import threading
import types
import weakref
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMode

from kvfs.engines.errors import TROUBLE, CapReached, UnsupportedModel, UnsupportedOption, is_for_the_user
from kvfs.engines.model_identity import (
    check_config,
    identity_settings,
    storage_dtype,
    tokenizer_digest,
    whole_model_name,
)
from kvfs.engines.session_cache import SessionCache
from kvfs.engines.session_room import SessionRoom
from kvfs.engines.session_sequences import Beginning, SessionSequences, best_rows
from kvfs.errors import InvalidArgument, NvmeStatusError, OutOfSpace
from kvfs.model import check_name
from kvfs.prefix.match import check_tenant
from kvfs.sparse import sparse_of
from spdk_glue.vendor_command import DTYPE_OF_NAME

log = logging.getLogger(__name__)

# Arguments beside the generation settings that leave keys and values a matter of token ids alone.
_OF_IDS_ALONE = {"input_ids", "attention_mask", "output_attentions", "output_hidden_states"}

# Tokens that are computed anew at once.
_FILL_TOKENS = 2048

_SESSION = "_kvfs_session"  # attribute of an enabled model


def enable(
    model,
    store,
    session,
    tokenizer=None,
    *,
    tenant="",
    dtype=None,
    capacity_bytes=None,
    max_sequences=None,
    evict_when_full=False,
    compression=None,
    target_error=None,
    sparf=None,
    exact_if_cached=True,
):
    """Have `model.generate(...)` keep its keys and values in a kvfs store, and begin with those stored before.

    model:     a causal language model of Transformers, in eval mode
    store:     an open store; it must stay open until `disable`
    session:   name of the conversation: its sequence, which the next call or process goes on with. A batch
               without padding is `session.0`, `session.1`, ...; of a padded one nothing is kept.
    tokenizer: makes a miss of what another tokenizer's ids have stored
    tenant:    who else may begin with what is stored: sessions of the same tenant, model and settings
    dtype:     storage dtype as for KvfsCache; by default the model's
    capacity_bytes: what all sessions of this model may take, a number or a size like "8GiB"; the oldest
               are deleted before new tokens need their room, at once those that are too much already. Never the
               open one or what is pinned (`user.kvfs.pinned`): an answer without room is not stored.
    max_sequences: how many sequences they may be, one for each row of a session
    evict_when_full: have the oldest deleted also when the drive is full; otherwise answers are not stored then
    compression, target_error, sparf, exact_if_cached: decoding reads less than all stored tokens, as for
               KvfsCache. What an answer has stored is then found by sessions of the same choice only.

    Returns the Session, whose `last` says what the latest call has found. A model that is enabled already is
    disabled first. Calls with `past_key_values` or `use_cache=False` are left alone. Raises UnsupportedModel,
    InvalidArgument.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is no Transformers model (of a wrapper, such as PEFT's or "
            "torch.compile's, pass the model inside)"
        )
    if dtype is not None and dtype not in DTYPE_OF_NAME:
        raise InvalidArgument(f"dtype {dtype!r}: choose one of {', '.join(DTYPE_OF_NAME)}")
    sparse = {"compression": compression, "target_error": target_error, "sparf": sparf}
    sparse_of(None, **sparse, exact_if_cached=exact_if_cached)
    if not exact_if_cached:
        sparse["exact_if_cached"] = False
    check_name(session, "session")
    check_tenant(tenant)
    check_config(model.config.get_text_config(decoder=True))
    check_config(model.config)
    disable(model)
    room = SessionRoom(store, session, capacity_bytes, max_sequences, evict_when_full)
    try:
        room.make_room(whole_model_name(model, dtype or storage_dtype(model.dtype)))
    except CapReached as error:
        raise InvalidArgument(str(error)) from error
    model.__dict__[_SESSION] = enabled = Session(model, store, session, tokenizer, tenant, dtype, room, sparse)
    return enabled


def disable(model):
    """Undo `enable`; what is stored stays. Without one before it does nothing."""
    enabled = model.__dict__.pop(_SESSION, None)
    if enabled is not None:
        enabled._undo()


@dataclass(frozen=True)
class Reuse:
    """What a call of generate began with.

    num_tokens: of each row's prompt, from the store; num_prompt_tokens: of the prompt
    miss: why not more, in a word; None: all there is to be had
    is_kept: whether the answer is stored, and found by the next
    """

    num_tokens: int
    num_prompt_tokens: int
    miss: str | None
    is_kept: bool = False


class Session:
    """An enabled model.

    last: Reuse of the latest call of generate, None before the first; room: its caps, and what was evicted
    num_refused: answers that a full drive, or a cap, had no room for; the first is told
    """

    def __init__(self, model, store, session, tokenizer, tenant, dtype, room, sparse):
        self.name = session
        self.last: Reuse | None = None
        self.room = room
        self.num_refused = 0
        self._model = weakref.ref(model)
        self._store = store
        self._dtype = dtype or storage_dtype(model.dtype)
        self._sparse = {name: value for name, value in sparse.items() if value is not None}
        self._tokenizer = None if tokenizer is None else tokenizer_digest(tokenizer)
        self._sequences = SessionSequences(store, session, tenant)
        self._inside = threading.local()  # drafts of a model for itself go on without kvfs
        self._attention = model.config._attn_implementation
        if self._attention != "sdpa":
            model.set_attn_implementation("kvfs")
        self._methods = [
            _Method(model, name, function)
            for name, function in (
                ("generate", self._generate),
                ("forward", self._forward),
                ("prepare_inputs_for_generation", self._prepare_inputs),
                ("generate_batch", _refuse_continuous_batching),
                ("init_continuous_batching", _refuse_continuous_batching),
                ("continuous_batching_context_manager", _refuse_continuous_batching),
            )
        ]

    def __deepcopy__(self, memo):
        return None  # a copy of the model is not enabled

    def __repr__(self):
        return f"<Session {self.name!r} of {type(self._model()).__name__}, last: {self.last}>"

    def _undo(self):
        for method in self._methods:
            method.remove()
        self._model().set_attn_implementation(self._attention)

    # -- generate ----------------------------------------------------------------------------------------------

    def _generate(self, generate, *args, **kwargs):
        if kwargs.get("past_key_values") is None:
            kwargs.pop("past_key_values", None)
        given = inspect.signature(generate).bind(*args, **kwargs).arguments
        options = given.pop("kwargs", {})
        if "past_key_values" in options or getattr(self._inside, "generate", False):
            return generate(*args, **kwargs)
        model = self._model()
        config, inputs = model._prepare_generation_config(given.get("generation_config"), **options)
        if config.cache_implementation is not None:
            raise UnsupportedOption(
                f"cache_implementation={config.cache_implementation!r}: this model keeps its cache in kvfs: "
                "leave it out, or call kvfs.engines.transformers.disable(model) first"
            )
        if not config.use_cache:
            return generate(*args, **kwargs)
        ids = given.get("inputs", options.get("input_ids"))
        prompts = ids.detach().cpu().to(torch.int64) if _tells_all(ids, given, inputs, config) else None
        cache, reuse, settings = self._begin(model, prompts, 0 if ids is None else ids.shape[-1])
        cache.wants_whole_prompt = (
            config.get_generation_mode(given.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION
        )
        self.last = reuse
        self._inside.generate = True
        try:
            results = generate(*args, **kwargs, past_key_values=cache)
        except BaseException:
            self._drop(cache)
            raise
        finally:
            self._inside.generate = False
        self.last = self._end(cache, reuse, settings, prompts, getattr(results, "sequences", results))
        return results

    def _begin(self, model, prompts, num_prompt_tokens):
        """(cache, Reuse, settings) of an answer."""
        model_name, settings = whole_model_name(model, self._dtype), identity_settings(model, self._tokenizer)
        # keys and values behind attention that left something out are not what others would compute
        settings = {**settings, **{name: str(value) for name, value in self._sparse.items()}}
        try:
            found = self.room.with_room(
                model_name, lambda: self._sequences.begin(model_name, settings, prompts)
            )
        except TROUBLE as error:
            if is_for_the_user(error):
                raise
            log.warning("session %s: %s: nothing is taken from the store", self.name, error)
            found = Beginning(self._sequences.new_name(), 0, "failed")
        token_ids = torch.empty(0, 0, dtype=torch.int64) if prompts is None else prompts[:, : found.num_tokens]
        if not found.num_tokens:
            token_ids = token_ids[:0]
        cache = SessionCache(
            self._store,
            found.name,
            dtype=self._dtype,
            model=model_name,
            config=model.config.get_text_config(decoder=True),
            token_ids=token_ids,
            room=self.room,
            num_shared=found.num_shared,
            **self._sparse,
        )
        return cache, Reuse(found.num_tokens, num_prompt_tokens, found.miss), settings

    def _end(self, cache, reuse, settings, prompts, results):
        """Keep what the answer has stored, if others may have it; returns the Reuse."""
        try:
            if prompts is None or not cache.tells_all:
                self._drop(cache)
                return reuse
            if not reuse.num_tokens and reuse.miss is None:  # of a model that was new to the store
                miss = self._sequences.why_missed(cache.sequences[0].model, settings, prompts[0])
                reuse = Reuse(0, reuse.num_prompt_tokens, miss)
            rows = best_rows(cache.token_ids, results, len(prompts))
            self.room.with_room(
                cache.sequences[0].model.name, lambda: self._sequences.keep(cache, settings, rows)
            )
            return Reuse(reuse.num_tokens, reuse.num_prompt_tokens, reuse.miss, is_kept=True)
        except TROUBLE as error:
            if is_for_the_user(error):
                raise
            if self._is_news(error):
                log.warning("session %s: %s: this answer is not kept", self.name, error)
            self._drop(cache)
            return reuse

    def _is_news(self, error):
        """Whether to tell of it: want of room is told once, and counted."""
        if not isinstance(error, OutOfSpace):
            return True
        self.num_refused += 1
        return self.num_refused == 1

    def _drop(self, cache):
        try:
            self._sequences.drop_answer(cache)
        except TROUBLE as error:
            log.warning("session %s: %s: what an answer worked on is left behind", self.name, error)

    # -- each step ---------------------------------------------------------------------------------------------

    def _prepare_inputs(self, prepare, input_ids, next_sequence_length=None, **kwargs):
        cache = kwargs.get("past_key_values")
        if isinstance(cache, SessionCache) and cache.wants_whole_prompt and next_sequence_length is None:
            # Assisted decoding begins with the whole prompt, stored or not.
            cache.wants_whole_prompt = False
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        return prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    def _forward(self, forward, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, SessionCache):
            return forward(*args, **kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        try:
            if ids is not None:
                cache.fit_rows(ids.shape[0])
            if cache.failure is not None:
                raise cache.failure
            outputs = self.room.with_room(cache.model_name, lambda: forward(*args, **kwargs))
        except TROUBLE as error:
            if is_for_the_user(error) or ids is None or cache.token_ids is None:
                raise
            return self._without_what_failed(forward, error, cache, ids, args, kwargs)
        cache.took(ids, kwargs.get("attention_mask"))
        return outputs

    def _without_what_failed(self, forward, error, cache, ids, args, kwargs):
        """The step again, its past computed from the ids: on the drive if that is only damaged, or here."""
        past = cache.token_ids if len(cache.token_ids) else ids[:, :0].cpu()
        if isinstance(error, NvmeStatusError) and error.lba is not None and cache.failure is None:
            log.warning("session %s: %s: %d tokens are computed anew", self.name, error, past.shape[1])
            try:
                cache.reset()
                self._fill(forward, past, cache, kwargs)
                outputs = forward(*args, **kwargs)
            except TROUBLE as another:
                error = another
            else:
                cache.token_ids = past
                cache.took(ids, kwargs.get("attention_mask"))
                return outputs
        if self._is_news(error):
            log.warning("session %s: %s: this answer goes on in memory and is not kept", self.name, error)
        cache.is_abandoned = True
        memory = DynamicCache(config=self._model().config.get_text_config(decoder=True))
        memory.activate_past_recording()
        self._fill(forward, past, memory, kwargs)
        # What generate goes on with is the cache of the outputs.
        return forward(*args, **(kwargs | {"past_key_values": memory}))

    def _fill(self, forward, ids, cache, kwargs):
        """Have the model take in ids [num_rows, num_tokens] with a cache."""
        mask, device = kwargs.get("attention_mask"), self._model().device
        options = {"logits_to_keep": 1} if "logits_to_keep" in kwargs else {}
        for begin in range(0, ids.shape[1], _FILL_TOKENS):
            end = min(ids.shape[1], begin + _FILL_TOKENS)
            if mask is not None:
                options["attention_mask"] = mask[:, :end]
                if kwargs.get("position_ids") is not None:
                    positions = (mask[:, :end].long().cumsum(-1) - 1).clamp_min(0)
                    options["position_ids"] = positions[:, begin:end]
            forward(input_ids=ids[:, begin:end].to(device), past_key_values=cache, use_cache=True, **options)


def _tells_all(ids, given, inputs, config):
    """Whether a prompt's keys and values are a matter of its ids alone: no padding, images or embeddings.

    ids: what `generate` was given; given, inputs: its arguments, and those that are for the model
    """
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return False
    if config.token_healing or given.get("custom_generate") is not None:  # they change the prompt
        return False
    others = {name for name, value in inputs.items() if value is not None} - _OF_IDS_ALONE
    mask = inputs.get("attention_mask")
    if others - {"tokenizer", "assistant_tokenizer"}:
        return False
    if mask is not None:
        return mask.shape == ids.shape and bool(mask.all())
    pad, end = config.pad_token_id, config.eos_token_id
    # Without a mask generate takes a pad token in the prompt for padding, unless it ends texts as well.
    ends = end if isinstance(end, list) else [end]
    return pad is None or pad in ends or not bool((ids == pad).any())


def _refuse_continuous_batching(_, *args, **kwargs):
    raise UnsupportedOption(
        "continuous batching (generate_batch) keeps a paged cache of its own, which kvfs does not replace: use "
        "generate, or call kvfs.engines.transformers.disable(model) first"
    )


class _Method:
    """In the place of one model's method; a deep copy of the model gets the class's own."""

    def __init__(self, model, name, function):
        self._model, self._name, self._function = weakref.ref(model), name, function
        self._before = model.__dict__.get(name)  # of accelerate, or a compiled one
        self._original = getattr(model, name)
        functools.update_wrapper(self, self._original)
        model.__dict__[name] = self

    def __call__(self, *args, **kwargs):
        return self._function(self._original, *args, **kwargs)

    def __deepcopy__(self, memo):
        copy = memo[id(self._model())]
        return types.MethodType(getattr(type(copy), self._name), copy)

    def remove(self):
        model = self._model()
        if self._before is None:
            del model.__dict__[self._name]
        else:
            model.__dict__[self._name] = self._before
