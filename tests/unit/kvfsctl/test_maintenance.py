"""What an administrator does with a drive: check, scrub, wear and gc, as a user runs them."""

import json

import numpy as np
import pytest

import kvfs
from tests.unit.kvfsctl.command_line import kvfsctl

NUM_TOKENS = 700


def as_json(*arguments):
    result = kvfsctl(*arguments, "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == 1 and document["verb"] == arguments[0]
    assert result.stderr == ""
    return result.returncode, document


@pytest.fixture
def drive(request, tmp_path):
    """Two sequences; parametrize indirectly with options of format."""
    path = tmp_path / "drive.kvfs"
    result = kvfsctl("format", path, "--size", "48MiB", *getattr(request, "param", ()))
    assert result.returncode == 0, result
    with kvfs.open(path, cache_bytes="8MiB", worker="reference") as store:
        model = store.add_model("tiny", num_layers=2, num_query_heads=2, num_kv_heads=1, head_dim=64)
        for seed, name in enumerate(("chat-1", "chat-2")):
            sequence = store.create_sequence(model, name)
            rows = np.random.default_rng(seed).standard_normal((NUM_TOKENS, 1, 64), np.float32)
            for layer in range(2):
                sequence.append(layer, rows, rows)
    return path


def damage(path):
    """Flip a bit in the keys of tokens 288 to 319 of chat-2, layer 1; the LBA."""
    with kvfs.open(path, cache_bytes="8MiB", worker="reference") as store:
        sequence = store.sequence("chat-2")
        lba = sequence._groups[1].base_lba + sequence._layout.layer_lbas + 1
        page = int(store._drive.ftl.resolve(np.array([lba]))[0])
        offset = store._drive.ftl.media.layout.data_start + page * 4096 + 7
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    return lba


def test_damage_without_parity(drive):
    """Lost data: named by scrub and check, exit code 3; --repair keeps what is whole and says so."""
    lba = damage(drive)
    where = "sequence 'chat-2' of model 'tiny', layer 1, tokens 288 to 319 (keys of KV head 0)"
    line = f"LBA {lba} is lost: {where}"
    result = kvfsctl("scrub", drive)
    assert result.returncode == 3
    assert result.stdout.splitlines()[0] == line
    assert result.stderr == ""
    code, document = as_json("scrub", drive)
    assert code == 3
    (lost,) = document["lost"]
    assert lost["lba"] == lba and lost["sequences"] == ["chat-2"]
    assert (lost["model"], lost["layer"], lost["token_start"], lost["token_stop"]) == ("tiny", 1, 288, 320)
    result = kvfsctl("check", drive)
    assert (result.returncode, result.stdout.strip()) == (3, line)
    result = kvfsctl("check", drive, "--repair")
    assert result.returncode == 0, result
    assert f"repaired: truncated sequence 'chat-2' from {NUM_TOKENS} to 288 tokens" in result.stdout
    code, document = as_json("check", drive)
    assert (code, document["problems"], document["num_sequences"]) == (0, [], 2)
    assert kvfsctl("scrub", drive).returncode == 0
    with kvfs.open(drive, cache_bytes="8MiB") as store:
        assert [s.num_tokens for s in store.sequences()] == [NUM_TOKENS, 288]


@pytest.mark.parametrize("drive", [["--parity", "--spare-percent", "10"]], indirect=True)
def test_damage_with_parity(drive):
    """A damaged page is repaired by scrub and written anew; no exit code, nothing lost."""
    damage(drive)
    result = kvfsctl("check", drive)
    assert result.returncode == 0
    assert "1 superblocks have pages that only parity gives back" in result.stdout
    code, document = as_json("scrub", drive)
    assert code == 0
    assert (document["blocks_repaired"], document["superblocks_renewed"], document["lost"]) == (1, 1, [])
    code, document = as_json("scrub", drive)
    assert (document["blocks_repaired"], document["superblocks_renewed"]) == (0, 0)
    assert as_json("check", drive)[1]["problems"] == []
    assert as_json("info", drive)[1]["flash"]["num_parity_dies"] == 1


def test_check_json(drive):
    """check --repair --json: what was found, done and is left."""
    damage(drive)
    code, document = as_json("check", drive, "--repair")
    assert code == 0
    assert [problem["kind"] for problem in document["problems"]] == ["lost"]
    assert document["repaired"][0].startswith("truncated sequence 'chat-2'")
    assert document["remaining"] == []


def test_wear(drive, tmp_path):
    """wear: a histogram that adds up, every superblock in JSON, and a PNG."""
    plot = tmp_path / "wear.png"
    result = kvfsctl("wear", drive, "--plot", plot)
    assert result.returncode == 0, result
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "rated cycles" in result.stdout
    _, document = as_json("wear", drive)
    assert len(document["superblocks"]) == 48 == sum(bin["superblocks"] for bin in document["histogram"])
    assert sum(document["superblocks_by_state"].values()) == 48
    assert document["rated_cycles"] == 3000
    assert document["available_spare_percent"] == 100
    assert sum(record["valid_pages"] for record in document["superblocks"]) > 100


def test_gc(drive):
    """gc: does nothing where nothing is gained, and collects what deletions left."""
    assert as_json("gc", drive)[1]["superblocks_collected"] == 0
    with kvfs.open(drive, cache_bytes="8MiB", worker="reference") as store:
        for turn in range(4):
            sequence = store.create_sequence(store.model("tiny"), f"old-{turn}")
            rows = np.zeros((4096, 1, 64), np.float32)
            for layer in range(2):
                sequence.append(layer, rows, rows)
        store.flush()
        for turn in range(0, 4):
            store.delete_sequence(f"old-{turn}")
    _, document = as_json("gc", drive, "--superblocks", 1)
    assert document["superblocks_collected"] == 1
    _, document = as_json("gc", drive, "--collection", "cost-benefit")
    assert document["superblocks_collected"] >= 1
    assert document["free_superblocks"] > document["free_superblocks_before"]
    assert as_json("check", drive)[0] == 0


def test_info_and_stats(drive):
    """info and stats: write amplification by cause, wear and spare."""
    document = as_json("info", drive)[1]
    causes = {"host", "garbage_collection", "wear_levelling", "padding", "parity", "metadata"}
    assert set(document["waf"]) == causes | {"total", "lifetime"}
    assert document["flash"]["available_spare_percent"] == 100
    assert as_json("stats", drive)[1]["counters"]["waf"]["lifetime"] > 0.9
    for verb in ("info", "stats"):
        assert kvfsctl(verb, drive).returncode == 0
    assert "spare left" in kvfsctl("info", drive).stdout
    assert "garbage collection" in kvfsctl("stats", drive).stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("scrub", "/nonexistent/drive"), 1),
        (("wear", "/nonexistent/drive"), 1),
        (("gc", "/nonexistent/drive"), 1),
        (("check", "/nonexistent/drive", "--repair"), 1),
        (("check", "/dev/null"), 1),
        (("scrub", "/etc/passwd"), 1),
        (("gc", "x", "--superblocks", "0"), 2),
        (("gc", "x", "--collection", "lazy"), 2),
        (("wear", "x", "--plot", "wear.gif"), 2),
        (("format", "x", "--spare-percent", "0"), 2),
        (("format", "x", "--spare-percent", "51"), 2),
        (("scrub",), 2),
    ],
)
def test_bad_input(arguments, code):
    """One line and the right exit code, never a traceback."""
    result = kvfsctl(*arguments)
    assert result.returncode == code, result
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("kvfsctl: ")


def test_help_teaches():
    for verb, words in {
        "scrub": "parity",
        "wear": "--plot",
        "gc": "--superblocks",
        "check": "--repair",
        "format": "--parity",
    }.items():
        assert words in kvfsctl(verb, "--help").stdout
