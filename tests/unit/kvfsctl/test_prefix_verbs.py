"""`kvfsctl prefix` and the look-ups in `kvfsctl stats`, as a user runs them."""

import json

import numpy as np
import pytest

import kvfs
from kvfs.objects.counters import RequestCounters, RequestMiss
from kvfs.prefix.counters import PrefixCounters
from kvfs.prefix.match import Miss
from kvfs.tenant_counters import ByTenant
from kvfsctl import stats
from tests.unit.kvfsctl.command_line import assert_asks, kvfsctl

GROUP = 256


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    path = tmp_path_factory.mktemp("drive") / "drive.kvfs"
    kvfs.format(path, "48MiB")
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = store.add_model("tiny", num_layers=1, num_query_heads=2, num_kv_heads=1, head_dim=64)
        for tenant, count in (("red", 2), ("", 1)):
            sequence = store.create_sequence(model, f"s{count}")
            rows = np.ones((count * GROUP, 1, 64), np.float32)
            sequence.append(0, rows, rows)
            sequence.append_tokens(range(count * GROUP))
            sequence.publish(tenant)
    return path


def test_ls_and_drop(drive):
    """What is shared with whom, and the end of it; asked for twice, as everything that cannot be undone."""
    found = json.loads(kvfsctl("prefix", "ls", drive, "--json").stdout)
    assert found["schema"] == 1
    assert [(row["tenant"], row["num_groups"], row["num_tokens"]) for row in found["prefixes"]] == [
        ("", 1, GROUP),
        ("red", 2, 2 * GROUP),
    ]
    assert "red" in kvfsctl("prefix", "ls", drive).stdout
    assert_asks("prefix", "drop", drive)
    assert "would drop 2 groups of tenant 'red'" in kvfsctl("prefix", "drop", drive, "--dry-run").stdout
    assert kvfsctl("prefix", "drop", drive, "--tenant", "", "--yes").returncode == 0
    dropped = json.loads(kvfsctl("prefix", "drop", drive, "--model", "tiny", "--yes", "--json").stdout)
    assert [(usage["tenant"], usage["num_groups"]) for usage in dropped["dropped"]] == [("red", 2)]
    assert json.loads(kvfsctl("prefix", "ls", drive, "--json").stdout)["prefixes"] == []
    with kvfs.open(drive, cache_bytes="8MiB") as store:
        assert [sequence.num_tokens for sequence in store.sequences()] == [GROUP, 2 * GROUP]


def test_stats(drive):
    """A drive that nobody uses has no look-ups, and says so."""
    assert json.loads(kvfsctl("stats", drive, "--json").stdout)["counters"]["prefix"]["lookups"] == 0
    assert "tokens wanted" in kvfsctl("stats", drive).stdout


def test_tables_of_tenants(capsys, monkeypatch):
    """An owner who sees that there are misses, and not whose or why."""
    monkeypatch.setenv("COLUMNS", "200")
    counters = PrefixCounters()
    counters.of("red", "tiny").count(512, 256, Miss.OTHER_DTYPE)
    requests = ByTenant(RequestCounters)
    requests.of("", "large").count(300, 0, RequestMiss.IDENTITY)
    stats.print_tenants(counters.as_dict(), {"tenants": [{"cache": "vllm", **row} for row in requests.rows()]})
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any({"red", "tiny", "dtype", "512"} <= set(line) for line in shown)
    assert any({"vllm", "large", "identity", "300"} <= set(line) for line in shown)
