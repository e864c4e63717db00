"""The layers of a cache whose inputs X are stored: K and V are computed from X whenever they are attended to.

X of a token is stored as a token of a model of its own, cut into pieces that go to the keys and values of its
heads in turn. While the drive attends to one layer, threads read X of the next ones and compute their K and V.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from kvfs.engines.errors import UnsupportedModel
from kvfs.engines.host_arrays import host_array
from kvfs.engines.torch_attention import attend_ranges
from kvfs.engines.transformers_cache import KvfsCache
from kvfs.engines.visibility import causal_ranges
from kvfs.engines.x_cache.recompute import LayerCall, RotaryPositions
from kvfs.engines.x_cache.share import HOST
from kvfs.head_pieces import KEYS, VALUES, HeadRows
from kvfs.layout import KvGeometry

_HEAD_DIMS = range(256, 31, -8)
_TOKENS_CHECKED = 64

# Layers whose K and V are in memory before they are attended to: the link goes on while the drive has several
# of its own layers in a row to attend to, or none.
LAYERS_AHEAD = 3
READERS = 2  # flash is read for one layer while another's X is on the link


def x_geometry(hidden_size: int, num_layers: int, dtype: str) -> KvGeometry:
    """How X [hidden_size] of a token lies in the store. Raises UnsupportedModel."""
    half = hidden_size // 2
    for head_dim in _HEAD_DIMS:
        if hidden_size % 2 == 0 and half % head_dim == 0:
            num_heads = half // head_dim
            return KvGeometry(num_layers, num_heads, num_heads, head_dim, dtype)
    raise UnsupportedModel(
        f"X-cache: a hidden size of {hidden_size} does not go into heads of 32 to 256 channels"
    )


class _HostCopy:
    """X of one layer of one sequence, in host memory, with room to grow."""

    def __init__(self):
        self._rows = None
        self.num_tokens = 0

    def put(self, first, rows):
        """Tokens from `first` on; what was behind them is forgotten."""
        last = first + len(rows)
        if self._rows is None or last > len(self._rows):
            grown = rows.new_empty(max(last, 2 * first), rows.shape[1])
            if first:
                grown[:first] = self._rows[:first]
            self._rows = grown
        self._rows[first:last] = rows
        self.num_tokens = last

    def rows(self, num_tokens):
        return self._rows[:num_tokens]


class XLayers(KvfsCache):
    """X of some layers of a model. Layers are counted among these.

    rotary: of the model; placement: where X is read from, "drive" or "host" memory (it is on the drive, too)
    """

    def __init__(self, store, name, *, model, dtype, num_layers, rotary: RotaryPositions, placement):
        super().__init__(store, name, dtype=dtype, model=model)
        self._num_layers = num_layers
        self._rotary = rotary
        self._in_host = placement == HOST
        self._host_copies: dict[tuple[int, int], _HostCopy] = {}  # of (layer, row)
        self._calls: dict[int, LayerCall] = {}
        self._checked: set[int] = set()
        self._reader = ThreadPoolExecutor(READERS, thread_name_prefix="kvfs-x-reader")
        self._computer = ThreadPoolExecutor(1, thread_name_prefix="kvfs-x-computer")
        self._ahead: dict[int, tuple[int, Future]] = {}  # of a layer: how many tokens, their K and V

    def close(self):
        """End the threads; what is stored stays."""
        self._forget_ahead()
        self._reader.shutdown(wait=True)
        self._computer.shutdown(wait=True)

    def called(self, layer: int, call: LayerCall) -> None:
        """The layer's attention module runs; `update` comes next."""
        self._calls[layer] = call

    # -- storing -----------------------------------------------------------------------------------------------

    def _geometry(self, module, queries, keys):
        return x_geometry(self._calls[0].inputs.shape[-1], self._num_layers, self._dtype)

    def _rows_to_store(self, fresh):
        call = self._calls[fresh.layer]
        call.num_tokens = fresh.num_past + fresh.keys.shape[2]
        inputs = call.inputs.detach()
        if inputs.dtype != self.torch_dtype:
            raise UnsupportedModel(f"X-cache: inputs in {inputs.dtype} of a model in {self.torch_dtype}")
        if fresh.layer not in self._checked:
            self._check(call, fresh, inputs)
        if self._in_host:
            self._copy_to_host(fresh, inputs)
        pieces = inputs.unflatten(2, (-1, 2, self._model.geometry.head_dim))
        return host_array(pieces[:, :, :, 0]), host_array(pieces[:, :, :, 1])

    def _copy_to_host(self, fresh, inputs):
        for row, rows in enumerate(inputs):
            copy = self._host_copies.setdefault((fresh.layer, row), _HostCopy())
            if fresh.num_past > copy.num_tokens:  # of an earlier process
                copy.put(0, self._read(fresh.layer, row, 0, fresh.num_past))
            copy.put(fresh.num_past, rows)

    def _check(self, call, fresh, inputs):
        stop = call.num_tokens
        part = slice(-_TOKENS_CHECKED, None)
        rotary = self._rotary.of_tokens(call, max(fresh.num_past, stop - _TOKENS_CHECKED), stop)
        computed = call.keys_and_values(inputs[:, part], rotary)
        call.check(fresh.keys[:, :, part], fresh.values[:, :, part], *computed)
        self._checked.add(fresh.layer)

    # -- reading -----------------------------------------------------------------------------------------------

    def _read(self, layer, row, start, stop):
        """X of tokens of a stored row: [num_tokens, hidden_size]."""
        geometry = self._model.geometry
        pieces = [
            HeadRows(layer, kind, head, start, stop)
            for head in range(geometry.num_kv_heads)
            for kind in (KEYS, VALUES)
        ]
        rows = torch.frombuffer(self.sequences[row].read_heads(pieces), dtype=self.torch_dtype)
        return rows.view(len(pieces), stop - start, geometry.head_dim).transpose(0, 1).flatten(1)

    def _inputs(self, layer, start, stop):
        """[num_sequences, stop - start, hidden_size]"""
        rows = range(len(self.sequences))
        if self._in_host:
            return torch.stack([self._host_copies[layer, row].rows(stop)[start:] for row in rows])
        return torch.stack([self._read(layer, row, start, stop) for row in rows])

    @torch.no_grad()
    def _keys_and_values(self, call, inputs, start, stop):
        """Of tokens [start, stop), X of which are `inputs`. call: the layer's newest, in this step or the one
        before."""
        rotary = self._rotary.of_tokens(call, start, stop)
        return call.keys_and_values(inputs.to(call.inputs.device), rotary)

    def attend_stored(self, query, fresh, scaling, softcap, ranges):
        """See KvfsCache.attend_stored; of a step's new tokens K and V are those that the model computed."""
        past, call = fresh.num_past, self._calls[fresh.layer]
        parts = [(fresh.keys, fresh.values)]
        known, ahead = self._ahead.pop(fresh.layer, (0, None))
        if known > past:
            known, ahead = 0, None
        if known < past:
            inputs = self._inputs(fresh.layer, known, past)
            parts.insert(0, self._keys_and_values(call, inputs, known, past))
        if ahead is not None:
            parts.insert(0, ahead.result())
        self._begin_next(fresh)
        keys, values = (torch.cat(column, dim=2) for column in zip(*parts, strict=True))
        if ranges is None:
            ranges = causal_ranges(query.shape[0], query.shape[2], call.num_tokens - query.shape[2])
        return attend_ranges(query, keys, values, ranges, scaling, softcap)

    # -- ahead of time -----------------------------------------------------------------------------------------

    def _begin_next(self, fresh):
        """Have K and V of what the next layers have stored computed; behind the last, of the first for the next
        step. Only in decoding: a long prompt's layers take long themselves."""
        if fresh.keys.shape[2] > 1:
            return
        for distance in range(1, min(LAYERS_AHEAD, self._num_layers) + 1):
            layer = (fresh.layer + distance) % self._num_layers
            stored = fresh.num_past + (layer <= fresh.layer)
            call = self._calls.get(layer)
            if stored and call is not None and layer not in self._ahead:
                read = self._reader.submit(self._inputs, layer, 0, stored)
                self._ahead[layer] = stored, self._computer.submit(self._compute, call, read, stored)

    def _compute(self, call, read, stored):
        return self._keys_and_values(call, read.result(), 0, stored)

    def _forget_ahead(self):
        """Before the sequence changes: nobody may be reading it."""
        ahead, self._ahead = self._ahead, {}
        for _, found in ahead.values():
            found.exception()

    # -- changes -----------------------------------------------------------------------------------------------

    def _truncate_rows(self, num_tokens):
        self._forget_ahead()
        for copy in self._host_copies.values():
            copy.num_tokens = min(copy.num_tokens, num_tokens)
        return super()._truncate_rows(num_tokens)

    def _rearrange(self, sources):
        self._forget_ahead()
        super()._rearrange(sources)
        copies, self._host_copies = self._host_copies, {}
        if not self._in_host:
            return
        for (layer, source), copy in copies.items():
            for row in (row for row, of in enumerate(sources) if of == source):
                twin = self._host_copies[layer, row] = _HostCopy()
                twin.put(0, copy.rows(copy.num_tokens).clone())


class KvLayers(KvfsCache):
    """K and V of the other layers of a model. Layers are counted among these."""

    def __init__(self, store, name, *, model, dtype, num_layers):
        super().__init__(store, name, dtype=dtype, model=model)
        self._num_layers = num_layers

    def _geometry(self, module, queries, keys):
        return replace(super()._geometry(module, queries, keys), num_layers=self._num_layers)
