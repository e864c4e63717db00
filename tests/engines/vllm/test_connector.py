"""vLLM with the connector says what it says without, whatever happened to the drive."""

import importlib.util
import json
import mmap
import random
import subprocess
import sys

import numpy as np
import pytest

import kvfs
from kvfs.mount.mountpoints import FUSE_DEVICE

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: pip install 'kvfs[vllm]'", allow_module_level=True)

BLOCK = 32
REASON = "of another model, dtype, block size, instruction set or version of vLLM"


def prompt(num_tokens, seed=0):
    choice = random.Random(seed)
    return [choice.randrange(1, 97) for _ in range(num_tokens)]


PROMPTS = [prompt(200), prompt(4 * BLOCK, seed=1), prompt(40, seed=2)]


def start(*jobs):
    """Jobs in a process of their own (see engine_process)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engines.vllm.engine_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(json.dumps(jobs))
    process.stdin.close()
    process.stdin = None
    return process


def answers_of(process, killed=False):
    output, log = process.communicate(timeout=240)
    assert (process.returncode == -9) if killed else (process.returncode == 0), log[-4000:]
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def engines(*jobs, killed=False):
    """The answers to jobs."""
    return answers_of(start(*jobs), killed)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny Llama of random weights."""
    from tests.engines.conftest import tiny

    path = tmp_path_factory.mktemp("model")
    tiny("Llama", max_position_embeddings=512).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """Trained further: the same configuration, other weights."""
    import torch

    from tests.engines.conftest import tiny

    path = tmp_path_factory.mktemp("other")
    network = tiny("Llama", max_position_embeddings=512)
    with torch.no_grad():
        network.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    network.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm") / "drive.kvfs"
    kvfs.format(path, size="128MiB")
    return str(path)


@pytest.fixture
def as_stored(first, drive, tmp_path):
    """A drive with the three prompts, which nobody has used since."""
    path = str(tmp_path / "copy.kvfs")
    subprocess.run(["cp", "--sparse=always", drive + ".copy", path], check=True)
    return path


@pytest.fixture(scope="module")
def first(model, drive):
    """Without a connector, and with one on an empty drive, which has all three prompts afterwards."""
    answers = engines(
        {"model": model, "prompts": PROMPTS, "tokens": 40},
        {"model": model, "prompts": PROMPTS, "tokens": 40, "drive": drive},
    )
    subprocess.run(["cp", "--sparse=always", drive, drive + ".copy"], check=True)
    return answers


def test_restart_and_other_engines(model, other_model, drive, first):
    """A restart that computes everything again, or one whose tokens differ, or that uses another model's KV."""
    plain, storing = first
    assert storing["tokens"] == plain["tokens"] and storing["cached"] == [0, 0, 0]
    same, extended, salted, narrow, trained, trained_plain, narrow_plain = engines(
        {"model": model, "prompts": PROMPTS, "tokens": 40, "drive": drive, "together": True},
        {"model": model, "prompts": [PROMPTS[0] + plain["tokens"][0]], "drive": drive},
        {"model": model, "prompts": PROMPTS[:1], "drive": drive, "salt": "another tenant", "tokens": 40},
        {"model": model, "prompts": PROMPTS[:1], "drive": drive, "engine": {"dtype": "bfloat16"}},
        {"model": other_model, "prompts": PROMPTS[:1], "drive": drive},
        {"model": other_model, "prompts": PROMPTS[:1]},
        {"model": model, "prompts": PROMPTS[:1], "engine": {"dtype": "bfloat16"}},
    )
    assert same["tokens"] == plain["tokens"]
    assert same["cached"] == [192, 4 * BLOCK, BLOCK]
    assert extended["cached"] == [224]  # what was generated is there, too
    assert salted["cached"] == [0] and salted["tokens"] == plain["tokens"][:1]
    (counted,) = extended["requests"]
    assert (counted["tenant"], counted["lookups"], counted["hits"]) == ("", 1, 1)
    (of_salt,) = [row for row in salted["requests"] if row["tenant"].startswith("salt ")]
    assert (of_salt["misses"], of_salt["miss_absent"], of_salt["tokens_found"]) == (1, 1, 0)
    assert "another tenant" not in str(salted["requests"])
    for other, without in ((narrow, narrow_plain), (trained, trained_plain)):
        assert other["tokens"] == without["tokens"] and other["cached"] == [0]
        assert sum(REASON in line for line in other["log"]) == 1
        (row,) = other["requests"]
        assert (row["misses"], row["miss_identity"], row["tokens_wanted"]) == (1, 1, 192)
        assert other["usage"]["misses"]["identity"] == 2  # of two heads


def flip(path, page):
    """Change a bit of a page in a drive's file."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as flash:
        offset = flash.find(page)
        assert offset > 0
        flash[offset + 99] ^= 4


def test_damage(model, first, as_stored):
    """A flipped bit that becomes text, or an error where a miss would do."""
    with kvfs.open(as_stored) as store:
        cache = store.object_cache("vllm", first[1]["identity"])
        key = list(cache.keys())[4]  # as they were stored: two heads of each block
        content = np.empty(cache.sizes([key])[0], np.uint8)
        assert cache.get([key], [content]) == [True]
    flip(as_stored, content.tobytes()[:4096])
    job = {"model": model, "prompts": PROMPTS[:1], "tokens": 40, "drive": as_stored}
    again, healed = engines(job, job)
    assert again["tokens"] == healed["tokens"] == first[0]["tokens"][:1]
    damaged = [one["usage"]["misses"]["damaged"] for one in (again, healed)]
    assert damaged[0] == 1 and damaged[1] in (0, 1)  # the second engine may have been given the same store
    assert any("lost meanwhile" in line for line in again["log"])
    assert healed["cached"] == [192] and not any("lost" in line for line in healed["log"])


def test_full_drive(model, first, tmp_path):
    """A drive without room ends no generation, and says so once."""
    path = tmp_path / "full.kvfs"
    kvfs.format(path, size="64MiB")
    with kvfs.open(path) as store:
        model_there = store.add_model("m", num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=64)
        sequence = store.create_sequence(model_there, "all")
        for num_tokens in (1 << 15, 1 << 12, 256):
            chunk = np.zeros((num_tokens, 1, 64), np.float16)
            with pytest.raises(kvfs.errors.OutOfSpace):
                while True:
                    sequence.append(0, chunk, chunk)
    full, capped = engines(
        {"model": model, "prompts": PROMPTS, "tokens": 40, "drive": str(path)},
        {"model": model, "prompts": PROMPTS, "tokens": 40, "drive": str(path), "extra": {"capacity": "4KiB"}},
    )
    for one in (full, capped):
        assert one["tokens"] == first[0]["tokens"]
        assert sum("not stored" in line for line in one["log"]) == 1


def test_killed_while_storing(model, first, tmp_path):
    """Half of a block's heads, or half an object, that the next engine takes for whole."""
    path = tmp_path / "killed.kvfs"
    job = {"model": model, "prompts": PROMPTS, "tokens": 40, "drive": str(path), "extra": {"size": "128MiB"}}
    engines({**job, "kill_after": 2}, killed=True)
    (after,) = engines(job)
    assert after["tokens"] == first[0]["tokens"]


@pytest.mark.skipif(not FUSE_DEVICE.exists(), reason=f"{FUSE_DEVICE} is not there")
def test_two_engines_on_one_mount(model, first, tmp_path):
    """Two engines that store and load the same blocks at once: each has its own tokens."""
    path, mountpoint = tmp_path / "shared.kvfs", tmp_path / "mount"
    kvfs.format(path, size="128MiB")
    mountpoint.mkdir()
    subprocess.run([sys.executable, "-m", "kvfsctl", "mount", path, mountpoint], check=True)
    job = {"model": model, "prompts": PROMPTS, "tokens": 40, "drive": str(mountpoint)}
    try:
        both = [start(job, {**job, "together": True}) for _ in range(2)]
        for process in both:
            cold, warm = answers_of(process)
            assert cold["tokens"] == warm["tokens"] == first[0]["tokens"]
            assert warm["cached"] == [192, 4 * BLOCK, BLOCK]
    finally:
        subprocess.run([sys.executable, "-m", "kvfsctl", "umount", mountpoint], check=True)


def test_refusals(model, drive, tmp_path):
    """Configurations that would be wrong, or that nobody has tried, end in one line."""
    refused = engines(
        {"model": model, "prompts": [], "drive": drive, "extra": {"capcity": "1GiB"}},
        {"model": model, "prompts": [], "drive": drive, "engine": {"prefix_caching_hash_algo": "xxhash"}},
        {"model": model, "prompts": [], "drive": str(tmp_path / "nothing.kvfs")},
    )
    assert "given: ['capcity', 'path']" in refused[0]["error"]
    assert "does not support prefix_caching_hash_algo=xxhash" in refused[1]["error"]
    assert "nothing.kvfs" in refused[2]["error"]


def test_attention_on_the_drive(model, drive, first):
    """Decoding on the drive says what vLLM's own kernels say, alone and in batches with prompts among them."""
    together = {"model": model, "prompts": PROMPTS * 2, "tokens": 40, "together": True}
    together["engine"] = {"enable_prefix_caching": False, "max_num_seqs": 4, "max_num_batched_tokens": 96}
    own, alone, batch, caching = engines(
        together,
        {**together, "prompts": PROMPTS, "together": False, "attention": drive},
        {**together, "attention": drive},
        {**together, "attention": drive, "engine": {}},
    )
    assert alone["tokens"] == first[0]["tokens"] and alone["sequences"] >= 1
    assert batch["tokens"] == own["tokens"] == first[0]["tokens"] * 2
    assert "does not support prefix caching" in caching["error"]
