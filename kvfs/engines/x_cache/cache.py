"""A Transformers `Cache` of which some layers store their inputs X and the others K and V.

The two kinds are two caches with a store's sequence each, `name` and `name-x`; this one counts a model's layers
among one or the other, and a token as stored when both have it.
"""

import weakref

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvfs.engines.errors import CacheMismatch, UnsupportedModel
from kvfs.engines.model_identity import check_config, storage_dtype, whole_model_name
from kvfs.engines.sequence_rows import find_rows
from kvfs.engines.x_cache.recompute import LayerCall, RotaryPositions
from kvfs.engines.x_cache.share import DRIVE, check_placement, layers_of_share
from kvfs.engines.x_cache.x_layers import KvLayers, XLayers


class XCache(Cache):
    """`model.generate(ids, past_key_values=XCache(store, "chat-42", model=model, x_share=0.5))`.

    store, name: as of KvfsCache; a stored sequence is continued with the share it was begun with
    model:       in eval mode, on any device; its outputs stay what they are
    x_share:     alpha, 0 to 1: the share of layers that store X. kvfs.engines.x_cache.share.best_share says
                 which is best for measured bandwidths; it pays for multi-head attention (no grouped queries)
    x_placement: "drive": X is read over the link; "host": from host memory, where a copy stays

    Raises UnsupportedModel for what X-cache cannot compute anew: another dtype than float16, bfloat16 and
    float32, rotary embeddings that change with the length, torch.compile; InvalidArgument; CacheMismatch for
    another share or model than stored.
    """

    def __init__(self, store, name, *, model, x_share, x_placement=DRIVE):
        super().__init__(layers=[])
        check_placement(x_placement)
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModel(f"{type(model).__name__} is no Transformers model")
        self.config = config = model.config.get_text_config(decoder=True)
        check_config(config)
        dtype = storage_dtype(model.dtype)
        if str(model.dtype) != f"torch.{dtype}":
            raise UnsupportedModel(f"X-cache computes float16, bfloat16 and float32 anew, not {model.dtype}")
        num_layers = config.num_hidden_layers
        x_layers = layers_of_share(x_share, num_layers)
        kv_layers = [layer for layer in range(num_layers) if layer not in x_layers]
        self._name = name
        self._model_name = f"{whole_model_name(model, dtype)}-x{len(x_layers)}"
        self._inputs_name = f"{self._model_name}-inputs"
        self.x_layers = tuple(x_layers)
        self._place = {layer: place for layers in (x_layers, kv_layers) for place, layer in enumerate(layers)}
        self._rotary = RotaryPositions(model)
        self._x = self._kv = None
        if x_layers:
            options = {"num_layers": len(x_layers), "rotary": self._rotary, "placement": x_placement}
            self._x = XLayers(store, f"{name}-x", model=self._inputs_name, dtype=dtype, **options)
        if kv_layers:
            self._kv = KvLayers(store, name, model=self._model_name, dtype=dtype, num_layers=len(kv_layers))
        self._check_same_share(store)
        handles = [*self._rotary.handles, *_watch(model, set(x_layers), self)]
        self._finalizer = weakref.finalize(self, _remove, handles)
        self._make_equal()

    def _check_same_share(self, store):
        """What another share or cache has stored is not for this one to cut to equal length."""
        expected = [(self._name, self._model_name if self._kv is not None else None)]
        if self._x is not None:
            expected.append((f"{self._name}-x", self._inputs_name))
        for name, model_name in expected:
            stored = find_rows(store, name)
            if stored and stored[0].model.name != model_name:
                raise CacheMismatch(
                    f"sequence {stored[0].name!r} was stored with another x_share, model or cache: continue it "
                    "with that, or delete it"
                )

    def __repr__(self):
        return f"XCache({self._name!r}, X of layers {list(self.x_layers)}, {self.get_seq_length()} tokens)"

    def __len__(self):
        return len(self._place) if self.is_initialized else 0

    @property
    def _parts(self):
        return [part for part in (self._kv, self._x) if part is not None]

    @property
    def sequences(self):
        """The store's sequences, of K and V and then of X."""
        return tuple(sequence for part in self._parts for sequence in part.sequences)

    def close(self):
        """Take the hooks off the model and end the thread that computes ahead; what is stored stays."""
        self._finalizer()
        if self._x is not None:
            self._x.close()

    def flush(self):
        """Make all tokens durable."""
        for part in self._parts:
            part.flush()

    # -- one step ----------------------------------------------------------------------------------------------

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """As KvfsCache.update."""
        if torch.compiler.is_compiling():
            raise UnsupportedModel("X-cache does not go into a graph of torch.compile: use KvfsCache")
        if layer_idx == 0:
            self._make_equal()
        part = self._x if layer_idx in self.x_layers else self._kv
        return part.update(key_states, value_states, self._place[layer_idx])

    def called(self, layer, module, args, kwargs):
        """The attention module of a layer with X runs."""
        call = LayerCall(module, args, kwargs, self)
        self._rotary.note(call)
        self._x.called(self._place[layer], call)

    def _make_equal(self):
        """A step that failed, or a process that was killed, may have left one part ahead."""
        if len({part.get_seq_length() for part in self._parts}) > 1:
            length = self.get_seq_length()
            for part in self._parts:
                part.crop(length - part.get_seq_length())

    # -- what generate() asks ----------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx=0):
        """Tokens that both parts have."""
        return min(part.get_seq_length() for part in self._parts)

    def get_mask_sizes(self, query_length, layer_idx=0):
        """As KvfsCache.get_mask_sizes."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx=None):
        """-1: the drive is the limit."""
        return -1

    @property
    def batch_size(self):
        """Rows of the batch, -1 before the first forward."""
        return self._parts[0].batch_size

    is_compileable = False
    is_croppable = True

    @property
    def is_initialized(self):
        """Whether a model has used this cache."""
        return all(part.is_initialized for part in self._parts)

    def early_initialization(self, batch_size, num_heads, head_dim, dtype, device):
        """Nothing to allocate ahead."""

    def crop(self, tokens_to_remove):
        """As KvfsCache.crop."""
        for part in self._parts:
            part.crop(tokens_to_remove)

    def reset(self):
        """Empty the sequences."""
        for part in self._parts:
            part.reset()

    def reorder_cache(self, beam_idx):
        """Row r continues what row beam_idx[r] was."""
        for part in self._parts:
            part.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats):
        """Each row `repeats` times, next to each other."""
        for part in self._parts:
            part.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices):
        """Keep the rows `indices`."""
        for part in self._parts:
            part.batch_select_indices(indices)

    def offload(self, *args, **kwargs):
        """Nothing to do."""

    prefetch = offload


def _watch(model, layers, cache):
    """Hooks that tell the cache of calls of these layers' attention modules with it."""
    reference = weakref.ref(cache)

    def note(module, args, kwargs):
        own = reference()
        if own is not None and any(value is own for value in (*args, *kwargs.values())):
            own.called(module.layer_idx, module, args, kwargs)

    modules = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) in layers and type(module).__name__.endswith("Attention")
    ]
    if {module.layer_idx for module in modules} != layers or len(modules) != len(layers):
        raise UnsupportedModel(
            f"{type(model).__name__}: X-cache finds no attention module for each of its layers"
        )
    return [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]


def _remove(handles):
    for handle in handles:
        handle.remove()
