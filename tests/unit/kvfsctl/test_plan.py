"""`kvfsctl plan`, as a user runs it: the plan in words and as JSON, a short run, one line for bad input."""

import json

import pytest

from kvfs_bench.planner import measuring, probe_drive, run, verification
from kvfs_bench.planner.model_shape import read_model
from kvfs_bench.planner.planning import Request
from tests.unit.kvfsctl.command_line import kvfsctl

MODEL = ("--model", "layers=3,heads=8,kv_heads=2,head_dim=64,hidden=256")


@pytest.fixture(scope="module", autouse=True)
def short_probes():
    """What is checked here does not depend on how well the machine is measured."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLD_BYTES", "CACHED_BYTES", "TARGET_BYTES"):
            patch.setattr(probe_drive, name, 12 << 20)
        patch.setattr(probe_drive, "TAIL_STEPS", 3)
        patch.setattr(measuring, "ROUNDS", 1)
        patch.setattr(probe_drive, "CACHED_SECONDS", 0)
        patch.setattr(measuring, "MEMORY_BYTES", 8 << 20)
        patch.setattr(verification, "STEPS_SECONDS", 0)
        patch.setattr(verification, "ROUNDS", 2)
        yield


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A plan that does not fit in its memory, every candidate run: its JSON."""
    folder = tmp_path_factory.mktemp("drives")
    options = ("--memory", "66MiB", "--context", "12300", "--drive", folder, "--drives", "2")
    result = kvfsctl("plan", *MODEL, *options, "--verify-all", "--json")
    assert result.returncode == 0, result.stderr
    assert not list(folder.iterdir())  # what was made is gone
    return json.loads(result.stdout)


def test_json(verified):
    """What a script reads stays where it is."""
    assert (verified["schema"], verified["verb"]) == (1, "plan")
    assert set(verified["choice"]) == {
        "num_drives",
        "num_workers",
        "writeback_tokens",
        "compression",
        "x_cache_share",
        "dtype",
    }
    assert verified["model"]["num_layers"] == 3
    assert verified["tokens_per_second"] == pytest.approx(1 / verified["step"]["total"])
    for rate in ("media", "media_around_cached", "media_random", "kernel"):
        assert all(drives[rate] > 0 for drives in verified["measured"]["drives"])
    assert verified["measured"]["link"] > 0
    assert verified["x_cache"]["rho"] == 1.0  # 256 wide, K and V 2 * 2 * 64


def test_run_reads_the_predicted_bytes(verified):
    """The plan's bytes are those that the drives count, whatever time they take."""
    runs = [each for each in verified["verification"] if each["compression"] is None]
    assert {each["num_drives"] for each in runs} == {1, 2}
    for each in runs:
        predicted, measured = each["predicted"], each["measured"]
        pages = [side["flash_bytes"] + side["cached_bytes"] for side in (predicted, measured)]
        assert pages[0] == verified["kv_bytes"] == 3 * 48 * 256 * 2 * 2 * 64 * 2
        assert pages[1] == pytest.approx(pages[0], rel=0.01)
        assert measured["flash_bytes"] == pytest.approx(predicted["flash_bytes"], abs=0.15 * pages[0])
        assert each["error"] == pytest.approx(
            predicted["tokens_per_second"] / measured["tokens_per_second"] - 1
        )


def test_a_compressed_run_reads_the_predicted_bytes(tmp_path):
    """The run is of sketches, by the store's own attention: a sixth of the dense pages."""
    request = Request(read_model(MODEL[1], []), 66 << 20, 20_480, 1)
    made = run.plan(request, [tmp_path])
    assert made.drive_rates.sketch.cold.index_kernel > 0
    found = verification.verify(made, made.chosen, 8, [tmp_path])
    predicted = found.predicted_flash_bytes + found.predicted_cached_bytes
    assert predicted == pytest.approx(request.kv_bytes / 6, rel=0.02)
    assert found.measured_flash_bytes + found.measured_cached_bytes == pytest.approx(predicted, rel=0.02)
    assert not list(tmp_path.iterdir())


def test_words(tmp_path):
    """Each choice is explained, terms and limit included."""
    result = kvfsctl("plan", *MODEL, "--memory", "1GiB", "--context", "600", "--drive", tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("fits in memory", "X-cache", "Compression: none", "Writeback: ", "limit", "tokens/s"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--memory", "much"), "memory"),
        (("--memory", "1MiB"), "memory"),
        (("--context", "0"), "context"),
        (("--batch", "0"), "batch"),
        (("--drives", "0"), "num_drives"),
        (("--drive", "/no/such/folder/drive.kvfs"), "drive"),
        (("--dtype", "float17"), "dtype"),
        (("--model", "layers=2,heads=9,kv_heads=2,head_dim=64"), "num_query_heads"),
    ],
)
def test_bad_input_is_one_line_with_the_field(options, field):
    given = dict(zip(("--model", "--memory", "--context"), (MODEL[1], "1GiB", "4096"), strict=True))
    given.update([options])
    result = kvfsctl("plan", *(text for pair in given.items() for text in pair))
    assert result.returncode == 1
    assert field in result.stderr
    assert result.stderr.count("\n") == 1 and not result.stdout
