"""A sequence as one safetensors file: the header, where what lies, and what other files' headers must say.

Tensors `layer_00.keys` and `layer_00.values` [num_kv_heads, num_tokens, head_dim] of each layer, then `tokens`
[any number] of uint32. So a head's rows lie in the file as they lie in a group's pages. The header is padded
with spaces to whole pages, and its metadata hold the model's name and geometry.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from math import prod

from kvfs.errors import InvalidArgument
from kvfs.head_pieces import HeadRows
from kvfs.layout import KvGeometry

PAGE_BYTES = 4096
LENGTH_BYTES = 8  # of the header's length, in front
MAX_HEADER_BYTES = 100_000_000  # as the library has it
DTYPE_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
TOKENS_DTYPE, TOKEN_ID_BYTES = "U32", 4
KINDS = ("keys", "values")
FORMAT_VERSION = "1"


def layer_name(layer: int) -> str:
    return f"layer_{layer:02}"


@dataclass(frozen=True)
class SafetensorsLayout:
    """Where what lies in a file that kvfs writes. Offsets count from the file's first byte."""

    model_name: str
    geometry: KvGeometry
    num_tokens: int
    num_token_ids: int

    def header(self) -> bytes:
        geometry = self.geometry
        dtype = DTYPE_NAMES[geometry.row_dtype]
        shape = [geometry.num_kv_heads, self.num_tokens, geometry.head_dim]
        num_bytes = geometry.num_kv_heads * self.head_bytes
        metadata = {"kvfs_format": FORMAT_VERSION, "model": self.model_name}
        metadata |= {name: str(value) for name, value in asdict(geometry).items()}
        entries: dict = {"__metadata__": metadata}
        names = [f"{layer_name(layer)}.{kind}" for layer in range(geometry.num_layers) for kind in KINDS]
        for position, name in enumerate(names):
            offsets = [position * num_bytes, (position + 1) * num_bytes]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        tokens = [self.kv_bytes, self.kv_bytes + self.num_token_ids * TOKEN_ID_BYTES]
        entries["tokens"] = {"dtype": TOKENS_DTYPE, "shape": [self.num_token_ids], "data_offsets": tokens}
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = -(-(len(text) + LENGTH_BYTES) // PAGE_BYTES) * PAGE_BYTES - LENGTH_BYTES
        return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)

    @property
    def row_bytes(self) -> int:
        return self.geometry.head_dim * self.geometry.numpy_dtype.itemsize

    @property
    def head_bytes(self) -> int:
        """Keys or values of one head in one layer."""
        return self.num_tokens * self.row_bytes

    @property
    def kv_bytes(self) -> int:
        return self.num_tokens * self.geometry.token_bytes

    def pieces(self, start: int, stop: int) -> tuple[list[HeadRows], int]:
        """The rows that bytes [start, stop) of the KV are in, and how many bytes of the first come before."""
        num_tokens, num_heads = self.num_tokens, self.geometry.num_kv_heads
        first, last = start // self.row_bytes, -(-stop // self.row_bytes)
        pieces = []
        row = first
        while row < last:
            stripe, token = divmod(row, num_tokens)  # stripes: [layer][K | V][head]
            count = min(num_tokens - token, last - row)
            tensor, head = divmod(stripe, num_heads)
            pieces.append(HeadRows(*divmod(tensor, 2), head, token, token + count))
            row += count
        return pieces, start - first * self.row_bytes


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    stop: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a file says it holds: every tensor lies within the file and has the size of its shape."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def parse(cls, read: Callable[[int, int], bytes], file_bytes: int) -> "SafetensorsHeader":
        """read: (offset, size) to bytes. Raises InvalidArgument."""
        if file_bytes < LENGTH_BYTES:
            raise InvalidArgument(f"not a safetensors file: it has {file_bytes} bytes")
        length = int.from_bytes(read(0, LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise InvalidArgument("not a safetensors file: its header would be too long")
        data_start = LENGTH_BYTES + length
        if data_start > file_bytes:
            raise InvalidArgument(f"truncated: {file_bytes} bytes, of which the header takes {data_start}")
        try:
            entries = json.loads(read(LENGTH_BYTES, length))
            metadata = entries.pop("__metadata__", {})
            tensors = {name: _tensor(entry, data_start) for name, entry in entries.items()}
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("metadata are strings")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InvalidArgument(f"not a safetensors file: its header is wrong ({error})") from error
        needed = max((tensor.stop for tensor in tensors.values()), default=data_start)
        if needed > file_bytes:
            raise InvalidArgument(f"truncated: {file_bytes} bytes, but its tensors need {needed}")
        return cls(tensors, metadata)

    @property
    def geometry(self) -> KvGeometry:
        """Of the model, from the metadata. Raises InvalidArgument."""
        values: dict = {}
        for field in fields(KvGeometry):
            text = self.metadata.get(field.name)
            if text is None:
                raise InvalidArgument(f"its metadata lack the model's {field.name}")
            is_number = text.isascii() and text.isdigit() and len(text) < 10
            values[field.name] = int(text) if is_number else text
        return KvGeometry(**values)

    def num_tokens(self, geometry: KvGeometry) -> int:
        """How many tokens it holds of a model of this geometry. Raises InvalidArgument for another one's."""
        names = {f"{layer_name(layer)}.{kind}" for layer in range(geometry.num_layers) for kind in KINDS}
        for name in sorted(names - self.tensors.keys()):
            raise InvalidArgument(f"tensor {name} is missing")
        for name in sorted(self.tensors.keys() - names - {"tokens"}):
            raise InvalidArgument(
                f"tensor {name} is none of the model's, which has {geometry.num_layers} layers"
            )
        first = self.tensors[f"{layer_name(0)}.keys"].shape
        num_tokens = first[1] if len(first) == 3 else 0
        wanted = DTYPE_NAMES[geometry.row_dtype], (geometry.num_kv_heads, num_tokens, geometry.head_dim)
        for name in sorted(names):
            tensor = self.tensors[name]
            if (tensor.dtype, tensor.shape) != wanted:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise InvalidArgument(
                    f"tensor {name} is {found}, but the model needs {wanted[0]} {list(wanted[1])}"
                )
        tokens = self.tensors.get("tokens")
        if tokens is not None and (tokens.dtype != TOKENS_DTYPE or len(tokens.shape) != 1):
            raise InvalidArgument(
                f"tensor tokens is {tokens.dtype} {list(tokens.shape)}, wanted U32 of one dimension"
            )
        for name, text in self.metadata.items():
            expected = getattr(geometry, name, None) if name in KvGeometry.__dataclass_fields__ else None
            # how tokens are grouped and coded is the store's business
            if expected is not None and name not in ("group_tokens", "dtype") and text != str(expected):
                raise InvalidArgument(f"{name} of its model is {text}, but of this model {expected}")
        return num_tokens


_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, TOKENS_DTYPE: TOKEN_ID_BYTES}


def _tensor(entry: dict, data_start: int) -> Tensor:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 60 for number in (*shape, start, stop)):
        raise ValueError("shapes and offsets are whole numbers")
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"dtype {dtype} is none of {', '.join(_ITEM_BYTES)}")
    if stop - start != prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{stop - start} bytes for {dtype} {list(shape)}")
    return Tensor(dtype, shape, data_start + start, data_start + stop)
