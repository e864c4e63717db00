"""K and V of a layer's inputs X, computed by the layer itself.

The attention module is called again with X and with positions' rotary embeddings, and with a cache that takes
the keys and values and stops it there. So norms, biases, fused projections, partial rotation and adapters are
what they are in the model, whatever its family.
"""

from __future__ import annotations

import inspect

import torch

from kvfs.engines.errors import UnsupportedMask, UnsupportedModel

# Relative to the largest element. A long product of a few rows rounds otherwise than one of many.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Their frequencies change with the length of the sequence, and with them K of tokens long past.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


# Of rotary modules: a step has one or two, before its first layer.
_CALLS_KEPT = 8


class _Taken(Exception):
    """Ends a module's forward pass at its cache: nothing of what would follow is wanted."""

    def __init__(self, keys, values):
        super().__init__()
        self.keys, self.values = keys, values


class _Taker:
    def update(self, keys, values, *args, **kwargs):
        raise _Taken(keys, values)


class LayerCall:
    """How a layer's attention module was called with a cache in this step.

    inputs: [num_sequences, num_new_tokens, hidden_size], what its projections take
    num_tokens: of the sequence then, the new ones included; whoever knows it sets it
    rotary_call: (module, bound arguments) that its rotary embeddings came from, see RotaryPositions
    """

    num_tokens = 0
    rotary_call = None

    def __init__(self, module, args, kwargs, cache):
        self.module = module
        self._arguments = inspect.signature(module.forward).bind(*args, **kwargs)
        values = self._arguments.arguments
        self._cache_name = next((name for name, value in values.items() if value is cache), None)
        if self._cache_name is None or "hidden_states" not in values:
            raise UnsupportedModel(
                f"{type(module).__name__}: X-cache needs attention that takes hidden_states and a cache"
            )
        self.inputs = values["hidden_states"]

    @property
    def rotary(self):
        """(cos, sin) of the new tokens, None for a model without."""
        return self._arguments.arguments.get("position_embeddings")

    def keys_and_values(self, inputs, rotary):
        """[num_sequences, num_kv_heads, num_tokens, head_dim] each, of inputs as `inputs`."""
        arguments = inspect.BoundArguments(self._arguments.signature, self._arguments.arguments.copy())
        values = arguments.arguments
        values["hidden_states"], values[self._cache_name] = inputs, _Taker()
        if rotary is not None:
            values["position_embeddings"] = rotary
        for name in ("attention_mask", "position_ids"):
            if name in values:
                values[name] = None
        try:
            self.module.forward(*arguments.args, **arguments.kwargs)
        except _Taken as taken:
            return taken.keys, taken.values
        raise UnsupportedModel(f"{type(self.module).__name__}: X-cache found no place where it fills its cache")

    def check(self, keys, values, computed_keys, computed_values):
        """Raises UnsupportedModel unless K and V computed here are those that the model computed."""
        for given, computed in ((keys, computed_keys), (values, computed_values)):
            tolerance = _TOLERANCE.get(given.dtype)
            if tolerance is None:
                raise UnsupportedModel(
                    f"X-cache computes float16, bfloat16 and float32 anew, not {given.dtype}"
                )
            if given.shape != computed.shape or not bool(
                ((given - computed).abs().max() <= tolerance * given.abs().max().clamp_min(1e-30)).item()
            ):
                raise UnsupportedModel(
                    f"{type(self.module).__name__}: its keys and values cannot be computed anew from its "
                    "inputs (other rotary embeddings than known, or a module that changes from call to call): "
                    "use x_share=0"
                )


class RotaryPositions:
    """Rotary embeddings of any tokens of a sequence, as a model's own module computes them.

    Positions of stored tokens are known by those of the newest: they count up, from the first token that is not
    padding on. Raises UnsupportedModel, UnsupportedMask.
    """

    def __init__(self, model):
        self._calls = []  # the newest: (module, arguments, output)
        modules = [module for module in model.modules() if "RotaryEmbedding" in type(module).__name__]
        for module in modules:
            rope_type = str(getattr(module, "rope_type", ""))
            if any(kind in rope_type for kind in _LENGTH_DEPENDENT):
                raise UnsupportedModel(
                    f"X-cache: rotary embeddings of kind {rope_type!r} change with the length of the sequence, "
                    "so that keys cannot be computed anew: use x_share=0"
                )
        self.handles = [module.register_forward_hook(self._note, with_kwargs=True) for module in modules]

    def _note(self, module, args, kwargs, output):
        self._calls.append((module, args, kwargs, output))
        del self._calls[:-_CALLS_KEPT]

    def note(self, call):
        """Remember with a layer's call how the rotary embeddings came about that it was given just now."""
        rotary = call.rotary
        if rotary is None:
            return
        for module, args, kwargs, output in reversed(self._calls):
            if output is rotary or (isinstance(output, tuple) and output[0] is rotary[0]):
                call.rotary_call = module, inspect.signature(module.forward).bind(*args, **kwargs)
                return
        raise UnsupportedModel(
            "X-cache: rotary embeddings that come from no module of their own: use x_share=0"
        )

    def of_tokens(self, call, first, last):
        """(cos, sin) of tokens [first, last) of the sequence that a layer was called with; None without."""
        if call.rotary_call is None:
            return None
        module, bound = call.rotary_call
        arguments = inspect.BoundArguments(bound.signature, bound.arguments.copy())
        positions = bound.arguments["position_ids"]
        arguments.arguments["position_ids"] = self._positions(positions, call.num_tokens, first, last)
        return module.forward(*arguments.args, **arguments.kwargs)

    @staticmethod
    def _positions(newest, num_tokens, first, last):
        """int64 [1 or num_sequences, last - first]. newest: of the last tokens of num_tokens."""
        behind = num_tokens - 1 - newest[:, -1:]  # how much each row's positions lag behind its tokens
        tokens = torch.arange(first, last, device=newest.device)
        own = torch.arange(num_tokens - newest.shape[1], num_tokens, device=newest.device)
        expected = own - behind
        if bool(((expected != newest) & (expected >= 0)).any()):
            raise UnsupportedMask("X-cache: positions of new tokens do not count up by one: use x_share=0")
        return (tokens - behind).clamp_min(0)
