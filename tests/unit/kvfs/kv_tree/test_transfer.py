"""Sequences in and out as safetensors files, forks by copying, models by writing their JSON."""

import errno
import json
import os

import numpy as np
import pytest
import safetensors.numpy

import kvfs
from kvfs.errors import InvalidArgument, OutOfSpace, SequenceExists
from kvfs.kv_tree.folders import MAX_UPLOADS
from kvfs.kv_tree.transfer import export_sequence, import_sequence, model_of_file
from kvfs.kv_tree.tree import KvTree
from kvfs.sequence_attributes import IMPORTING
from tests.unit.kvfs.conftest import add_model
from tests.unit.kvfs.kv_tree.client import ME, Client, errno_of
from tests.unit.kvfs.kv_tree.conftest import append

SAFETENSORS = "kv/m/a/sequence.safetensors"


@pytest.fixture
def exported(client, sequence):
    return client.read(SAFETENSORS)


def same_sequences(first, second):
    for layer in range(2):
        for a, b in zip(first.read(layer), second.read(layer), strict=True):
            if not np.array_equal(a.view(np.uint16), b.view(np.uint16)):
                return False
    return np.array_equal(first.tokens, second.tokens)


def test_export_and_import(store, sequence, client, exported, tmp_path):
    """What comes out goes in, by the API as by the tree."""
    path = tmp_path / "a.safetensors"
    steps = []
    with path.open("wb") as file:
        size = export_sequence(sequence, file, lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == exported
    assert steps[-1] == (size, size)
    with path.open("rb") as file:
        assert model_of_file(store, file).name == "m"
        copy = import_sequence(store, store.model("m"), "copy", file, {"user.from": b"a"})
    assert same_sequences(copy, sequence)
    assert copy.attributes() == {"user.from": b"a"}


def test_import_into_another_drive(exported, tmp_path):
    """The file says what its model is: a drive that has never seen it makes it."""
    (tmp_path / "a.safetensors").write_bytes(exported)
    kvfs.format(tmp_path / "other.kvfs", "48MiB")
    with kvfs.open(tmp_path / "other.kvfs", cache_bytes="8MiB") as store:
        with (tmp_path / "a.safetensors").open("rb") as file:
            model = model_of_file(store, file)
            assert import_sequence(store, model, "a", file).num_tokens == 700
        assert (model.name, model.num_query_heads, model.dtype) == ("m", 8, "float16")
        assert Client(KvTree(store)).read(SAFETENSORS) == exported


def test_copy_into_a_model(client, store, sequence, exported):
    """cp x.safetensors kv/m/: a sequence x, durable once cp has closed the file."""
    client.write("kv/m/b.safetensors", exported)
    assert same_sequences(store.sequence("b"), sequence)
    assert client.names("kv/m") == ["model.json", "a", "b"]
    assert not store.sequence("b")._dirty and store._catalogue.is_durable
    assert client.walk("kv/m/b").uid == os.getuid()


def test_written_in_any_order(client, store, sequence, exported):
    """The kernel writes cached pages back in whatever order."""
    handle = client.create("kv/m/b.safetensors")
    for at in reversed(range(0, len(exported), 4096)):
        client.tree.write(handle, at, exported[at : at + 4096])
    client.tree.sync(handle, False)
    assert same_sequences(store.sequence("b"), sequence)
    client.tree.flush(handle)
    assert errno_of(client.tree.write, handle, 0, b"x") == errno.ESTALE
    client.tree.release(handle)


def test_shell_redirection(client, store, exported):
    """A shell closes a copy of the descriptor before anything is written: no reason to fail."""
    handle = client.create("kv/m/b.safetensors")
    client.tree.flush(handle)
    client.tree.write(handle, 0, exported)
    client.tree.flush(handle)
    assert store.sequence("b").num_tokens == 700


def test_other_writers(client, store):
    """A file of the library's own making, without metadata, with tensors in its own order."""
    keys = np.arange(2 * 5 * 64, dtype=np.float16).reshape(2, 5, 64)
    tensors = {f"layer_{layer:02}.{kind}": keys + layer for layer in range(2) for kind in ("keys", "values")}
    client.write("kv/m/b.safetensors", safetensors.numpy.save(tensors))
    sequence = store.sequence("b")
    assert np.array_equal(sequence.read(1)[1], np.moveaxis(keys + 1, 0, 1))
    assert len(sequence.tokens) == 0


def header_of(exported):
    length = int.from_bytes(exported[:8], "little")
    return json.loads(exported[8 : 8 + length]), exported[8 + length :]


def with_header(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def changed(exported, **changes):
    """The file with other facts of tensor layer_00.keys, or of the metadata."""
    header, data = header_of(exported)
    for name, value in changes.items():
        of_tensor = name in header["layer_00.keys"] or name not in header["__metadata__"]
        where = header["layer_00.keys" if of_tensor else "__metadata__"]
        where[name] = value
    return with_header(header, data)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int4"])
def test_quantized_models_export_rows(client, store, dtype):
    """float16 rows come out of a quantized model, and go into it and into a float16 one."""
    model = add_model(store, "int8", name="m8")
    sequence = store.create_sequence(model, "a")
    append(sequence, 1100)
    exported = client.read("kv/m8/a/sequence.safetensors")
    add_model(store, dtype, name="other")
    if dtype == "float32":
        assert errno_of(client.write, "kv/other/b.safetensors", exported) == errno.EINVAL
        return
    client.write("kv/other/b.safetensors", exported)
    for layer in range(2):
        for have, want in zip(store.sequence("b").read(layer), sequence.read(layer), strict=True):
            assert have.dtype == want.dtype == np.float16
            assert np.abs(have - want).max() < (0.5 if dtype == "int4" else 0.05)
    assert np.array_equal(store.sequence("b").tokens, np.arange(1100))


BAD_FILES = {
    "too short": lambda file: b"abc",
    "no safetensors": lambda file: b"not a safetensors file at all",
    "header cut off": lambda file: file[:100],
    "data cut off": lambda file: file[:-1],
    "header no JSON": lambda file: (20).to_bytes(8, "little") + b"x" * 1000,
    "header no object": lambda file: with_header([1, 2], b""),
    "deep header": lambda file: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "no tensors": lambda file: with_header({}, b""),
    "wrong dtype": lambda file: changed(file, dtype="BF16"),
    "unknown dtype": lambda file: changed(file, dtype="F4"),
    "wrong shape": lambda file: changed(file, shape=[2, 700, 32]),
    "odd shape": lambda file: changed(file, shape="abc"),
    "negative": lambda file: changed(file, shape=[2, -700, -64]),
    "beyond the end": lambda file: changed(file, data_offsets=[1 << 50, (1 << 50) + 2 * 700 * 64 * 2]),
    "other head count": lambda file: changed(file, num_query_heads="4"),
    "metadata no strings": lambda file: changed(file, num_layers=2),
    "one tensor more": lambda file: with_header(
        {**header_of(file)[0], "layer_02.keys": header_of(file)[0]["layer_00.keys"]}, header_of(file)[1]
    ),
    "float tokens": lambda file: with_header(
        {**header_of(file)[0], "tokens": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        header_of(file)[1],
    ),
}


@pytest.mark.parametrize("damage", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(client, store, exported, damage, caplog):
    """EINVAL at close with one line that says why; nothing half imported stays, and the name is free."""
    folder = client.inode("kv/m")
    assert errno_of(client.write, "kv/m/b.safetensors", damage(exported)) == errno.EINVAL
    assert len(caplog.records) == 1 and "\n" not in caplog.text.strip()
    assert client.names("kv/m") == ["model.json", "a"]
    assert errno_of(client.tree.lookup, folder, b"b.safetensors") == errno.ENOENT
    client.write("kv/m/b.safetensors", exported)
    assert client.read("kv/m/b/sequence.safetensors") == exported


def test_name_is_taken(client, sequence, exported):
    """EEXIST at close, and the sequence that has the name is as it was."""
    assert errno_of(client.write, "kv/m/a.safetensors", exported) == errno.EEXIST
    assert client.read(SAFETENSORS) == exported


def test_no_space(client, store, sequence, exported, tmp_path):
    """A drive that becomes full: ENOSPC, what was taken is given back."""
    header, _ = header_of(exported)
    num_tokens = 100_000
    names = [f"layer_{layer:02}.{kind}" for layer in range(2) for kind in ("keys", "values")]
    for number, name in enumerate(names):
        size = 2 * num_tokens * 64 * 2
        header[name] |= {"shape": [2, num_tokens, 64], "data_offsets": [number * size, (number + 1) * size]}
    del header["tokens"]
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(with_header(header, b""))
        file.truncate(file.tell() + 4 * size)
    store.flush()
    free = store.counters()["space"]["free_bytes"]
    with path.open("rb") as file, pytest.raises(OutOfSpace):
        import_sequence(store, store.model("m"), "b", file)
    store.flush()
    assert store.counters()["space"]["free_bytes"] == free
    assert client.names("kv/m") == ["model.json", "a"]


def test_crash_while_importing(path, store, client, exported, tmp_path):
    """A process killed in the middle: who opens the drive next finds nothing of it, and no block lost."""
    (tmp_path / "a.safetensors").write_bytes(exported)

    def stop(done, total):
        if done == total:
            store.flush()  # as another user of the store may do at any time
            raise KeyboardInterrupt

    deleted = []
    store.delete_sequence, delete = deleted.append, store.delete_sequence
    with (tmp_path / "a.safetensors").open("rb") as file, pytest.raises(KeyboardInterrupt):
        import_sequence(store, store.model("m"), "b", file, progress=stop)
    store.delete_sequence = delete
    assert deleted == ["b"] and store.sequence("b").num_tokens == 700
    assert IMPORTING in store.sequence("b").attributes()
    store.close()
    with kvfs.open(path, cache_bytes="8MiB") as again:
        assert [row.name for row in again.catalogue_rows()] == ["a"]
        assert again.check() == []


def test_deleted_while_importing(store, client, exported, tmp_path):
    """Whoever removes the sequence meanwhile ends the import, and is not undone by it."""
    (tmp_path / "a.safetensors").write_bytes(exported)
    with (tmp_path / "a.safetensors").open("rb") as file, pytest.raises(InvalidArgument):
        import_sequence(store, store.model("m"), "b", file, progress=lambda done, total: delete_once(store))
    assert [row.name for row in store.catalogue_rows()] == ["a"]


def delete_once(store):
    if "b" in [row.name for row in store.catalogue_rows()]:
        store.delete_sequence("b")


def test_two_at_once(client, exported):
    """The second of one name has nothing to create."""
    first = client.create("kv/m/b.safetensors")
    file, _ = client.tree.create(*client.place("kv/m/b.safetensors"), 0o644, os.O_WRONLY, ME)
    flags = os.O_WRONLY | os.O_EXCL
    assert errno_of(client.tree.create, *client.place("kv/m/b.safetensors"), 0o644, flags, ME) == errno.EEXIST
    client.tree.write(first, 0, exported[:1000])
    client.tree.write(file.handle, 1000, exported[1000:])
    client.tree.release(first)
    client.tree.flush(file.handle)
    client.tree.release(file.handle)
    assert client.read("kv/m/b/sequence.safetensors") == exported


def test_an_upload_is_a_file_meanwhile(client, exported):
    """ls, stat, truncate, rm of what is being written; gone without a trace if it is never finished."""
    handle = client.create("kv/m/b.safetensors")
    client.tree.write(handle, 0, exported)
    assert "b.safetensors" in client.names("kv/m")
    assert client.walk("kv/m/b.safetensors").size == len(exported)
    assert client.tree.read(handle, 8, 10) == exported[8:18]
    client.tree.unlink(*client.place("kv/m/b.safetensors"))
    assert errno_of(client.walk, "kv/m/b.safetensors") == errno.ENOENT
    client.tree.flush(handle)
    client.tree.release(handle)
    assert client.names("kv/m") == ["model.json", "a"]


def test_written_under_another_name(client, store, sequence, exported):
    """rsync and the safetensors library write .NAME and rename it: it is taken in then."""
    folder, rename = client.inode("kv/m"), client.tree.rename
    client.write("kv/m/.tmpAbC", exported)
    assert client.names("kv/m") == ["model.json", "a", ".tmpAbC"]
    assert client.walk("kv/m/.tmpAbC").size == len(exported)
    for target in ((folder, b"b"), (folder, b".other"), (client.inode("kv/bf"), b"b.safetensors")):
        assert errno_of(rename, folder, b".tmpAbC", *target, 0) == errno.EPERM
    assert errno_of(rename, folder, b".tmpAbC", folder, b"a.safetensors", 0) == errno.EEXIST
    rename(folder, b".tmpAbC", folder, b"b.safetensors", 0)
    assert client.names("kv/m") == ["model.json", "a", "b"]
    assert same_sequences(store.sequence("b"), sequence)
    client.write("kv/.tmp", client.read("kv/m/model.json"))
    rename(client.inode("kv"), b".tmp", client.inode("kv"), b"new.json", 0)
    assert client.names("kv") == ["bf", "m", "new"]


def test_files_that_wait_are_counted(client):
    """Files that are never renamed must not fill the disk that they wait on without anyone noticing."""
    for number in range(MAX_UPLOADS):
        client.write(f"kv/m/.{number}", b"x")
    assert errno_of(client.create, "kv/m/.more") == errno.ENOSPC
    client.tree.unlink(*client.place("kv/m/.7"))
    client.write("kv/m/.more", b"x")


# forks


def copy_in_pieces(client, source, target, size, piece_bytes):
    copied = 0
    while count := client.tree.copy_range(source, copied, target, copied, min(piece_bytes, size)):
        copied += count
    return copied


@pytest.mark.parametrize("piece_bytes", [100_000, 1 << 40])
def test_copy_range_forks(client, store, sequence, exported, piece_bytes):
    """cp within the mount: groups are shared, nothing is copied."""
    sequence.flush()
    written = store.counters()["flash"]["host_bytes_written"]
    source, target = client.open(SAFETENSORS), client.create("kv/m/b.safetensors")
    assert copy_in_pieces(client, source, target, 1 << 40, piece_bytes) == len(exported)
    client.tree.flush(target)
    client.tree.release(target)
    assert client.read("kv/m/b/sequence.safetensors") == exported
    assert [group.base_lba for group in store.sequence("b")._groups] == [
        group.base_lba for group in sequence._groups[:2]
    ]
    assert store.counters()["flash"]["host_bytes_written"] - written < 2 << 20


def test_fork_of_a_snapshot(client, store, sequence, exported):
    """What was opened is what is forked, though the sequence has grown; what was cut off is ESTALE."""
    source, target = client.open(SAFETENSORS), client.create("kv/m/b.safetensors")
    append(sequence, 50, seed=3)
    client.tree.copy_range(source, 0, target, 0, 1 << 40)
    client.tree.flush(target)
    assert client.read("kv/m/b/sequence.safetensors") == exported
    target = client.create("kv/m/c.safetensors")
    client.tree.copy_range(source, 0, target, 0, 1 << 40)
    sequence.truncate(10)
    assert errno_of(client.tree.flush, target) == errno.ESTALE
    assert "c" not in client.names("kv/m")


def test_part_of_a_copy(client, store, sequence, exported):
    """Half by copy_file_range and half by writing, or behind something written: bytes are copied after all."""
    source = client.open(SAFETENSORS)
    target = client.create("kv/m/b.safetensors")
    client.tree.copy_range(source, 0, target, 0, 200_000)
    client.tree.write(target, 200_000, exported[200_000:])
    client.tree.flush(target)
    assert client.read("kv/m/b/sequence.safetensors") == exported
    target = client.create("kv/m/c.safetensors")
    client.tree.write(target, 0, exported[:5000])
    assert client.tree.copy_range(source, 5000, target, 5000, 1 << 40) == len(exported) - 5000
    client.tree.flush(target)
    assert client.read("kv/m/c/sequence.safetensors") == exported


def test_fork_into_another_model(client, store, exported):
    """Tokens of one model mean nothing to another."""
    source, target = client.open(SAFETENSORS), client.create("kv/bf/b.safetensors")
    client.tree.copy_range(source, 0, target, 0, 1 << 40)
    assert errno_of(client.tree.flush, target) == errno.EINVAL
    with pytest.raises(SequenceExists):
        store.create_sequence(store.model("bf"), "a")


# models


def test_model_from_json(client, store):
    """cp kv/m/model.json kv/new.json: a model of the same geometry."""
    client.write("kv/new.json", client.read("kv/m/model.json"))
    assert store.model("new").geometry == store.model("m").geometry
    assert client.names("kv") == ["bf", "m", "new"]
    client.tree.make_folder(*client.place("kv/new/s"), 0o755, ME)
    wrong = {**json.loads(client.read("kv/m/model.json")), "num_layers": 3}
    assert errno_of(client.write, "kv/new.json", json.dumps(wrong).encode()) == errno.EEXIST


BAD_MODELS = [b"{", b"[]", b'"x"', b'{"num_layers": 2}', b'{"num_layers": "x"}', b"\xff", b"[" * 60_000]


@pytest.mark.parametrize("text", BAD_MODELS, ids=range(len(BAD_MODELS)))
def test_bad_model(client, text):
    """EINVAL at close; no model is made."""
    assert errno_of(client.write, "kv/new.json", text) == errno.EINVAL
    assert client.names("kv") == ["bf", "m"]


def test_model_of_file_without_metadata(store, client, tmp_path):
    """A file that does not name its model: the user has to."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.numpy.save({"layer_00.keys": np.zeros((2, 3, 64), np.float16)}))
    with path.open("rb") as file:
        with pytest.raises(InvalidArgument):
            model_of_file(store, file)
        assert model_of_file(store, file, "m").name == "m"
        with pytest.raises(InvalidArgument):
            model_of_file(store, file, "unknown")
    add_model(store, name="unknown")
