"""Bad input: each gets an error of its own, nothing is lost, the store stays usable."""

import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import kvfs
from kvfs import errors
from kvfs.sizes import format_size, parse_size
from spdk_glue.status import NamespaceInUse

from .conftest import add_model, random_kv, random_queries


@pytest.fixture
def sequence(store, model):
    sequence = store.create_sequence(model, "s")
    for layer in range(2):
        sequence.append(layer, *random_kv(10))
    return sequence


@pytest.mark.parametrize(
    ("layer", "keys", "values"),
    [
        (2, random_kv(1)[0], random_kv(1)[1]),
        (-1, random_kv(1)[0], random_kv(1)[1]),
        ("0", random_kv(1)[0], random_kv(1)[1]),
        (0, random_kv(1)[0][0], random_kv(1)[1]),
        (0, random_kv(2)[0], random_kv(1)[1]),
        (0, random_kv(1, num_kv_heads=3)[0], random_kv(1)[1]),
        (0, random_kv(1, head_dim=32)[0], random_kv(1, head_dim=32)[1]),
        (0, np.zeros((1, 2, 64), np.int32), np.zeros((1, 2, 64), np.int32)),
        (0, [["not", "numbers"]], [["at", "all"]]),
        (0, None, None),
    ],
)
def test_append_refuses(store, sequence, layer, keys, values):
    """Wrong layers, shapes and dtypes, with nothing appended."""
    with pytest.raises(errors.InvalidArgument):
        sequence.append(layer, keys, values)
    assert sequence.num_tokens == 10
    store.attend(0, random_queries(), [sequence])


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((5, random_queries()), {}),
        ((0, random_queries(num_heads=7)), {}),
        ((0, random_queries(head_dim=32)), {}),
        ((0, random_queries(num_sequences=2)), {}),
        ((0, random_queries()[0]), {}),
        ((0, random_queries(num_queries=11)), {}),
        ((0, random_queries()), {"token_ranges": np.array([[[0, 11]]])}),
        ((0, random_queries()), {"token_ranges": np.array([[[-1, 5]]])}),
        ((0, random_queries()), {"token_ranges": np.array([[0, 5]])}),
        ((0, random_queries()), {"scale": float("nan")}),
        ((0, np.zeros((1, 0, 8, 64), np.float32)), {}),
    ],
)
def test_attend_refuses(store, sequence, arguments, options):
    """Queries and ranges that do not fit the sequence."""
    with pytest.raises(errors.InvalidArgument):
        store.attend(*arguments, [sequence], **options)
    store.attend(0, random_queries(), [sequence])


def test_attend_refuses_strangers(store, sequence):
    """No sequence, something else, and sequences of two models in one call."""
    with pytest.raises(errors.InvalidArgument):
        store.attend(0, random_queries(0), [])
    with pytest.raises(errors.InvalidArgument):
        store.attend(0, random_queries(), ["s"])
    other = store.create_sequence(add_model(store, "float32"), "other")
    other.append(0, *random_kv(1))
    with pytest.raises(errors.InvalidArgument, match="one model"):
        store.attend(0, random_queries(2), [sequence, other])


def test_empty_sequence(store, model):
    """Attention over nothing."""
    with pytest.raises(errors.EmptySequence, match="append before attending"):
        store.attend(0, random_queries(), [store.create_sequence(model, "empty")])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 0},
        {"num_query_heads": 7},
        {"num_query_heads": 64},
        {"head_dim": 24},
        {"head_dim": 260},
        {"head_dim": 100},
        {"dtype": "int2"},
        {"group_tokens": 100_000},
        {"num_kv_heads": 1.5},
    ],
)
def test_impossible_models(store, changes):
    """Geometry that the layout or the kernels cannot hold."""
    with pytest.raises(errors.InvalidArgument):
        add_model(store, **changes)
    assert store.models() == []


def test_names(store, model):
    """Unknown, taken and unusable names."""
    store.create_sequence(model, "taken")
    with pytest.raises(errors.SequenceExists):
        store.create_sequence(model, "taken")
    with pytest.raises(errors.NoSuchSequence):
        store.sequence("nobody")
    with pytest.raises(errors.NoSuchSequence):
        store.delete_sequence("nobody")
    with pytest.raises(errors.NoSuchModel):
        store.model("nobody")
    with pytest.raises(errors.ModelMismatch, match="head_dim is 64, not 128"):
        add_model(store, head_dim=128)
    for name in ("", ".", "..", "a/b", "nul\0", "x" * 256, None, 7):
        with pytest.raises(errors.InvalidArgument):
            store.create_sequence(model, name)
    with pytest.raises(errors.InvalidArgument):
        store.create_sequence("model-float16", "s")


def test_truncate_refuses(sequence):
    """More than there is, or not a number."""
    for keep in (11, -1, 2.5):
        with pytest.raises(errors.InvalidArgument):
            sequence.truncate(keep)
    assert sequence.num_tokens == 10


def test_closed_store(path):
    """Every call on a closed store, and on the sequences it gave out."""
    store = kvfs.open(path)
    model = add_model(store)
    sequence = store.create_sequence(model, "s")
    store.close()
    store.close()
    for call in (
        lambda: store.sequence("s"),
        lambda: store.sequences(),
        lambda: store.models(),
        lambda: store.flush(),
        lambda: store.counters(),
        lambda: store.create_sequence(model, "t"),
        lambda: store.attend(0, random_queries(), [sequence]),
        lambda: sequence.append(0, *random_kv(1)),
        lambda: sequence.flush(),
        lambda: sequence.truncate(0),
        lambda: sequence.fork("t"),
    ):
        with pytest.raises(errors.StoreClosed):
            call()


def test_deleted_sequence(store, sequence):
    """A handle whose sequence is gone."""
    store.delete_sequence("s")
    with pytest.raises(errors.InvalidArgument, match="deleted"):
        sequence.append(0, *random_kv(1))


def test_files_that_are_no_drive(tmp_path):
    """Missing, empty, foreign and truncated files, a folder, a newer format."""
    with pytest.raises(errors.NotADrive, match="no such file"):
        kvfs.open(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.touch()
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"PK\x03\x04" * 5000)
    for path in (empty, foreign):
        with pytest.raises(errors.NotADrive, match="not a kvfs drive"):
            kvfs.open(path)
    with pytest.raises(errors.KvfsError):
        kvfs.open(tmp_path)
    truncated = tmp_path / "truncated"
    kvfs.format(truncated, "16MiB")
    os.truncate(truncated, 8 << 20)
    with pytest.raises(errors.NotADrive, match="truncated"):
        kvfs.open(truncated)


def test_drive_of_a_newer_version(path):
    """A drive written by a later release must be refused, not misread."""
    from ftl.direct_io.api import crc32c_records
    from ftl.layout import DRIVE_HEADER

    raw = bytearray(path.read_bytes()[:8192])
    for start in (0, 4096):
        header = np.frombuffer(raw, DRIVE_HEADER, 1, start)
        header["format_version"] = 99
        header["crc32c"] = crc32c_records(header.copy())
    with path.open("r+b") as file:
        file.write(raw)
    with pytest.raises(errors.NotADrive, match="format version 99"):
        kvfs.open(path)


def test_drive_open_elsewhere(path):
    """Two owners of one drive would destroy it: the second is told who has it."""
    script = textwrap.dedent(
        """
        import sys, kvfs
        with kvfs.open(sys.argv[1], cache_bytes="8MiB"):
            print("open", flush=True)
            sys.stdin.read()
        """
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(errors.DriveBusy) as caught:
            kvfs.open(path)
        assert caught.value.pid == holder.pid
        assert str(holder.pid) in str(caught.value)
    finally:
        holder.communicate("")
    kvfs.open(path).close()


def test_format_refuses(tmp_path):
    """An existing file, sizes that make no sense."""
    path = tmp_path / "drive"
    path.write_text("precious")
    with pytest.raises(errors.DriveExists):
        kvfs.format(path, "64MiB")
    assert path.read_text() == "precious"
    for size in ("1MiB", "lots", "-5", -1, 2.5, "12 parsecs"):
        with pytest.raises(errors.InvalidArgument):
            kvfs.format(tmp_path / "new", size)
    assert not (tmp_path / "new").exists()
    with pytest.raises(errors.MediaFailure):
        kvfs.format(tmp_path / "no" / "such" / "folder", "64MiB")


def test_options_of_open(path):
    """Options out of range, before anything is opened."""
    for options in ({"cache_bytes": 5}, {"num_workers": 0}, {"worker": "gpu"}, {"writeback_tokens": 0}):
        with pytest.raises(errors.InvalidArgument):
            kvfs.open(path, **options)
    kvfs.open(path).close()


def test_full_drive(path):
    """A full drive: what does not fit is refused whole, everything stored stays, deleting helps."""
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = add_model(store)
        first = store.create_sequence(model, "first")
        keys, values = random_kv(2048)
        for layer in range(2):
            first.append(layer, keys, values)
        first.flush()
        hog = store.create_sequence(model, "hog")
        with pytest.raises(errors.OutOfSpace, match="full"):
            while True:
                for layer in range(2):
                    hog.append(layer, keys, values)
        assert errors.errno_of(errors.OutOfSpace(1, 0)) == 28
        np.testing.assert_array_equal(first.read(1)[0], keys.astype(np.float16))
        store.attend(0, random_queries(), [first])
        store.flush()
        store.delete_sequence("hog")
        again = store.create_sequence(model, "again")
        for layer in range(2):
            again.append(layer, keys, values)
        np.testing.assert_array_equal(again.read(0)[1], values.astype(np.float16))
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert store.check() == []
        np.testing.assert_array_equal(store.sequence("first").read(0)[0], keys.astype(np.float16))


def test_a_namespace_that_linux_uses_is_busy():
    assert errors.errno_of(NamespaceInUse("mounted")) == errno.EBUSY


def test_corrupt_page_is_an_error_with_facts(path):
    """Bit rot: an error that names the block, never wrong numbers; other sequences stay readable."""
    keys, values = random_kv(256)
    bad_keys, _ = random_kv(256, seed=7)
    with kvfs.open(path, cache_bytes="8MiB") as store:
        model = add_model(store)
        for name in ("good", "bad"):
            sequence = store.create_sequence(model, name)
            for layer in range(2):
                sequence.append(layer, keys if name == "good" else bad_keys, values)
    raw = path.read_bytes()
    needle = np.ascontiguousarray(bad_keys.astype(np.float16)[:32, 0]).tobytes()  # a page of K
    with path.open("r+b") as file:
        file.seek(raw.index(needle) + 100)
        file.write(b"\xff\x00\xff")
    with kvfs.open(path, cache_bytes="8MiB") as store:
        bad = store.sequence("bad")
        found = []
        for layer in range(2):
            try:
                store.attend(layer, random_queries(), [bad])
            except kvfs.NvmeStatusError as error:
                found.append(error)
        assert found, "the flipped bits were served"
        assert found[0].lba is not None
        assert "unrecovered read error at LBA" in str(found[0])
        assert any(str(found[0].lba) in line or "LBA" in line for line in store.check())
        store.attend(0, random_queries(), [store.sequence("good")])


def test_every_error_has_an_errno():
    """errno: the mount and the exit codes rest on a row per class."""

    def classes(base):
        yield base
        for derived in base.__subclasses__():
            yield from classes(derived)

    for error in classes(errors.KvfsError):
        if error.__module__.startswith("kvfs.errors"):
            assert error in errors.ERRNO, error.__name__


def test_sizes():
    """Sizes as people write them."""
    assert parse_size("8GiB") == 8 << 30
    assert parse_size("500MB") == 500_000_000
    assert parse_size("1.5k") == 1536
    assert parse_size(4096) == 4096
    assert format_size(1536) == "1.5 KiB"
    assert format_size(3) == "3 B"
