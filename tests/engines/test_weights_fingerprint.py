"""A cache that takes other weights for the same ones gives fluent nonsense."""

import json
import struct

import numpy as np
import pytest

from kvfs.engines.weights_fingerprint import fingerprint


def write_weights(path, tensors):
    """A safetensors file of float32 tensors."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.tobytes() for t in tensors.values()))


@pytest.fixture
def folder(tmp_path):
    tensors = {f"layer.{index}": np.full(100_000, index, np.float32) for index in range(8)}
    write_weights(tmp_path / "model.safetensors", tensors)
    return tmp_path, tensors


def test_any_tensor_counts(folder):
    """Training that moves one tensor of a model."""
    path, tensors = folder
    before = fingerprint(path)
    assert fingerprint(path) == before
    for name in tensors:
        write_weights(path / "model.safetensors", {**tensors, name: tensors[name] + 1})
        assert fingerprint(path) != before, name
    write_weights(path / "model.safetensors", tensors)
    assert fingerprint(path) == before


def test_how_an_adapter_applies_counts(folder):
    """The same adapter with another alpha."""
    path, _ = folder
    (path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    before = fingerprint(path)
    (path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    assert fingerprint(path) != before


def test_no_weights(tmp_path):
    """Models without files must be named by the user, not all be the same."""
    with pytest.raises(FileNotFoundError, match="no weights"):
        fingerprint(tmp_path)
