"""What the files of a sequence hold."""

import errno
import io
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from prometheus_client.parser import text_string_to_metric_families

import kvfs
from kvfs.kv_tree.tree import SEEK_DATA, SEEK_HOLE, KvTree
from tests.unit.kvfs.conftest import add_model, random_kv, random_queries
from tests.unit.kvfs.kv_tree.client import ME, Client, errno_of
from tests.unit.kvfs.kv_tree.conftest import append, stored

KEYS = "kv/m/a/layer_01/kv_head_01/keys.npy"


def same_bits(found, wanted):
    return found.shape == wanted.shape and np.array_equal(found.view(np.uint8), wanted.view(np.uint8))


def test_npy_files(client, sequence):
    """Every head of every layer: its own rows, those on flash and those in the tail."""
    for layer in range(2):
        for head in range(2):
            for kind, name in enumerate(("keys", "values")):
                found = client.load(f"kv/m/a/layer_{layer:02}/kv_head_{head:02}/{name}.npy")
                assert same_bits(found, stored(sequence, layer, kind, head))
    assert np.array_equal(client.load("kv/m/a/tokens.npy"), np.arange(700))


@pytest.mark.parametrize("piece_bytes", [1, 127, 4096, 4097, 1 << 20])
def test_pieces(client, sequence, piece_bytes):
    """Reads at any offset: rows, pages and groups are borders inside a read."""
    sequence.truncate(300)
    for path in (KEYS, "kv/m/a/sequence.safetensors", "kv/m/a/tokens.npy"):
        step = max(piece_bytes, 997) if piece_bytes == 127 else piece_bytes
        if piece_bytes == 1:
            whole, handle = client.read(path), client.open(path)
            for at in (0, 4095, 4096, 4097, 4096 + 127, 4096 + 128, len(whole) - 1):
                assert bytes(client.tree.read(handle, at, 1)) == whole[at : at + 1]
        else:
            assert client.read(path, step) == client.read(path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_pages_with_slack(store, dtype, head_dim):
    """head_dim 96: pages end in slack, which is none of the file's."""
    model = add_model(store, dtype, "odd", head_dim=head_dim)
    sequence = store.create_sequence(model, "s")
    for layer in range(2):
        sequence.append(layer, *random_kv(600, layer, head_dim=head_dim))
    client = Client(KvTree(store))
    for layer, kind, head in ((0, 0, 0), (1, 1, 1)):
        path = f"kv/odd/s/layer_{layer:02}/kv_head_{head:02}/{('keys', 'values')[kind]}.npy"
        for piece_bytes in (5_000, 1 << 20):
            found = client.load(path, piece_bytes=piece_bytes)
            assert same_bits(found, stored(sequence, layer, kind, head))


def test_bfloat16(client, store):
    """NPY does not know it: two opaque bytes, which ml_dtypes views, and BF16 in safetensors."""
    sequence = store.create_sequence(store.model("bf"), "s")
    append(sequence, 10)
    found = client.load("kv/bf/s/layer_00/kv_head_00/keys.npy")
    assert found.dtype == np.dtype("V2")
    assert same_bits(found.view(ml_dtypes.bfloat16), stored(sequence, 0, 0, 0))
    assert json.loads(client.read("kv/bf/s/sequence.json"))["npy_dtype"] == "<V2"
    tensors = dict(safetensors.deserialize(client.read("kv/bf/s/sequence.safetensors")))
    tensor = tensors["layer_01.values"]
    assert (tensor["dtype"], tensor["shape"]) == ("BF16", [2, 10, 64])
    found = np.frombuffer(tensor["data"], ml_dtypes.bfloat16).reshape(2, 10, 64)
    assert same_bits(found[1], stored(sequence, 1, 1, 1))


def test_header_fills_a_page(client, sequence):
    """Rows that do not begin on a page are not aligned in a memory map."""
    data = client.read(KEYS)
    file = io.BytesIO(data)
    np.load(file)
    assert len(data) - 700 * 64 * 2 == 4096


def test_safetensors(client, sequence, tmp_path):
    """The library reads it, from a file too: its rules of headers and offsets."""
    path = tmp_path / "s.safetensors"
    path.write_bytes(client.read("kv/m/a/sequence.safetensors"))
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["model"] == "m"
        assert int(file.metadata()["head_dim"]) == 64
        for layer in range(2):
            keys, values = sequence.read(layer)
            assert same_bits(file.get_tensor(f"layer_{layer:02}.keys"), np.moveaxis(keys, 0, 1).copy())
            assert same_bits(file.get_tensor(f"layer_{layer:02}.values"), np.moveaxis(values, 0, 1).copy())
        assert np.array_equal(file.get_tensor("tokens"), np.arange(700))


def test_empty_sequence(client, store):
    """No tokens: arrays of length zero, not errors."""
    store.create_sequence(store.model("m"), "empty")
    assert client.load("kv/m/empty/layer_00/kv_head_00/keys.npy").shape == (0, 64)
    assert client.load("kv/m/empty/tokens.npy").shape == (0,)
    tensors = safetensors.numpy.load(client.read("kv/m/empty/sequence.safetensors"))
    assert tensors["layer_00.keys"].shape == (2, 0, 64)


def test_json(client, sequence):
    """model.json and sequence.json say what the arrays are."""
    model = json.loads(client.read("kv/m/model.json"))
    assert (model["name"], model["num_layers"], model["dtype"]) == ("m", 2, "float16")
    facts = json.loads(client.read("kv/m/a/sequence.json"))
    assert (facts["num_tokens"], facts["num_token_ids"], facts["npy_header_bytes"]) == (700, 700, 4096)


# snapshots


def test_open_file_is_a_snapshot(client, sequence):
    """A reader whose file grows under it reads a header that does not fit its rows."""
    before = client.read(KEYS)
    attributes, handle = client.walk(KEYS), client.open(KEYS)
    append(sequence, 100, seed=5)
    assert client.read_handle(handle, attributes.size) == before
    assert len(client.tree.read(handle, attributes.size, 100)) == 0
    assert client.tree.attributes(attributes.inode).size == len(before)
    after = client.walk(KEYS)
    assert after.inode != attributes.inode
    assert after.size == attributes.size + 100 * 64 * 2
    assert client.load(KEYS).shape == (800, 64)


def test_looked_up_again_is_the_same(client, sequence):
    """An inode that changes without need: cached pages are lost, and tar reports a changed file."""
    first, second = client.walk(KEYS), client.walk(KEYS)
    assert first == second
    sequence.flush()
    assert client.walk(KEYS) == first


def test_layers_of_a_forward_pass(client, sequence):
    """Tokens that one layer has and another not yet are not shown."""
    before = client.walk(KEYS)
    sequence.append(1, *random_kv(10))
    assert client.walk(KEYS).size == before.size
    sequence.append(0, *random_kv(10))
    assert client.walk(KEYS).size > before.size


def test_truncation(client, sequence):
    """Tokens cut off are gone for open files too; a cut beyond a snapshot does not touch it."""
    handle, size = client.open(KEYS), client.walk(KEYS).size
    others = [client.open(f"kv/m/a/{name}") for name in ("sequence.safetensors", "tokens.npy")]
    whole = client.read(KEYS)
    append(sequence, 10, seed=5)
    sequence.truncate(705)
    assert client.read_handle(handle, size) == whole
    sequence.truncate(699)
    append(sequence, 10, seed=7)
    for each in (handle, *others):
        assert errno_of(client.tree.read, each, 4096, 100_000) == errno.ESTALE
    assert client.load(KEYS).shape == (709, 64)


def test_deletion(client, sequence, store):
    """A sequence of the same name and number is another one: nothing of the old one leads to it."""
    attributes, handle = client.walk(KEYS), client.open(KEYS)
    folder = client.walk("kv/m/a")
    store.delete_sequence("a")
    again = store.create_sequence(store.model("m"), "a")
    append(again, 700, seed=9)
    assert errno_of(client.tree.read, handle, 0, 100_000) == errno.ESTALE
    assert errno_of(client.tree.open, attributes.inode, os.O_RDONLY, ME) == errno.ESTALE
    assert errno_of(client.tree.lookup, folder.inode, b"layer_00") in (errno.ENOENT, errno.ESTALE)
    assert client.walk("kv/m/a").inode != folder.inode
    assert client.walk(KEYS).inode != attributes.inode
    assert same_bits(client.load(KEYS), stored(again, 1, 0, 1))


# attend


def ask(client, queries, path="kv/m/a/layer_00/attend"):
    handle = client.open(path, os.O_RDWR)
    question = io.BytesIO()
    np.save(question, queries)
    data = question.getvalue()
    for at in range(0, len(data), 1000):
        client.tree.write(handle, at, data[at : at + 1000])
    answer = io.BytesIO(bytes(client.tree.read(handle, 0, 1 << 20)))
    return np.load(answer), np.load(answer)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, ">f4"])
def test_attend(client, sequence, store, dtype):
    """The file gives what the API gives."""
    sequence.flush()  # what is on its way to flash would be the host's now and the drive's then
    queries = random_queries(num_queries=3)[0].astype(dtype)
    out, lse = ask(client, queries)
    expected_out, expected_lse = store.attend(0, queries[None], sequence)
    assert np.array_equal(out, expected_out[0])
    assert np.array_equal(lse, expected_lse[0])


def test_attend_handles_are_independent(client, sequence, store):
    """Two processes at one file: each its own question, in any order, and one after another."""
    first, second = random_queries(seed=1)[0], random_queries(seed=2, num_queries=2)[0]
    handles = [client.open("kv/m/a/layer_01/attend", os.O_RDWR) for _ in range(2)]
    for handle, queries in zip(handles, (first, second), strict=True):
        question = io.BytesIO()
        np.save(question, queries)
        client.tree.write(handle, 0, question.getvalue())
    for handle, queries in zip(handles, (first, second), strict=True):
        answer = io.BytesIO(bytes(client.tree.read(handle, 0, 1 << 20)))
        expected = store.attend(1, queries[None], sequence)[0][0]
        # what has reached the flash meanwhile is the drive's part, not the host's: sums of another order
        np.testing.assert_allclose(np.load(answer), expected, atol=1e-6)
    question = io.BytesIO()
    np.save(question, second)
    client.tree.write(handles[0], 0, question.getvalue())
    assert np.load(io.BytesIO(bytes(client.tree.read(handles[0], 0, 1 << 20)))).shape == second.shape


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "question",
    [
        b"not an array at all",
        npy(np.zeros((1, 8, 32), np.float32)),
        npy(np.zeros((8, 64), np.float32)),
        npy(np.zeros((1, 8, 64), np.int32)),
        npy(np.zeros((0, 8, 64), np.float32)),
        npy(np.zeros((1, 8, 64), np.float32)) + b"more",
        npy(np.zeros((1, 8, 64), np.float32)).replace(b"(1, 8, 64)", b"(-1,8, 64)"),
        npy(np.zeros((1, 8, 64), np.float32)).replace(b"(1, 8, 64)", b"(9**9,3,4)"),
        npy(np.zeros((1, 8, 64), np.float32)).replace(b"'<f4'", b"'O'  "),
    ],
)
def test_bad_questions(client, sequence, question):
    """A malformed batch is EINVAL where it is written, and the next one is answered."""
    handle = client.open("kv/m/a/layer_00/attend", os.O_RDWR)
    assert errno_of(client.tree.write, handle, 0, question) == errno.EINVAL
    assert client.tree.read(handle, 0, 10) == b""
    client.tree.write(handle, 0, npy(random_queries()[0]))
    assert len(client.tree.read(handle, 0, 10)) == 10


def test_unfinished_question(client, sequence):
    """Read or closed too early: EINVAL, not an old answer and not silence."""
    handle = client.open("kv/m/a/layer_00/attend", os.O_RDWR)
    for end in (lambda: client.tree.read(handle, 0, 10), lambda: client.tree.flush(handle)):
        client.tree.write(handle, 0, npy(random_queries()[0])[:200])
        assert errno_of(end) == errno.EINVAL
    assert client.tree.read(handle, 0, 10) == b""
    assert errno_of(client.tree.write, handle, 77, b"a hole before") == errno.EINVAL


def test_attend_of_nothing(client, store):
    """An empty sequence has its own errno; more queries than tokens are malformed."""
    sequence = store.create_sequence(store.model("m"), "a")
    handle = client.open("kv/m/a/layer_00/attend", os.O_RDWR)
    assert errno_of(client.tree.write, handle, 0, npy(random_queries()[0])) == errno.ENODATA
    append(sequence, 2)
    assert errno_of(client.tree.write, handle, 0, npy(random_queries(num_queries=3)[0])) == errno.EINVAL


# .kvfs, and what is common


def test_control_files(client, sequence, store):
    """stats.json is JSON, metrics are lines that Prometheus takes."""
    assert set(json.loads(client.read(".kvfs/stats.json"))) >= {"flash", "space", "waf"}
    families = list(text_string_to_metric_families(client.read(".kvfs/metrics").decode()))
    assert families and all(family.name.startswith("kvfs_") for family in families)
    assert client.names(".kvfs") == ["stats.json", "metrics"]
    inviting = Client(KvTree(store, invite=lambda caller: b"user %d" % caller.uid))
    handle = inviting.open(".kvfs/connect")
    assert bytes(inviting.tree.read(handle, 0, 100)) == b"user %d" % os.getuid()
    assert "connect" in inviting.names(".kvfs")


def test_read_only(client, sequence):
    """root passes the kernel's check of permissions: virtual files cannot be written all the same."""
    for path in (KEYS, "kv/m/model.json", "kv/m/a/sequence.safetensors", ".kvfs/metrics"):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
            assert errno_of(client.open, path, flags) == errno.EACCES
    handle = client.open(KEYS)
    assert errno_of(client.tree.write, handle, 0, b"x") == errno.EBADF
    assert errno_of(client.tree.allocate, handle, 0, 0, 1) == errno.EBADF


def test_seek(client, sequence):
    """cp asks where holes are: there are none."""
    handle, size = client.open(KEYS), client.walk(KEYS).size
    assert client.tree.seek(handle, 10, SEEK_DATA) == 10
    assert client.tree.seek(handle, 10, SEEK_HOLE) == size
    assert errno_of(client.tree.seek, handle, size, SEEK_DATA) == errno.ENXIO


def test_damage_is_an_error(path, client, sequence, store):
    """A page that was flipped on flash is EIO, never wrong numbers."""
    rows = stored(sequence, 1, 0, 1)[:8].tobytes()
    store.close()
    image = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(image.index(rows))
        file.write(b"\xde\xad\xbe\xef")
    with kvfs.open(path, cache_bytes="8MiB") as again:
        damaged = Client(KvTree(again))
        assert errno_of(damaged.read, KEYS) == errno.EIO
        assert damaged.load("kv/m/a/layer_00/kv_head_00/keys.npy").shape == (700, 64)
