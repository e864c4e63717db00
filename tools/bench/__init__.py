"""Benchmarks: every figure beside its rival and its physical limit, measured in the same run."""
