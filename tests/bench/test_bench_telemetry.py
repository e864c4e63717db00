"""The benchmark of telemetry at its smallest: that it runs and keeps its schema, never how fast."""

import json

from kvfs_bench import telemetry
from kvfs_bench.figures import report


def test_schema_and_names(tmp_path):
    """Figures compared over time: a name that vanishes breaks every comparison."""
    result = json.loads(json.dumps(report("telemetry", telemetry.measure(tmp_path, quick=True))))
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert figures.keys() == {
        "telemetry.probe",
        "telemetry.512.attend",
        "telemetry.512.metrics.cost",
        "telemetry.512.trace.cost",
        "telemetry.scrape",
    }
    assert list(tmp_path.iterdir()) == []
