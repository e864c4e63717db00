"""A model's weights, told apart without reading all of them.

A cache on disk outlives the files that its keys and values came from: a model that is trained further and saved
under the same name has the same configuration, and fluent nonsense is what it says over the other's cache.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
ADAPTER = "adapter_config.json"  # how strongly an adapter applies, beside what its weights are
SAMPLE_BYTES = 4096
SAMPLES = 256  # of a file that does not say where its tensors are


def fingerprint(path: str | os.PathLike) -> str:
    """32 hex digits of the weights in a folder, or in one file: names, sizes, and some bytes of every tensor.

    A change that leaves the first 4 KiB of every tensor alone is not seen. Raises FileNotFoundError if there
    are no weights, OSError.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(filter(_counts, path.glob("*")))
    if not files:
        raise FileNotFoundError(f"no weights ({', '.join(SUFFIXES)}) in {path}")
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(f"{file.name if path.is_dir() else file.suffix}:{size};".encode())
            for offset in _sample_offsets(stream, size):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _counts(file: Path) -> bool:
    return file.suffix in SUFFIXES or file.name == ADAPTER


def _sample_offsets(stream, size: int) -> list[int]:
    """Where to look: at the header and each tensor of a safetensors file, evenly elsewhere."""
    if stream.name.endswith(".safetensors") and size >= 8:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        if header_bytes <= size - 8:
            tensors = json.loads(stream.read(header_bytes))
            starts = [tensor["data_offsets"][0] for name, tensor in tensors.items() if name != "__metadata__"]
            header = range(0, 8 + header_bytes, SAMPLE_BYTES)
            return [*header, *(8 + header_bytes + start for start in sorted(starts))]
    return [size * index // SAMPLES for index in range(SAMPLES)]
