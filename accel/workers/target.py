"""What the micro-kernels may assume of the CPU, found out at run time."""

from dataclasses import dataclass
from functools import cache

import llvmlite.binding


@dataclass(frozen=True)
class Target:
    """Shapes of a CPU's vectors.

    lanes: floats per vector; accumulators: vectors of sums kept in registers at once, which leaves some for
    operands; converts_half: the CPU widens fp16 itself, else it is done in integer arithmetic.
    """

    lanes: int
    accumulators: int
    converts_half: bool


AVX512 = Target(lanes=16, accumulators=24, converts_half=True)  # 32 registers of 512 bits
# 16 registers of 256 bits. 12 sums hide two 4-cycle FMA pipes and need 7 loads per 12 FMA
AVX2 = Target(lanes=8, accumulators=12, converts_half=True)
NEON = Target(lanes=4, accumulators=20, converts_half=True)  # 32 registers of 128 bits
PORTABLE = Target(lanes=4, accumulators=8, converts_half=False)


@cache
def host_target() -> Target:
    """The best target of this machine's CPU."""
    if llvmlite.binding.get_process_triple().startswith(("aarch64", "arm64")):
        return NEON
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return AVX512
    if features.get("avx2") and features.get("fma") and features.get("f16c"):
        return AVX2
    return PORTABLE


def host_target_name() -> str:
    """What to call it."""
    names = {
        AVX512: "AVX-512",
        AVX2: "AVX2",
        NEON: "NEON",
        PORTABLE: "portable, no half-precision instructions",
    }
    return names[host_target()]


@cache
def can_permute(lanes: int) -> bool:
    """Whether this machine's CPU picks lanes of a vector of floats by an index."""
    if host_target() is NEON:
        return False
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get({16: "avx512f", 8: "avx2"}.get(lanes, ""), False))


@cache
def multiplies_bytes() -> bool:
    """Whether this machine's CPU adds up products of bytes, and shifts and looks up bytes of a whole vector."""
    if host_target() is not AVX512:
        return False
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512vnni", "avx512vbmi"))
