"""Which model is planned for: a Hugging Face folder or config, a model of a store, or a geometry in words."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kvfs.engines.x_cache.share import rho_of
from kvfs.errors import InvalidArgument
from kvfs.layout import KvGeometry, default_group_tokens

PAGE_SIZE = 4096  # of the drives that are planned for
CONFIG_FILE = "config.json"
# keys of a geometry in words -> what a config calls it
WORDS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "dtype": "dtype",
}
_GEOMETRY_FIELD = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_kv_heads",
}
_REQUIRED = ("num_hidden_layers", "num_attention_heads")
WEIGHT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelShape:
    """hidden_size, intermediate_size, vocab_size: None where unknown; weights_dtype: of its matrices;
    folder: of a Hugging Face model or config, which Transformers can make a model of."""

    name: str
    geometry: KvGeometry
    hidden_size: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    weights_dtype: str = "float16"
    folder: Path | None = None

    @property
    def rho(self) -> float:
        """Bytes of X, the input of the K and V projections, over those of K and V: half the GQA group size,
        where the query heads are together as wide as the model."""
        geometry = self.geometry
        if self.hidden_size is None:
            return rho_of(geometry.gqa_group_size)
        return self.hidden_size / (2 * geometry.num_kv_heads * geometry.head_dim)

    @property
    def layer_weights(self) -> int | None:
        """Elements of one layer's matrices, gated MLP included; None if the sizes are unknown."""
        if self.hidden_size is None:
            return None
        geometry, hidden = self.geometry, self.hidden_size
        projections = 2 * (geometry.num_query_heads + geometry.num_kv_heads) * geometry.head_dim * hidden
        return projections + 3 * hidden * (self.intermediate_size or 4 * hidden)

    @property
    def num_weights(self) -> int | None:
        """Elements of all matrices that a decode step reads; None if the sizes are unknown."""
        if self.layer_weights is None:
            return None
        return self.geometry.num_layers * self.layer_weights + (self.vocab_size or 0) * self.hidden_size

    @property
    def weights_bytes(self) -> int:
        """0 if unknown: then memory is for the KV cache alone."""
        return (self.num_weights or 0) * WEIGHT_BYTES[self.weights_dtype]

    def stored_as(self, dtype: str) -> "ModelShape":
        """The same model with its K/V in another storage dtype."""
        geometry = self.geometry
        group_tokens = default_group_tokens(dtype, geometry.head_dim, PAGE_SIZE) if dtype else None
        return replace(self, geometry=replace(geometry, dtype=dtype, group_tokens=group_tokens))


def read_model(model: str, drives: list[str], dtype: str | None = None) -> ModelShape:
    """The model that `--model` names: a folder with a config.json, such a file, `layers=32,heads=32,...`, or
    the name of a model in one of the drives.

    dtype: the storage dtype, by default the model's own. Raises InvalidArgument naming the field.
    """
    path = Path(model)
    if path.is_dir() or path.suffix == ".json":
        shape = _of_config(path)
    elif "=" in model:
        shape = _of_words(model)
    else:
        shape = _of_store(model, drives)
    return shape if dtype is None or dtype == shape.geometry.dtype else _checked_dtype(shape, dtype)


def _checked_dtype(shape: ModelShape, dtype: str) -> ModelShape:
    replace(shape.geometry, dtype=dtype)  # says what is wrong with it
    return shape.stored_as(dtype)


def _of_config(path: Path) -> ModelShape:
    file = path / CONFIG_FILE if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise InvalidArgument(f"model: {file}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgument(f"model: {file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidArgument(f"model: {file} holds no object")
    shape = _of_fields(path.name, config.get("text_config", config), str(file))
    return replace(shape, folder=file.parent if file.name == CONFIG_FILE else None)


def _of_words(words: str) -> ModelShape:
    fields: dict[str, int | str] = {}
    for word in words.split(","):
        key, _, value = word.strip().partition("=")
        if key not in WORDS:
            raise InvalidArgument(f"model: {key!r} is none of {', '.join(WORDS)}")
        fields[WORDS[key]] = value if key == "dtype" else _whole(key, value)
    return _of_fields("model", fields, "--model")


def _whole(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidArgument(f"model: {key} is a whole number, not {text!r}") from None


def _of_fields(name: str, config: Mapping, where: str) -> ModelShape:
    """A Hugging Face config's fields. Raises InvalidArgument."""
    for field in _REQUIRED:
        if config.get(field) is None:
            raise InvalidArgument(f"model: {where} lacks {field}")
    num_heads, hidden = config["num_attention_heads"], config.get("hidden_size")
    head_dim = config.get("head_dim")
    if head_dim is None:
        if not isinstance(hidden, int) or not isinstance(num_heads, int) or num_heads < 1:
            raise InvalidArgument(f"model: {where} has neither head_dim nor a hidden_size to find it by")
        head_dim = hidden // num_heads
    weights = config.get("dtype") or config.get("torch_dtype") or "float16"
    kv_heads = config.get("num_key_value_heads")
    dtype = weights if weights in WEIGHT_BYTES or config.keys() <= set(WORDS.values()) else "float16"
    for field in ("hidden_size", "intermediate_size", "vocab_size"):
        size = config.get(field)
        if size is not None and (not isinstance(size, int) or size < 1):
            raise InvalidArgument(f"model: {field} is a positive integer, not {size!r}")
    try:
        geometry = KvGeometry(
            config["num_hidden_layers"], num_heads, num_heads if kv_heads is None else kv_heads, head_dim, dtype
        )
    except InvalidArgument as error:
        raise InvalidArgument(f"model: {error}") from error
    shape = ModelShape(
        name,
        geometry,
        hidden,
        config.get("intermediate_size"),
        config.get("vocab_size"),
        weights if weights in WEIGHT_BYTES else "float16",
    )
    return shape.stored_as(dtype)


def _of_store(name: str, drives: list[str]) -> ModelShape:
    import kvfs

    known: list[str] = []
    for drive in drives:
        if not Path(drive).is_file():
            continue
        with kvfs.open(drive, cache_bytes="8MiB") as store:
            models = {model.name: model for model in store.models()}
        if name in models:
            return ModelShape(name, models[name].geometry)
        known += models
    what = f"the drives know {', '.join(known)}" if known else "no drive given knows a model"
    raise InvalidArgument(
        f"model: {name!r} is no folder, no config.json, no layers=...,heads=...,head_dim=..., and {what}"
    )
