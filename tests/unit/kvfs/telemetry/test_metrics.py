"""Prometheus metrics: that they say what the counters say, and keep to what dashboards rely on."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvfs.errors import InvalidArgument
from kvfs.kv_tree.tree import KvTree
from kvfs.telemetry.metrics import metrics_text
from spdk_glue.probes import BOUNDS_NS
from tests.unit.kvfs.conftest import random_queries
from tests.unit.kvfs.kv_tree.client import Client

from .conftest import attend, fill


def families_of(store):
    text = metrics_text(store.telemetry()).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families, name, **labels):
    """The sum of a metric's samples that have these labels."""
    samples = (sample for family in families.values() for sample in family.samples)
    found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    assert found, f"{name} {labels}"
    return sum(found)


def test_counters_are_the_stores(store, sequence):
    """A wrong unit or a wrong field would be believed: each against its counter."""
    families, counters = families_of(store), store.counters()
    flash = counters["flash"]
    assert value(families, "kvfs_flash_read_bytes_total") == flash["bytes_read"] > 0
    assert value(families, "kvfs_host_written_bytes_total") == flash["host_bytes_written"] > 0
    assert value(families, "kvfs_free_bytes") == counters["space"]["free_bytes"]
    assert value(families, "kvfs_attention_pages_total") == sum(
        counters["attention"][f"pages_from_{source}"] for source in ("flash", "cache")
    )
    busy = counters["attention"]["kernel_ns"] / 1e9
    assert value(families, "kvfs_kernel_busy_seconds_total") == pytest.approx(busy)
    causes = value(families, "kvfs_flash_used_bytes_total")
    assert causes == (flash["media_pages_programmed"] + flash["padding_pages"]) * flash["page_size"]
    assert value(families, "kvfs_superblocks") == flash["num_superblocks"]
    (usage,) = store.space_usage()
    assert value(families, "kvfs_space_bytes", kind="groups") == usage.blocks["groups"] > 0
    assert value(families, "kvfs_flash_bytes", state="live") == usage.pages["live"] > 0
    for metric in ("kvfs_space_bytes", "kvfs_flash_bytes"):
        assert value(families, metric) == usage.media_bytes
    assert value(families, "kvfs_sequences") == 1 and value(families, "kvfs_tokens") == 700


def test_histograms(store, sequence):
    """Every request is in one, and buckets add up as Prometheus wants them."""
    attend(store, sequence)
    families = families_of(store)
    requests = families["kvfs_request_duration_seconds"]
    of_attend = [s for s in requests.samples if s.labels.get("operation") == "attend"]
    buckets = [s for s in of_attend if s.name.endswith("_bucket")]
    assert [float(s.labels["le"]) for s in buckets] == [*(bound / 1e9 for bound in BOUNDS_NS), float("inf")]
    assert [s.value for s in buckets] == sorted(s.value for s in buckets)
    (count,) = (s.value for s in of_attend if s.name.endswith("_count"))
    (total,) = (s.value for s in of_attend if s.name.endswith("_sum"))
    assert buckets[-1].value == count == 4
    assert 0 < total < 60
    for layer, operation in (("media", "program"), ("ftl", "write"), ("drive", "attention")):
        assert value(families, "kvfs_layer_duration_seconds_count", layer=layer, operation=operation) > 0


def test_conventions(store, sequence):
    """Names, units and help as Prometheus' naming practices have them; labels that are bounded."""
    store.object_cache("c").put([b"k"], [b"v" * 100])
    families = families_of(store)
    for family in families.values():
        assert re.fullmatch(r"kvfs_[a-z_]+", family.name) and family.documentation
        assert not re.search(r"_(ns|us|ms|kib|mib|percent|count|total)$", family.name), family.name
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            known = {"drive", "state", "source", "kind", "direction", "cause", "layer", "operation", "le"}
            assert sample.labels.keys() <= known | {"tenant", "model", "cache", "result", "reason"}


def test_misses_by_tenant_and_reason(store, sequence):
    """The first question of who runs engines: who hits, who misses, and why."""
    tokens = list(range(700))
    sequence.append_tokens(tokens)
    sequence.publish("red")
    store.find_prefix(sequence.model, tokens, "red")
    store.find_prefix(sequence.model, tokens, "blue")
    families = families_of(store)
    assert value(families, "kvfs_prefix_lookups_total", tenant="red", model="m", result="hit") == 1
    assert value(families, "kvfs_prefix_lookups_total", tenant="blue", model="m", result="miss") == 1
    assert value(families, "kvfs_prefix_misses_total", tenant="blue", reason="unknown") == 1
    assert value(families, "kvfs_prefix_tokens_found_total", tenant="red") == 512


def test_failures_are_counted(store, sequence):
    with pytest.raises(InvalidArgument, match="layer"):
        store.attend(99, random_queries(), sequence)
    assert value(families_of(store), "kvfs_request_failures_total", operation="attend") == 1


def test_set(drive_set, locations):
    """Of a set each drive by its name; a drive that is lost is down, and the others' numbers stay."""
    fill(drive_set, num_kv_heads=4)
    families = families_of(drive_set)
    for location in locations:
        assert value(families, "kvfs_flash_programmed_bytes_total", drive=location) > 0
        assert value(families, "kvfs_drive_up", drive=location, state="in use") == 1
    member = next(iter(drive_set._members.values()))
    member.lose(RuntimeError("pulled"))
    families = families_of(drive_set)
    assert value(families, "kvfs_drive_up", drive=member.location, state="lost") == 0
    with pytest.raises(AssertionError):
        value(families, "kvfs_free_bytes", drive=member.location)
    assert value(families, "kvfs_free_bytes") > 0


def test_client(served):
    """Through a mount the owner's numbers are told, its own requests included."""
    with served.open() as client:
        fill(client)
        found = families_of(client)
    assert value(found, "kvfs_request_duration_seconds_count", operation="attend") == 2


def test_a_mount_for_several_users(store, sequence):
    """Who is not the drive's owner reads no tenants there."""
    sequence.append_tokens(range(700))
    store.find_prefix(sequence.model, range(700), "red")
    for is_shared in (False, True):
        text = Client(KvTree(store, is_shared=is_shared)).read(".kvfs/metrics")
        assert b"kvfs_free_bytes" in text and (b'tenant="red"' in text) is not is_shared


def test_drive_map(store, sequence):
    """What the superblocks hold, and whose it is, of those written since the drive was opened."""
    (found,) = store.drive_map()
    assert sum(found["valid_pages"]) == store.counters()["flash"]["mapped_pages"]
    streams = {s for s, state in zip(found["stream"], found["state"], strict=True) if state in ("open", "full")}
    assert streams and None not in streams
    assert all(s is None for s, state in zip(found["stream"], found["state"], strict=True) if state == "free")
