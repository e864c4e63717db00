"""tree, export, import, mv and fork as a user runs them, on a drive's file."""

import json

import numpy as np
import pytest

import kvfs
from tests.unit.kvfsctl.command_line import assert_asks, kvfsctl


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    path = tmp_path_factory.mktemp("drive") / "drive.kvfs"
    kvfs.format(path, "48MiB")
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = store.add_model("tiny", num_layers=1, num_query_heads=2, num_kv_heads=1, head_dim=64)
        sequence = store.create_sequence(model, "[chat]")
        rows = np.arange(300 * 64, dtype=np.float32).reshape(300, 1, 64) % 2039
        sequence.append(0, rows, -rows)
        sequence.append_tokens(range(300))
        sequence.set_attribute("user.kvfs.tenant", b"t")
    return path


def test_out_and_in(drive, tmp_path):
    """export, then import into a drive that knows nothing: the same tokens, under the file's name."""
    file, other = tmp_path / "back.safetensors", tmp_path / "other.kvfs"
    result = kvfsctl("export", drive, "[chat]", file, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_bytes"] == file.stat().st_size
    assert file.stat().st_mode & 0o777 == 0o644
    kvfs.format(other, "48MiB")
    result = kvfsctl("import", other, file)
    assert result.returncode == 0, result.stderr
    with kvfs.open(other, cache_bytes="8MiB") as store, kvfs.open(drive, cache_bytes="8MiB") as original:
        found, wanted = store.sequence("back"), original.sequence("[chat]")
        assert found.model.name == "tiny"
        assert np.array_equal(found.read(0), wanted.read(0))
        assert np.array_equal(found.tokens, wanted.tokens)


def test_errors_are_one_line(drive, tmp_path):
    """What cannot be done: exit code 1, one line, no file and no sequence left behind."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"something of value")
    cases = [
        (("export", drive, "[chat]", file), "exists"),
        (("export", drive, "nobody", tmp_path / "y"), "no sequence named 'nobody'"),
        (("export", drive, "[chat]", tmp_path / "no" / "y"), "No such file"),
        (("import", drive, file), "not a safetensors file"),
        (("import", drive, tmp_path / "none"), "No such file"),
        (("mv", drive, "nobody", "x"), "no sequence named 'nobody'"),
        (("mv", drive, "[chat]", "a/b"), "name"),
        (("fork", drive, "[chat]", "[chat]"), "exists already"),
    ]
    for arguments, text in cases:
        result = kvfsctl(*arguments)
        assert result.returncode == 1, arguments
        assert text in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert file.read_bytes() == b"something of value"
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_tree_mv_fork(drive):
    """Names with brackets are shown as they are; a fork has its parent's attributes."""
    assert kvfsctl("fork", drive, "[chat]", "child").returncode == 0
    assert kvfsctl("mv", drive, "child", "renamed").returncode == 0
    text = kvfsctl("tree", drive).stdout
    assert "tiny" in text and "[chat]  300 tokens" in text and "renamed" in text
    (model,) = json.loads(kvfsctl("tree", drive, "--json").stdout)["models"]
    assert [sequence["name"] for sequence in model["sequences"]] == ["[chat]", "renamed"]
    assert model["sequences"][1]["attributes"] == {"user.kvfs.tenant": "t"}
    assert model["sequences"][1]["size_bytes"] == 300 * 64 * 2 * 2


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Ten sequences of two models."""
    path = tmp_path_factory.mktemp("many") / "drive.kvfs"
    kvfs.format(path, "48MiB")
    with kvfs.open(path, cache_bytes="8MiB") as store:
        shape = {"num_layers": 1, "num_query_heads": 2, "num_kv_heads": 1, "head_dim": 64}
        models = [store.add_model(name, **shape) for name in ("even", "odd")]
        for number in range(10):
            store.create_sequence(models[number % 2], f"s{number}")
    return path


@pytest.mark.parametrize("verb", ["ls", "tree"])
def test_pages(many, verb):
    """A page goes on where the one before has ended, and says that there may be more."""

    def shown(*options):
        document = json.loads(kvfsctl(verb, many, *options, "--json").stdout)
        found = document.get("sequences") or [s for model in document["models"] for s in model["sequences"]]
        return sorted(each["name"] for each in found)

    assert shown() == [f"s{number}" for number in range(10)]
    assert shown("--limit", "3", "--after", "s3") == ["s4", "s5", "s6"]
    assert shown("--limit", "3", "--after", "s7") == ["s8", "s9"]
    assert "--after s2" in kvfsctl(verb, many, "--limit", "3").stderr
    assert kvfsctl(verb, many, "--after", "s6").stderr == ""


def test_model_rm(many):
    """A model with sequences stays, whatever is said; one without goes."""
    refused = kvfsctl("model", "rm", many, "odd", "--yes")
    assert refused.returncode == 1 and "has 5 sequences" in refused.stderr
    shape = ("--layers", 1, "--query-heads", 2, "--kv-heads", 1, "--head-dim", 64)
    kvfsctl("model", "add", many, "spare", *shape)
    assert_asks("model", "rm", many, "spare")
    assert kvfsctl("model", "rm", many, "spare", "--dry-run").stdout == "would delete model spare\n"
    assert kvfsctl("model", "rm", many, "spare", "--yes").stdout == "deleted model spare\n"
    counts = {
        m["name"]: m["num_sequences"]
        for m in json.loads(kvfsctl("model", "ls", many, "--json").stdout)["models"]
    }
    assert counts == {"even": 5, "odd": 5}
    assert kvfsctl("model", "rm", many, "spare", "--yes").returncode == 1


def test_df_by_kind(many):
    """Kinds and states each come to all flash; integers for machines, words for people."""
    document = json.loads(kvfsctl("df", many, "--json").stdout)
    (usage,) = document["kinds"]
    for what in ("blocks", "pages"):
        assert sum(usage[what].values()) == usage["media_bytes"] > 40 << 20
    text = kvfsctl("df", many).stdout
    assert "by blocks" in text and "by pages" in text and "waits for collection" in text
