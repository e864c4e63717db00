"""A Transformers `Cache` whose keys and values live in a kvfs store.

How a step goes. A model calls `update` once per layer with the K/V of the new tokens; it gets stand-ins back
(`fresh_tokens`) and hands them to its attention function, which is ours (`transformers_attention`): that one
appends the fresh K/V to the store and computes. So everything the store must know (number of layers, query
heads) is learned in the attention function of the first layer, and nothing has to be configured.

A batch of n rows is n sequences. A step that fails between two layers leaves the first layers one step ahead;
the cache only ever reports tokens that are complete in all layers, and drops the rest when the next step
begins.
"""

from dataclasses import asdict

import torch
from transformers.cache_utils import Cache

from kvfs.engines import sequence_rows
from kvfs.engines.compiled_attention import hand_over, new_state
from kvfs.engines.errors import CacheMismatch, UnsupportedModel
from kvfs.engines.fresh_tokens import FreshTokens, stand_ins
from kvfs.engines.host_arrays import host_array
from kvfs.engines.model_identity import (
    TORCH_DTYPES,
    geometry_of,
    model_name,
    storage_dtype,
    whole_model_name,
)
from kvfs.engines.visibility import RangesMemo
from kvfs.sparse import sparse_of
from spdk_glue.vendor_command import DTYPE_OF_NAME

# Queries of a step that may read less than everything: decoding and candidates. A prompt's are many, each looks
# for tokens of its own, and what they compute is stored.
SPARSE_QUERIES = 16


def _have_sealed(store, model, derive):
    """The model's sequences get these derived data, beside others that are asked for already."""
    wanted = store.sealing(model)
    if derive.name.lower() not in wanted:
        store.set_sealing(model, [*wanted, derive.name.lower()])


class KvfsCache(Cache):
    """`model.generate(ids, past_key_values=KvfsCache(store, "chat-42"))`.

    store: an open kvfs store; it must stay open as long as the cache is used
    name:  of the sequence; a stored one is continued (`generate` with all ids then prefills only the new ones).
           A batch of several rows uses `name.0`, `name.1`, ...
    dtype: "float16", "bfloat16", "float32", "float8_e4m3", "int8" or "int4", in which K/V are stored; default:
           that of a stored sequence, else the model's K/V dtype (float32 for what the store does not know)
    model: the model, of whose weights a fingerprint is taken so that a sequence is never continued by another
           one; torch.compile wants it, otherwise a look at its first layer will do. Or a name for it in the
           store, which takes over that responsibility.
    compression, target_error, sparf: how a step of few queries reads less than all stored tokens: one of them,
           as for kvfs.Store.attend. Prompts are read and computed whole. The drive seals what this takes for
           the model's sequences, in the background.
    exact_if_cached: of a compression or target error, as for kvfs.Store.attend: False where the same text has
           to come out whatever the drive's cache holds

    New tokens survive a kill of the process after `flush()` (or after the store is closed).
    """

    def __init__(
        self,
        store,
        name,
        *,
        dtype=None,
        model=None,
        compression=None,
        target_error=None,
        sparf=None,
        exact_if_cached=True,
    ):
        super().__init__(layers=[])
        if dtype is not None and dtype not in DTYPE_OF_NAME:
            raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPE_OF_NAME)}")
        self._sparse = sparse_of(None, compression, target_error, sparf, exact_if_cached)
        self._sparse_options = {
            "compression": compression,
            "target_error": target_error,
            "sparf": sparf,
            "exact_if_cached": exact_if_cached,
        }
        self._store = store
        self._name = name
        self._noted: dict[str, bytes] = {}  # attributes of the sequences that it makes
        self._dtype = dtype
        self.config = (
            None if model is None or isinstance(model, str) else model.config.get_text_config(decoder=True)
        )
        self._given_model = model
        self._model = None  # the store's model, known from the first attention on
        self._rows = sequence_rows.find_rows(store, name)
        # Tokens of each layer as this cache knows them; [] until the model is bound.
        self._layer_tokens = []
        self._num_tokens = self._complete_tokens()  # in every layer
        self._state = new_state(self)
        self._masks = RangesMemo()
        # A layer's append is not known to be whole: rows may differ from each other and from _layer_tokens.
        self._torn = False

    def __repr__(self):
        return f"KvfsCache({self._name!r}, {len(self._rows)} sequences of {self.get_seq_length()} tokens)"

    def __len__(self):
        return len(self._layer_tokens)

    @property
    def name(self):
        """Of its sequence; of several, what their names begin with."""
        return self._name

    @property
    def sequences(self):
        """The store's sequences, one per row of the batch; () before the first forward of a new cache."""
        return tuple(self._rows)

    @property
    def store(self):
        """The store that keeps the sequences."""
        return self._store

    @property
    def torch_dtype(self):
        """torch dtype in which the store takes K/V in; known from the first attention on."""
        return TORCH_DTYPES[self._model.geometry.row_dtype]

    def sparse_options(self, num_queries):
        """Arguments of Store.attend for a step of so many queries."""
        return self._sparse_options if num_queries <= SPARSE_QUERIES else {}

    def mask_ranges(self, mask, num_sequences, num_queries, num_past):
        """Visible positions of each query of this step: int64 [num_sequences, num_queries, 2]."""
        return self._masks.ranges(mask, num_sequences, num_queries, num_past)

    def forget_masks(self):
        """Masks are known by their identity within a step; what comes out of a graph has none."""
        self._masks = RangesMemo()

    def flush(self):
        """Make all tokens durable: after this they survive a kill or a power cut."""
        for row in self._rows:
            row.flush()

    # -- one step, called by the model and by the attention function -------------------------------------------

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Take one layer's new K/V [num_sequences, num_kv_heads, num_new_tokens, head_dim]; returns stand-ins.

        Raises UnsupportedModel for latents instead of K/V, CacheMismatch for another batch size.
        """
        if torch.compiler.is_compiling():
            return hand_over(self._state, layer_idx, key_states, value_states)
        return stand_ins(self.fresh_tokens(layer_idx, key_states, value_states))

    def fresh_tokens(self, layer_idx, key_states, value_states):
        """One layer's new K/V, checked, at the end of what is complete. See update."""
        if key_states.ndim != 4 or key_states.shape != value_states.shape:
            raise UnsupportedModel(
                f"keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} differ in shape: "
                "latent attention (DeepSeek MLA) and the like are not supported by kvfs"
            )
        if self._rows and len(self._rows) != key_states.shape[0]:
            raise CacheMismatch(
                f"{self._name!r} holds {len(self._rows)} sequences, the batch has {key_states.shape[0]} rows "
                "(for several returned sequences or beams of one stored prompt: batch_repeat_interleave first)"
            )
        if layer_idx == 0:
            self._drop_unfinished_step()
        past = self._layer_tokens[layer_idx] if self._layer_tokens else self.get_seq_length()
        return FreshTokens(self, layer_idx, past, key_states, value_states)

    def append(self, fresh, module, queries):
        """Write a layer's fresh K/V to the store, once; binds the cache to the model on the first call."""
        if fresh.stored:
            return
        if not self._layer_tokens:
            self._bind(module, queries, fresh.keys)
        if fresh.layer >= self._model.num_layers:
            raise UnsupportedModel(f"layer {fresh.layer} of a model with {self._model.num_layers} layers")
        keys, values = self._rows_to_store(fresh)
        self._torn = True
        for row, row_keys, row_values in zip(self._rows, keys, values, strict=True):
            row.append(fresh.layer, row_keys, row_values)
        fresh.stored = True

    def _rows_to_store(self, fresh):
        """[num_sequences, num_new_tokens, num_kv_heads, head_dim] twice, as Sequence.append takes them."""
        return host_array(fresh.keys.transpose(1, 2)), host_array(fresh.values.transpose(1, 2))

    def attend_stored(self, query, fresh, scaling, softcap, ranges):
        """Attention over the stored tokens of a layer, its new ones included.

        query: [num_sequences, num_query_heads, num_queries, head_dim]; ranges: visible positions, int64
        [num_sequences, num_queries, 2], or None for all that come before

        Returns out, lse as torch tensors on the query's device, both float32, as attend_ranges does.
        """
        out, lse = self._store.attend(
            fresh.layer,
            host_array(query.transpose(1, 2)),
            self.sequences,
            token_ranges=ranges,
            scale=scaling,
            softcap=softcap,
            **self.sparse_options(query.shape[2]),
        )
        return torch.from_numpy(out).to(query.device), torch.from_numpy(lse).to(query.device)

    def attended(self, fresh):
        """The attention that came after a layer's append has an answer.

        A store of another process takes an append without one, and fails the next call if it could not.
        """
        self._layer_tokens[fresh.layer] = fresh.num_past + fresh.keys.shape[2]
        self._num_tokens = self._layer_tokens[-1]
        self._torn = False

    def _bind(self, module, queries, keys):
        """Create or check the store's model and sequences: from here on geometry and lengths are known."""
        stored = sequence_rows.check_same_model(self._rows) if self._rows else None
        dtype = self._dtype or (stored.dtype if stored else storage_dtype(keys.dtype))
        self._dtype = dtype
        geometry = self._geometry(module, queries, keys)
        name = self._given_model or model_name(module, geometry)
        if not isinstance(name, str):
            name = whole_model_name(self._given_model, dtype)
        if stored and stored.name != name:
            raise CacheMismatch(
                f"sequence {self._rows[0].name!r} was written by model {stored.name!r}, this one is {name!r}"
            )
        shape = asdict(geometry)
        del shape["group_tokens"]  # the store's business
        self._model = self._store.add_model(name, **shape)
        if self._sparse is not None:
            _have_sealed(self._store, self._model, self._sparse.derive)
        if not self._rows:
            self._rows = sequence_rows.create_rows(
                self._store, self._model, self._name, keys.shape[0], self._noted
            )
        self._set_tokens(self._truncate_rows(self._complete_tokens()), geometry.num_layers)

    def _geometry(self, module, queries, keys):
        return geometry_of(module, queries, keys, self._dtype)

    def _set_tokens(self, num_tokens, num_layers):
        self._num_tokens, self._layer_tokens = num_tokens, [num_tokens] * num_layers

    def _drop_unfinished_step(self):
        if self._layer_tokens and (self._torn or self._layer_tokens[0] != self._layer_tokens[-1]):
            complete = min(self._complete_tokens(), self._layer_tokens[-1])
            self._set_tokens(self._truncate_rows(complete), len(self._layer_tokens))
            self._torn = False

    def _complete_tokens(self):
        return min((row.num_tokens for row in self._rows), default=0)

    def _truncate_rows(self, num_tokens):
        for row in self._rows:
            if any(row.layer_tokens(layer) != num_tokens for layer in range(row.model.num_layers)):
                row.truncate(num_tokens)
        return num_tokens

    # -- what generate() asks ----------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx=0):
        """Tokens that are complete in every layer: the last layer is the last one written in a step."""
        return self._num_tokens

    def get_mask_sizes(self, query_length, layer_idx=0):
        """(kv_length, kv_offset): masks always cover the whole sequence, windows are ranges of it."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx=None):
        """-1: the drive is the limit."""
        return -1

    @property
    def batch_size(self):
        """Rows of the batch, -1 before the first forward."""
        return len(self._rows) or -1

    is_compileable = False
    is_croppable = True

    @property
    def is_initialized(self):
        """Whether a model has used this cache."""
        return bool(self._layer_tokens)

    # -- changes by generate(): candidates taken back, beams, selections ---------------------------------------

    def crop(self, tokens_to_remove):
        """Drop the last -tokens_to_remove tokens (0 or negative, as Transformers passes it)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove")
        if tokens_to_remove < 0:
            self._truncate_to(max(0, self.get_seq_length() + tokens_to_remove))

    def reset(self):
        """Empty the sequences; they and their names stay."""
        self._truncate_to(0)

    def _truncate_to(self, num_tokens):
        self._set_tokens(self._truncate_rows(num_tokens), len(self._layer_tokens))

    def reorder_cache(self, beam_idx):
        """Row r continues what row beam_idx[r] was (beam search): copy-on-write forks."""
        self._rearrange(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats):
        """Each row `repeats` times, next to each other."""
        self._rearrange([row for row in range(len(self._rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices):
        """Keep the rows `indices` (positions, or a bool per row)."""
        positions = range(len(self._rows))
        kept = indices.tolist()
        self._rearrange([row for row in positions if kept[row]] if indices.dtype == torch.bool else kept)

    def _rearrange(self, sources):
        if self._rows and sources != list(range(len(self._rows))):
            self._drop_unfinished_step()
            self._rows = sequence_rows.rearranged_rows(
                self._store, self._name, self._rows, sources, self._noted
            )

    def early_initialization(self, batch_size, num_heads, head_dim, dtype, device):
        """Nothing to allocate ahead; unsupported shapes are refused at the first attention."""

    def update_conv_state(self, *args, **kwargs):
        raise UnsupportedModel(
            "layers with a recurrent or convolution state (Mamba and hybrids): not supported by kvfs"
        )

    update_recurrent_state = get_conv_state = get_recurrent_state = has_previous_state = update_conv_state

    def update_indexer(self, *args, **kwargs):
        raise UnsupportedModel("sparse attention with an indexer (DeepSeek V3.2): not supported by kvfs")

    def offload(self, *args, **kwargs):
        """Nothing to do: K/V are on the drive already."""

    prefetch = offload
