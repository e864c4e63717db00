"""The Grafana dashboard: every query is of metrics and labels that there are."""

import json
import re
from pathlib import Path

import pytest

from kvfs.telemetry.metrics import metrics_text

from .conftest import fill
from .test_metrics import families_of

DASHBOARD = Path(__file__).parents[4] / "tools" / "grafana" / "kvfs.json"
OF_PROMETHEUS = {"job", "instance", "le"}


@pytest.fixture
def samples(store):
    """By metric's name its labels, after everything has happened once."""
    sequence = fill(store)
    sequence.append_tokens(range(700))
    sequence.publish("red")
    for tenant in ("red", "blue"):
        store.find_prefix(sequence.model, range(700), tenant)
    cache = store.object_cache("cache", capacity_bytes=1 << 20)
    cache.put([b"k"], [b"v" * 100])
    cache.get([b"k", b"none"], [bytearray(100), bytearray(100)])
    cache.count_request("red", "m", 100, 0, "absent")
    assert metrics_text(store.telemetry())
    found = {}
    for family in families_of(store).values():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_query(samples):
    """A dashboard that asks for what is not there shows empty panels, and nobody knows why."""
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    queries += [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]
    assert len(queries) > 20
    for query in queries:
        names = re.findall(r"\bkvfs_[a-z_]+", query)
        assert names and query.count("(") == query.count(")"), query
        for name in names:
            assert name in samples, f"{name} of {query}"
        labels = set(re.findall(r"(\w+)=~?\"", query)) | {
            label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")
        }
        known = OF_PROMETHEUS.union(*(samples[name] for name in names))
        assert labels <= known, f"{labels - known} of {query}"
