"""The model's own work in a decode step: by Transformers where it is installed, else by its matrices."""

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import kvfs
from kvfs.errors import InvalidArgument
from kvfs_bench.planner.model_shape import CONFIG_FILE, WEIGHT_BYTES, ModelShape
from kvfs_bench.planner.probe_drive import add_model, random_rows, temporary_drives
from kvfs_bench.planner.rates import ModelRates

SEQUENCE = "probe"
ROUNDS = 6  # at least
STEPS_SECONDS = 1.0  # at least
STEPS_PER_ROUND = 4
WARM_UP_STEPS = 8
CONTEXT_BYTES = 64 << 20  # of K and V at most: in the drive's cache, whatever is planned
PROBE_WEIGHTS_BYTES = 2 << 30  # a larger model is measured in fewer layers
FEW_LAYERS = (1, 3)
MATRIX_BYTES = 64 << 20  # more than the CPUs' caches, as all of a model's matrices are
PROJECTED_ROWS = 512


def measure_model(shape: ModelShape, context: int, batch: int, place: Path) -> ModelRates:
    """Raises InvalidArgument for a config that Transformers refuses."""
    flops = projection_flops(shape)
    if has_transformers() and shape.folder is not None:
        return ModelRates(*_by_transformers(shape, context, batch, place), flops)
    if shape.num_weights is None:
        return ModelRates(None, "the model's sizes are not known: attention alone", flops)
    seconds, library = _matrix_seconds(shape, batch)
    return ModelRates(seconds, f"its matrices alone, multiplied by {library} in {shape.weights_dtype}", flops)


def has_transformers() -> bool:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


def load(shape: ModelShape, num_layers: int | None = None):
    """The model of a folder; with random weights where it has none, or in fewer layers than it has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_grad_enabled(False)
    try:
        if num_layers is None and any(shape.folder.glob("*.safetensors")):
            return AutoModelForCausalLM.from_pretrained(shape.folder).eval()
        config = AutoConfig.from_pretrained(shape.folder)
        config.get_text_config(decoder=True).num_hidden_layers = num_layers or shape.geometry.num_layers
        dtype = getattr(torch, shape.weights_dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except (ValueError, OSError, KeyError) as error:
        file = shape.folder / CONFIG_FILE
        raise InvalidArgument(f"model: Transformers takes no {file}: {error}") from error


class Decoder:
    """A Transformers model that decodes on sequences of a store that have num_tokens tokens already."""

    def __init__(self, model, store, name: str, batch: int, num_tokens: int, compression: int | None = None):
        import torch

        from kvfs.engines.transformers import KvfsCache

        self._torch, self._model = torch, model
        self._cache = KvfsCache(store, name, model=name, compression=compression)
        self._ids = torch.ones((batch, 1), dtype=torch.long)
        self._num_tokens = num_tokens

    def step(self) -> float:
        position = self._torch.full(self._ids.shape, self._num_tokens)
        begun = time.perf_counter()
        self._model(self._ids, past_key_values=self._cache, position_ids=position, use_cache=True)
        self._num_tokens += 1
        return time.perf_counter() - begun


def row_names(name: str, batch: int) -> list[str]:
    """Of a KvfsCache's sequences."""
    return [name] if batch == 1 else [f"{name}.{row}" for row in range(batch)]


def _by_transformers(shape: ModelShape, context: int, batch: int, place: Path) -> tuple[float, str]:
    """(seconds of a step less those of its attention, how): sequences on the drive, as later, in its cache."""
    if is_measured_whole(shape):
        with ModelProbe(shape, context, batch, place) as probe:
            return probe.measured(), "a step of Transformers less its attention"
    found = []
    for count in FEW_LAYERS:
        with ModelProbe(shape, context, batch, place, count) as probe:
            found.append(probe.measured())
    of_layer = (found[1] - found[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
    how = f"steps of Transformers with {FEW_LAYERS[0]} and {FEW_LAYERS[1]} layers less their attention"
    return found[0] + (shape.geometry.num_layers - FEW_LAYERS[0]) * of_layer, how


def is_measured_whole(shape: ModelShape) -> bool:
    """By a ModelProbe of all its layers."""
    return has_transformers() and shape.folder is not None and shape.weights_bytes <= PROBE_WEIGHTS_BYTES


class ModelProbe:
    """Steps of a model with Transformers, and in turns the same attention without it. Use as a context manager.

    num_layers: None: all
    """

    def __init__(self, shape: ModelShape, context: int, batch: int, place: Path, num_layers: int | None = None):
        geometry = shape.geometry
        count = num_layers or geometry.num_layers
        most = CONTEXT_BYTES // (batch * geometry.token_bytes * count // geometry.num_layers)
        num_tokens = max(geometry.group_tokens, min(context, most))
        size = 4 * batch * num_tokens * geometry.token_bytes + (96 << 20)
        self._whole, self._bare = [], []
        with ExitStack() as stack:
            path = stack.enter_context(temporary_drives([place], 1, size))
            self._store = stack.enter_context(kvfs.open(path))
            stored = add_model(self._store, SEQUENCE, geometry, count)
            self._sequences = [self._store.create_sequence(stored, n) for n in row_names(SEQUENCE, batch)]
            rows = random_rows(geometry, num_tokens)
            for layer, sequence in itertools.product(range(count), self._sequences):
                sequence.append(layer, *rows)
            self._store.flush()
            self._decoder = Decoder(load(shape, num_layers), self._store, SEQUENCE, batch, num_tokens)
            self._token, self._num_layers = random_rows(geometry, 1), count
            self._queries = np.ones((batch, 1, geometry.num_query_heads, geometry.head_dim), np.float32)
            for _ in range(WARM_UP_STEPS):
                self._decoder.step()
            self._opened = stack.pop_all()

    def __enter__(self) -> "ModelProbe":
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def round(self) -> None:
        self._whole += [self._decoder.step() for _ in range(STEPS_PER_ROUND)]
        self._bare += [self._attention() for _ in range(STEPS_PER_ROUND + 1)][1:]

    def seconds(self) -> float:
        """Of a step less its attention, by all rounds."""
        return max(0.0, statistics.median(self._whole) - statistics.median(self._bare))

    def measured(self) -> float:
        while len(self._whole) < ROUNDS * STEPS_PER_ROUND or sum(self._whole) < STEPS_SECONDS:
            self.round()
        return self.seconds()

    def _attention(self) -> float:
        begun = time.perf_counter()
        for layer in range(self._num_layers):
            for sequence in self._sequences:
                sequence.append(layer, *self._token)
            self._store.attend(layer, self._queries, self._sequences)
        return time.perf_counter() - begun


def _multiply(dtype: str) -> tuple[Callable, str]:
    """(function of (rows, inner, columns) that gives a call of one product, the library's name)."""
    try:
        import torch
    except ImportError:

        def with_numpy(rows: int, inner: int, columns: int):
            left, right = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
            return lambda: left @ right

        return with_numpy, "NumPy"

    def with_torch(rows: int, inner: int, columns: int):
        left, right = torch.ones(rows, inner).to(getattr(torch, dtype)), torch.ones(columns, inner)
        right = right.to(left.dtype).T  # as a Linear keeps it
        return lambda: left @ right

    return with_torch, "torch"


def _seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _matrix_seconds(shape: ModelShape, batch: int) -> tuple[float, str]:
    """Of multiplying `batch` rows by all of the model's matrices, and with what."""
    multiply, library = _multiply(shape.weights_dtype)
    hidden = shape.hidden_size
    columns = max(1, MATRIX_BYTES // (hidden * WEIGHT_BYTES[shape.weights_dtype]))
    return _seconds(multiply(batch, hidden, columns)) * shape.num_weights / (hidden * columns), library


def projection_flops(shape: ModelShape) -> float | None:
    """FLOP/s of recomputing K and V of many tokens from X; None where the model's width is unknown."""
    if shape.hidden_size is None:
        return None
    multiply, _ = _multiply(shape.weights_dtype)
    columns = 2 * shape.geometry.num_kv_heads * shape.geometry.head_dim
    seconds = _seconds(multiply(PROJECTED_ROWS, shape.hidden_size, columns))
    return 2 * PROJECTED_ROWS * shape.hidden_size * columns / seconds
