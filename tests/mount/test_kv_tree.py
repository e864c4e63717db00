"""The KV cache through a mount, with the tools that people have: NumPy, cp, tar, rm, safetensors."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import kvfs

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 2, 2, 64
KEYS = "a/layer_01/kv_head_01/keys.npy"


def rows(num_tokens, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((NUM_LAYERS, num_tokens, NUM_KV_HEADS, HEAD_DIM)).astype(np.float16)


def append(sequence, keys):
    for layer in range(NUM_LAYERS):
        sequence.append(layer, keys[layer], -keys[layer])


@pytest.fixture
def mount(drive, drive_mount):
    """The mountpoint of a drive with sequence `a` of model `m`: keys rows(1000), values their negatives."""
    with kvfs.open(drive_mount.mountpoint) as store:
        model = store.add_model(
            "m", num_layers=NUM_LAYERS, num_query_heads=4, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM
        )
        append(store.create_sequence(model, "a"), rows(1000))
    return drive_mount.mountpoint


@pytest.fixture
def folder(mount):
    return mount / "kv" / "m"


def test_numpy(folder):
    """np.load, and a memory map: real NPY files, page by page from flash."""
    for head in range(NUM_KV_HEADS):
        path = folder / f"a/layer_00/kv_head_{head:02}"
        assert np.array_equal(np.load(path / "keys.npy"), rows(1000)[0, :, head])
        assert np.array_equal(np.load(path / "values.npy", mmap_mode="r"), -rows(1000)[0, :, head])


def test_reader_beside_a_writer(mount, folder):
    """Every look sees all tokens appended before it; what is open or mapped stays as it was, or is stale."""
    with kvfs.open(mount) as store, open(folder / KEYS, "rb") as opened:
        sequence = store.sequence("a")
        mapped = np.load(folder / KEYS, mmap_mode="r")
        for number in range(1, 20):
            append(sequence, rows(7, seed=number))
            found = np.load(folder / KEYS)
            assert found.shape == (1000 + 7 * number, HEAD_DIM)
            assert np.array_equal(found[-7:], rows(7, seed=number)[1, :, 1])
            assert os.stat(folder / KEYS).st_size == found.nbytes + 4096
        assert np.array_equal(mapped, rows(1000)[1, :, 1])
        assert np.array_equal(np.load(opened), rows(1000)[1, :, 1])
        sequence.truncate(10)
        assert np.load(folder / KEYS).shape == (10, HEAD_DIM)
        with pytest.raises(OSError) as error:
            os.open(f"/proc/self/fd/{opened.fileno()}", os.O_RDONLY)
        assert error.value.errno == errno.ESTALE


SLOW_SERVER = """
import time
from kvfs.sequence import Sequence
from kvfsctl.main import run

append = Sequence.append

def slow_append(self, *arguments):
    time.sleep(0.1)
    append(self, *arguments)

Sequence.append = slow_append
run()
"""


def test_what_was_posted_is_seen(drive, servers, tmp_path):
    """An append returns before the owner has taken it; whoever looks after that finds the tokens."""
    mount = tmp_path / "mount"
    servers([sys.executable, "-c", SLOW_SERVER, "mount", "--foreground", drive, mount], mount)
    queries = np.ones((1, 4, HEAD_DIM), np.float32)
    folder = mount / "kv/m/a"

    def lse():
        with open(folder / "layer_01/attend", "r+b") as file:
            np.save(file, queries)
            file.seek(0)
            return np.load(file), np.load(file)[0, 0]

    with kvfs.open(mount) as store, kvfs.open(mount) as other:
        model = store.add_model(
            "m", num_layers=NUM_LAYERS, num_query_heads=4, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM
        )
        sequence = store.create_sequence(model, "a")
        append(sequence, np.zeros_like(rows(1)))
        other_sequence = other.sequence("a")
        looks = (
            lambda: len(np.load(mount / "kv/m" / KEYS)),
            lambda: ((mount / "kv/m" / KEYS).stat().st_size - 4096) // (2 * HEAD_DIM),
            lambda: int(os.getxattr(folder, "user.kvfs.num_tokens")),
            lambda: json.loads((folder / "sequence.json").read_bytes())["num_tokens"],
            lambda: round(float(np.exp(lse()[1]))),  # of scores that are all 0
            lambda: other_sequence.num_tokens,
            lambda: other_sequence.version().num_tokens,
        )
        for number, look in enumerate(looks, 2):
            append(sequence, np.zeros_like(rows(1)))
            assert look() == number


def test_attend(mount, folder):
    """np.save the queries, np.load the answer twice; two open files at a time."""
    queries = np.random.default_rng(1).standard_normal((3, 4, HEAD_DIM)).astype(np.float32)
    with (
        open(folder / "a/layer_00/attend", "r+b") as first,
        open(folder / "a/layer_01/attend", "r+b") as second,
    ):
        for file in (first, second):
            np.save(file, queries)
        answers = []
        for file in (first, second):
            file.seek(0)
            answers.append((np.load(file), np.load(file)))
    with kvfs.open(mount) as store:
        for layer, (out, lse) in enumerate(answers):
            expected_out, expected_lse = store.attend(layer, queries[None], store.sequence("a"))
            assert np.array_equal(out, expected_out[0])
            assert np.array_equal(lse, expected_lse[0])
    with pytest.raises(OSError, match="Invalid argument"):
        (folder / "a/layer_00/attend").write_bytes(b"nonsense")


def test_cp_and_tar(folder, tmp_path):
    """A sequence's folder is copied and archived as any other, without complaints."""
    subprocess.run(["cp", "-r", folder / "a", tmp_path / "copy"], check=True)
    result = subprocess.run(
        ["tar", "-cf", tmp_path / "a.tar", "-C", folder, "a"], check=True, capture_output=True, text=True
    )
    assert result.stderr == ""
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "a.tar", "-C", tmp_path / "out"], check=True)
    for path in (tmp_path / "copy", tmp_path / "out" / "a"):
        assert np.array_equal(np.load(path / "layer_01/kv_head_01/keys.npy"), rows(1000)[1, :, 1])


def test_safetensors(folder, tmp_path):
    """Read in place; written in place, though the library writes under another name first."""
    with safetensors.safe_open(folder / "a/sequence.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("layer_01.keys"), rows(1000)[1].transpose(1, 0, 2))
    keys = np.ascontiguousarray(rows(300, seed=2).transpose(0, 2, 1, 3))
    tensors = {f"layer_{layer:02}.{kind}": keys[layer] for layer in range(2) for kind in ("keys", "values")}
    safetensors.numpy.save_file(tensors, folder / "b.safetensors")
    assert np.array_equal(np.load(folder / "b/layer_00/kv_head_00/values.npy"), keys[0, 0])
    assert sorted(os.listdir(folder)) == ["a", "b", "model.json"]


def test_import_and_fork_with_cp(mount, folder, tmp_path):
    """cp out and in is a copy, cp within the mount a fork; a bad file fails cp and leaves nothing."""
    exported = tmp_path / "x.safetensors"
    subprocess.run(["cp", folder / "a/sequence.safetensors", exported], check=True)
    subprocess.run(["cp", exported, folder / "copy.safetensors"], check=True)
    subprocess.run(["sh", "-c", f"cat {exported} > {folder}/shell.safetensors"], check=True)
    before = shutil.disk_usage(mount).used
    subprocess.run(["cp", folder / "a/sequence.safetensors", folder / "fork.safetensors"], check=True)
    assert shutil.disk_usage(mount).used - before < exported.stat().st_size / 2
    for name in ("copy", "shell", "fork"):
        assert (folder / name / "sequence.safetensors").read_bytes() == exported.read_bytes()
    os.truncate(exported, exported.stat().st_size - 1)
    result = subprocess.run(["cp", exported, folder / "cut.safetensors"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "Invalid argument" in result.stderr
    assert sorted(os.listdir(folder)) == ["a", "copy", "fork", "model.json", "shell"]


def test_rm_mv_mkdir(folder):
    """Sequences are made, renamed and removed as folders are."""
    (folder / "new").mkdir(mode=0o700)
    assert (folder / "new").stat().st_mode & 0o777 == 0o700
    subprocess.run(["mv", "-T", folder / "a", folder / "z"], check=True)
    assert (folder / "z" / "sequence.json").exists()
    result = subprocess.run(["mv", "-T", folder / "z", folder / "new"], capture_output=True)
    assert result.returncode == 1
    subprocess.run(["rm", "-r", folder / "z", folder / "new"], check=True)
    assert os.listdir(folder) == ["model.json"]


def test_protection(folder):
    """Another user gets in where the mode lets them, and nowhere else."""
    folder_of_a = folder / "a"
    os.setxattr(folder_of_a, "user.kvfs.tenant", b"t")
    assert os.getxattr(folder_of_a, "user.kvfs.num_tokens") == b"1000"
    with pytest.raises(OSError, match="Invalid argument"):
        os.setxattr(folder_of_a, "user.kvfs.ttl", b"soon")
    os.chmod(folder_of_a, 0o700)
    assert (folder / KEYS).stat().st_mode & 0o777 == 0o400
    with pytest.raises(PermissionError):
        (folder / KEYS).write_bytes(b"x")


def test_verbs_on_a_mount(mount, kvfsctl, tmp_path):
    """fork, mv, export, import and tree work on what is mounted as on a drive's file."""
    kvfsctl("fork", mount, "a", "b", check=True)
    kvfsctl("mv", mount, "b", "c", check=True)
    kvfsctl("export", mount, "c", tmp_path / "c.safetensors", check=True)
    kvfsctl("import", mount, tmp_path / "c.safetensors", "--name", "d", check=True)
    assert "d  1,000 tokens" in kvfsctl("tree", mount, check=True).stdout
    assert (tmp_path / "c.safetensors").read_bytes() == (mount / "kv/m/d/sequence.safetensors").read_bytes()
