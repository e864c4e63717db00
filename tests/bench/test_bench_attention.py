"""The benchmark itself, at its smallest size: that it runs and keeps its schema, never how fast."""

from kvfs_bench import attention
from kvfs_bench.figures import report


def test_schema_and_names(tmp_path):
    """Figures compared over time: a name or field that vanishes breaks every comparison."""
    result = report("attention", attention.measure(tmp_path, quick=True))
    assert result["schema"] == 1
    figures = {figure["name"]: figure for figure in result["figures"]}
    fields = {"name", "value", "unit", "rival", "rival_value", "ratio", "limit", "goal", "met"}
    assert all(set(figure) == fields for figure in figures.values())
    for name in (
        "memory.read_bandwidth",
        "attention.warm.g1.fraction_of_memory_bandwidth",
        "attention.warm.g4.bandwidth",
        "attention.cold.bandwidth",
        "append.bandwidth",
        "attention.accuracy.float16.relative_error_max",
    ):
        assert name in figures
    for dtype in ("float16", "bfloat16", "float32"):
        assert figures[f"attention.accuracy.{dtype}.relative_error_max"]["met"]
    for dtype, limit in (("float8_e4m3", 0.1), ("int8", 0.02), ("int4", 0.3)):
        assert 0 < figures[f"attention.{dtype}.error_rms"]["value"] < limit
        assert figures[f"attention.cold.{dtype}.tokens_per_second"]["rival_value"] > 0
    assert list(tmp_path.iterdir()) == []
