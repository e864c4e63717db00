"""Models with quantized pages, through the whole store: what goes in comes back within the codes' error."""

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument, NvmeStatusError
from kvfs.layout import default_group_tokens
from spdk_glue.vendor_command import DTYPE_OF_NAME, QUANTIZED, tokens_per_page
from tests.unit.kvfs.conftest import HEAD_DIM, add_model, plain_attention, random_kv, random_queries

DTYPES = sorted(dtype.name.lower() for dtype in QUANTIZED)
# of the largest element of a channel: half a step of its codes, and the rounding of scales and rows
ERROR_MAX = {"float8_e4m3": 1 / 16, "int8": 1 / 245, "int4": 1 / 13.7}


@pytest.fixture(params=DTYPES)
def quantized(store, request):
    return add_model(store, request.param)


def assert_close(found, wanted, dtype):
    for have, want in zip(found, wanted, strict=True):
        assert have.dtype == np.float16
        error = np.abs(have.astype(np.float64) - want)
        assert (error <= ERROR_MAX[dtype] * np.abs(want).max(axis=0) + 1e-3).all()
        assert error.max() > 0


def group_tokens(model):
    return model.geometry.group_tokens


def test_rows_come_back(store, quantized):
    sequence = store.create_sequence(quantized, "a")
    num_tokens = 2 * group_tokens(quantized) + 77
    keys, values = random_kv(num_tokens)
    sequence.append(0, keys[:100], values[:100])
    sequence.append(0, keys[100:], values[100:])
    found = sequence.read(0)
    assert_close(found, (keys, values), quantized.dtype)
    tail = slice(2 * group_tokens(quantized), None)  # which is not quantized before it is on flash
    np.testing.assert_array_equal(found[0][tail], keys[tail].astype(np.float16))
    part = sequence.read(0, 90, group_tokens(quantized) + 5)
    np.testing.assert_array_equal(part[1], found[1][90 : group_tokens(quantized) + 5])


def test_groups_are_whole_pages(store, quantized):
    per_page = tokens_per_page(4096, HEAD_DIM, DTYPE_OF_NAME[quantized.dtype])
    assert group_tokens(quantized) == 16 * per_page == default_group_tokens(quantized.dtype, HEAD_DIM, 4096)
    assert quantized.layout.pages_per_head == 16


@pytest.mark.parametrize("writeback_tokens", [None, 1])
def test_attention_is_over_what_reads_back(path, writeback_tokens):
    with kvfs.open(path, writeback_tokens=writeback_tokens, cache_bytes="8MiB") as store:
        for dtype in DTYPES:
            model = add_model(store, dtype)
            sequence = store.create_sequence(model, dtype)
            num_tokens = group_tokens(model) + 130
            keys, values = random_kv(num_tokens, seed=3)
            for start in range(0, num_tokens, 50):
                sequence.append(0, keys[start : start + 50], values[start : start + 50])
            queries = random_queries(1, 3)
            out, lse = store.attend(0, queries, sequence)
            stops = [num_tokens - 2, num_tokens - 1, num_tokens]
            stored = sequence.read(0)
            wanted, wanted_lse = plain_attention(queries[0], *stored, [(0, stop) for stop in stops])
            # what is read is rounded to float16, what is attended over is not
            np.testing.assert_allclose(out[0], wanted, atol=2e-4)
            np.testing.assert_allclose(lse[0], wanted_lse, atol=2e-4)


def test_survives_reopening_forks_and_cuts(path):
    with kvfs.open(path) as store:
        model = add_model(store, "int8")
        sequence = store.create_sequence(model, "a")
        keys, values = random_kv(1400)
        for layer in range(model.num_layers):
            sequence.append(layer, keys, values)
        store.flush()
        before = sequence.read(1)
    with kvfs.open(path) as store:
        sequence = store.sequence("a")
        np.testing.assert_array_equal(sequence.read(1)[0], before[0])
        fork = sequence.fork("b")
        fork.truncate(500)
        for layer in range(model.num_layers):
            fork.append(layer, keys[500:], values[500:])
        # what was cut out of a page is quantized again with what follows it
        for have, want in zip(fork.read(0), (keys, values), strict=True):
            assert np.abs(have - want).max() < 0.05
        np.testing.assert_array_equal(sequence.read(1)[0], before[0])
        sequence.truncate(333)
        np.testing.assert_array_equal(sequence.read(1)[0], before[0][:333])
        assert store.check() == []


def test_heads_are_read_as_rows(store, quantized):
    from kvfs.head_pieces import HeadRows

    sequence = store.create_sequence(quantized, "a")
    keys, values = random_kv(group_tokens(quantized) + 60)
    sequence.append(0, keys, values)
    found = sequence.read(0)
    pieces = [HeadRows(0, 1, 1, 17, len(keys)), HeadRows(0, 0, 0, 3, 40)]
    rows = np.frombuffer(sequence.read_heads(pieces), np.float16).reshape(-1, HEAD_DIM)
    np.testing.assert_array_equal(rows[: len(keys) - 17], found[1][17:, 1])
    np.testing.assert_array_equal(rows[len(keys) - 17 :], found[0][3:40, 0])


def test_what_is_on_its_way_reads_as_it_will(store, quantized, monkeypatch):
    """Attention does not wait for a spill, and is the same before and after it has ended."""
    sequence = store.create_sequence(quantized, "a")
    keys, values = random_kv(group_tokens(quantized))
    with monkeypatch.context() as patch:
        patch.setattr(store._namespace, "is_done", lambda pending: False)
        sequence.append(0, keys, values)
        out, _ = store.attend(0, random_queries(), sequence)
        assert sequence._layers[0].spills
    sequence.flush()
    again, _ = store.attend(0, random_queries(), sequence)
    np.testing.assert_allclose(out, again, atol=1e-4)  # rows in memory are rounded to float16
    assert_close(sequence.read(0), (keys, values), quantized.dtype)


def test_fewer_bytes_on_flash(store):
    sizes = {}
    for dtype in ("float16", "int8", "int4"):
        model = add_model(store, dtype, group_tokens=240)
        sizes[dtype] = model.layout.pages_per_head
    assert sizes["int8"] <= sizes["float16"] / 2 + 1 and sizes["int4"] <= sizes["float16"] / 4 + 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_what_has_no_code_is_refused(store, quantized, bad):
    sequence = store.create_sequence(quantized, "a")
    keys, values = random_kv(20)
    values[7, 1, 3] = bad
    with pytest.raises(InvalidArgument, match=f"values hold NaN.*{quantized.dtype} has no code"):
        sequence.append(0, keys, values)
    assert sequence.layer_tokens(0) == 0
    sequence.append(0, keys, keys)


def test_bad_shapes(store):
    with pytest.raises(InvalidArgument, match="head_dim of int4 is a multiple of 32, not 40"):
        add_model(store, "int4", head_dim=40)
    with pytest.raises(InvalidArgument, match="dtype is one of"):
        add_model(store, "int2")


@pytest.mark.parametrize("position", [0, 2], ids=["inline", "by the workers"])
@pytest.mark.parametrize("of_values", [0, 1])
def test_damaged_scales_are_an_error(path, position, of_values):
    """Of any page, in a small command or in one that is spread over threads: the block is named."""
    with kvfs.open(path) as store:
        model = add_model(store, "int8", num_layers=1, num_kv_heads=4, num_query_heads=8)
        sequence = store.create_sequence(model, "a")
        num_tokens = (1 + 4 * position) * group_tokens(model)
        keys, values = random_kv(num_tokens, num_kv_heads=4)
        sequence.append(0, keys, values)
        sequence.flush()
        layout = model.layout
        lba = sequence._groups[position].base_lba + (2 * 3 + of_values) * layout.pages_per_head + 5
        page = store._namespace.read(lba, 1)
        page[-2 * HEAD_DIM :] = 0  # as a host with another idea of the format would write it
        store._namespace.write(lba, page, 3)
        with pytest.raises(NvmeStatusError, match="scales of a page") as raised:
            store.attend(0, random_queries(), sequence)
        assert raised.value.lba == lba
        out, _ = store.attend(0, random_queries(), sequence, window=100)  # which does not see it
        assert np.isfinite(out).all()
