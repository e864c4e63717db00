"""A model known to a store, and what it and its sequences may be called."""

from dataclasses import dataclass
from typing import Any

from kvfs.errors import InvalidArgument, ModelMismatch
from kvfs.layout import GroupLayout, KvGeometry

MAX_NAME_BYTES = 255  # a model and a sequence are folders of the mount


@dataclass(frozen=True)
class Model:
    """A model known to a store: its name and the shape of its KV cache."""

    id: int
    name: str
    geometry: KvGeometry
    layout: GroupLayout

    def __getattr__(self, field: str) -> Any:
        # num_layers, head_dim and so on read as the model's own; the geometry stays the one truth
        if field.startswith("_"):
            raise AttributeError(field)
        return getattr(self.geometry, field)


def check_name(name: str, kind: str) -> None:
    """kind: what it names, for the message. Raises InvalidArgument."""
    good = isinstance(name, str) and name and name not in (".", "..") and "/" not in name and "\0" not in name
    if not good or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise InvalidArgument(f"a {kind} name is 1 to {MAX_NAME_BYTES} bytes without '/' or NUL, not {name!r}")


def check_same_geometry(name: str, known: KvGeometry, wanted: KvGeometry) -> None:
    """Raises ModelMismatch with what differs."""
    differences = {
        field: (getattr(known, field), getattr(wanted, field))
        for field in KvGeometry.__dataclass_fields__
        if getattr(known, field) != getattr(wanted, field)
    }
    if differences:
        raise ModelMismatch(name, differences)
