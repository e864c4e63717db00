"""Descriptors known from the layer before: what was checked and planned once holds for the same bytes only."""

import numpy as np
import pytest

from accel import attention_work
from accel.attention_work import DescriptorReader
from spdk_glue.status import CommandFailed, Status
from spdk_glue.vendor_command import (
    ATTENTION_HEADER,
    ATTENTION_ITEM,
    ATTENTION_MAGIC,
    ATTENTION_VERSION,
    GROUP_EXTENT,
    LINEAR_BIAS,
    KvDtype,
)

PAGE_SIZE, NUM_LBAS = 4096, 100_000
HEADS, HEAD_DIM, GROUP_TOKENS, NUM_LAYERS = 2, 64, 64, 5
LAYER_LBAS = HEADS * 2 * 2  # 32 rows of float16 a page


def descriptor(layer=0, seed=0, num_groups=3, slopes=(), queries_offset=None, **changes):
    """(bytes, queries): one query of one item over the groups from LBA 1000 on."""
    queries = np.random.default_rng(seed).standard_normal((1, 1, HEADS, HEAD_DIM), np.float32)
    header, item, extent = (np.zeros(1, of) for of in (ATTENTION_HEADER, ATTENTION_ITEM, GROUP_EXTENT))
    bias = np.array([*slopes, *[0.0] * bool(slopes)], np.float32)  # and the query's position, 0
    tables_end = header.nbytes + item.nbytes + extent.nbytes + bias.nbytes
    fields = {
        "magic": ATTENTION_MAGIC,
        "version": ATTENTION_VERSION,
        "flags": LINEAR_BIAS if slopes else 0,
        "num_items": 1,
        "num_extents": 1,
        "queries_offset": tables_end if queries_offset is None else queries_offset,
        "group_tokens": GROUP_TOKENS,
        "num_layers": NUM_LAYERS,
        "layer": layer,
        "num_kv_heads": HEADS,
        "group_size": 1,
        "head_dim": HEAD_DIM,
        "num_queries": 1,
        "dtype": KvDtype.FLOAT16,
        "query_dtype": KvDtype.FLOAT32,
        "scale": 1.0,
        **changes,
    }
    for name, value in fields.items():
        header[name] = value
    num_tokens = num_groups * GROUP_TOKENS
    item["num_extents"], item["num_tokens"], item["token_stop"] = 1, num_tokens, num_tokens
    extent["base_lba"], extent["num_groups"] = 1000, num_groups
    gap = np.zeros(max(0, fields["queries_offset"] - tables_end), np.uint8)
    parts = (header, item, extent, bias, gap, queries)
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts]), queries


@pytest.fixture
def checks(monkeypatch):
    """One entry for each descriptor that was checked rather than known."""
    found = []
    check = attention_work.check_tables
    monkeypatch.setattr(
        attention_work, "check_tables", lambda data, *rest: (found.append(data), check(data, *rest))[1]
    )
    return found


@pytest.fixture
def reader():
    return DescriptorReader(PAGE_SIZE, NUM_LBAS, max_unit_pages=1 << 20)


def detail_of(reader, data):
    with pytest.raises(CommandFailed) as caught:
        reader.read(data)
    assert caught.value.status == Status.INVALID_DESCRIPTOR
    return caught.value.detail


def test_layer_after_layer(reader, checks):
    """Of a known descriptor the layer and the queries are its own: another's would be wrong attention."""
    for layer in (0, 3, 1, 4):
        data, queries = descriptor(layer, seed=layer)
        work = reader.read(data)
        assert work.layer == layer
        np.testing.assert_array_equal(work.queries, queries)
        fresh = DescriptorReader(PAGE_SIZE, NUM_LBAS, 1 << 20).read(data)
        for name, array in vars(fresh.plan).items():
            np.testing.assert_array_equal(vars(work.plan)[name], array)
        data[:] = 0xFF  # the host may use its buffer again
        np.testing.assert_array_equal(work.queries, queries)
    assert len(checks) == 1 + 4


@pytest.mark.parametrize(
    "changes", [{"num_groups": 4}, {"scale": 2.0}, {"slopes": (0.5, 0.25)}, {"num_layers": 6}], ids=str
)
def test_what_differs_is_not_known(reader, checks, changes):
    reader.read(descriptor()[0])
    reader.read(descriptor(**changes)[0])
    assert len(checks) == 2


@pytest.mark.parametrize("known", [False, True])
def test_layer_and_queries_are_checked_each_time(reader, known):
    if known:
        reader.read(descriptor()[0])
    assert detail_of(reader, descriptor(layer=NUM_LAYERS)[0]) == "layer"
    assert "queries" in detail_of(reader, descriptor()[0][:-1])
    assert "header" in detail_of(reader, descriptor()[0][:63])
    assert "queries_offset" in detail_of(reader, descriptor()[0][:80])


def test_a_bad_descriptor_stays_bad(reader, checks):
    """Only what held is kept."""
    for _ in range(3):
        assert detail_of(reader, descriptor(version=9)[0]) == "version 9, not 2"
    assert len(checks) == 3


def test_few_are_kept(reader, checks):
    """Bounded memory: the newest few, used ones longest; none that are large."""
    for num_groups in range(1, 20):
        reader.read(descriptor(num_groups=num_groups)[0])
        reader.read(descriptor(num_groups=1)[0])
        assert len(reader._kept) <= attention_work.MAX_KEPT
    assert len(checks) == 19
    large = descriptor(queries_offset=attention_work.MAX_KEPT_BYTES)[0]
    for _ in range(2):
        reader.read(large)
    assert len(checks) == 21
