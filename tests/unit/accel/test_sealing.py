"""SEAL_GROUPS: any bytes may come, and what is derived is of the groups, wherever they lie."""

import numpy as np
import pytest

from accel.drive import Drive, DriveConfig
from accel.seal_request import SealRequest
from ftl.geometry import Geometry
from spdk_glue import dma
from spdk_glue.derived_layout import DerivedLayout, groups_per_segment
from spdk_glue.status import CommandFailed, NvmeStatusError, Status
from spdk_glue.vendor_command import (
    DERIVE_HEADER,
    GROUP_EXTENT,
    SEAL_HEADER,
    SEAL_MAGIC,
    SEAL_VERSION,
    Derive,
    KvDtype,
)
from tests.crash.sealing_workload import encoder, stand_in

PAGE = 4096
HEADS, HEAD_DIM, TOKENS, LAYERS = 2, 256, 16, 2
LAYER_LBAS = HEADS * 2 * 2  # 8 rows of float16 a page
GROUP_LBAS = LAYERS * LAYER_LBAS
TARGET = 1000


@pytest.fixture
def drive(tmp_path, monkeypatch):
    monkeypatch.setattr("accel.sealing._encoder", encoder)
    Drive.format(tmp_path / "drive", Geometry(pages_per_erase_block=32, num_superblocks=48))
    drive = Drive.open(tmp_path / "drive", DriveConfig(cache_bytes=8 << 20, num_workers=1))
    yield drive
    drive.close()


def payload(bases, targets, per_segment, shape=None, **header):
    head, extents = np.zeros(1, SEAL_HEADER), np.zeros(len(bases), GROUP_EXTENT)
    derive = np.zeros(1, DERIVE_HEADER)
    fields = {"magic": SEAL_MAGIC, "version": SEAL_VERSION, "derive": Derive.SKETCH, "num_extents": len(bases)}
    fields |= {"num_layers": LAYERS, "layer_lbas": LAYER_LBAS, **header}
    for name, value in fields.items():
        head[name] = value
    extents["base_lba"], extents["num_groups"] = bases, 1
    what = {"num_kv_heads": HEADS, "head_dim": HEAD_DIM, "dtype": KvDtype.FLOAT16, "group_tokens": TOKENS}
    for name, value in {**what, "groups_per_segment": per_segment, **(shape or {})}.items():
        derive[name] = value
    parts = (head, extents, derive, np.array(targets, "<u8"))
    return np.concatenate([part.view(np.uint8) for part in parts])


def write_groups(namespace, bases, seed=0):
    """float16 [groups, LAYERS, HEADS, K | V, TOKENS, HEAD_DIM]"""
    shape = (len(bases), LAYERS, HEADS, 2, TOKENS, HEAD_DIM)
    rows = np.random.default_rng(seed).standard_normal(shape, np.float32).astype(np.float16)
    for base, group in zip(bases, rows, strict=True):
        data = dma.allocate(group.nbytes)
        data[:] = group.reshape(-1).view(np.uint8)
        namespace.write(base, data)
    return rows


def layout(num_groups, derive=Derive.SKETCH, num_layers=LAYERS):
    return DerivedLayout(derive, PAGE, num_layers, HEADS, HEAD_DIM, KvDtype.FLOAT16, num_groups * TOKENS)


def expected(rows, found: DerivedLayout, layer, head):
    keys, values = (
        np.ascontiguousarray(rows[:, layer, head, kind].reshape(-1, HEAD_DIM), np.float32) for kind in (0, 1)
    )
    return stand_in(keys, values, found)


def head_pages(namespace, base, found: DerivedLayout, layer, head):
    raw = namespace.read(base, found.num_lbas).reshape(-1, PAGE)
    index, refinement = found.index_lba(layer, head), found.refinement_lba(layer, head)
    return np.concatenate([raw[index:][: found.index_pages], raw[refinement:][: found.refinement_pages]])


@pytest.mark.parametrize("derive", [Derive.SKETCH, Derive.CHANNEL_MAJOR_KEYS])
def test_segments(drive, namespace, derive):
    """Groups in any place, cut into segments of which the last is shorter; the cache is as it was."""
    bases = [640, 64, 320]
    rows = write_groups(namespace, bases)
    first, last = layout(2, derive), layout(1, derive)
    namespace.seal_groups(payload(bases, [TARGET, 3000], 2, derive=derive))
    for layer in range(LAYERS):
        for head in range(HEADS):
            found = head_pages(namespace, TARGET, first, layer, head)
            np.testing.assert_array_equal(found, expected(rows[:2], first, layer, head))
            found = head_pages(namespace, 3000, last, layer, head)
            np.testing.assert_array_equal(found, expected(rows[2:], last, layer, head))
    assert not drive.cache._slots[:, 1].any()
    counters = drive.sealing.counters
    assert (counters.commands, counters.segments, counters.refused) == (1, 2, 0)
    assert counters.pages_read == 3 * GROUP_LBAS
    assert counters.pages_written == first.num_lbas + last.num_lbas


def test_one_layer(namespace):
    """A command of one layer writes that layer's share."""
    rows = write_groups(namespace, [64])
    whole = layout(1)
    for layer in (1, 0):
        target = TARGET + layer * whole.layer_lbas
        namespace.seal_groups(payload([64 + layer * LAYER_LBAS], [target], 1, num_layers=1))
    for layer in range(LAYERS):
        found = head_pages(namespace, TARGET, whole, layer, 1)
        np.testing.assert_array_equal(found, expected(rows, whole, layer, 1))


def test_what_cannot_be_sealed(namespace, monkeypatch):
    """A status of its own for rows that have no code, and the usual ones for pages that are not there."""

    def refuse(keys, values, layout):
        raise ValueError("keys hold an element that is not finite")

    write_groups(namespace, [64])
    with pytest.raises(NvmeStatusError) as caught:
        namespace.seal_groups(payload([640], [TARGET], 1))
    assert (caught.value.status, caught.value.lba) == (Status.DEALLOCATED_BLOCK, 640)
    monkeypatch.setattr("accel.sealing._encoder", lambda derive: refuse)
    with pytest.raises(NvmeStatusError) as caught:
        namespace.seal_groups(payload([64], [TARGET], 1))
    assert caught.value.status == Status.CANNOT_BE_SEALED
    assert caught.value.detail == "layer 0, KV head 0"


FULL = groups_per_segment(Derive.SKETCH, PAGE, HEAD_DIM, KvDtype.FLOAT16, TOKENS)
BAD = {
    "magic": {"magic": 1},
    "version": {"version": 1},
    "later version": {"version": 3},
    "nothing": {"derive": 0},
    "unknown": {"derive": 8},
    "two at once": {"derive": 6},
    "compaction of the other version": {"derive": Derive.COMPACT},
    "reserved": {"reserved": b"\1"},
    "placement": {"placement_id": 1 << 16},
    "no layers": {"num_layers": 0},
    "layers beyond": {"num_layers": 1 << 31},
    "layer_lbas of another shape": {"layer_lbas": LAYER_LBAS + 1},
    "no layer_lbas": {"layer_lbas": 0},
    "more extents than data": {"num_extents": 1 << 20},
    "no groups": {"bases": [], "targets": []},
    "group beyond": {"bases": [1 << 40]},
    "group at the end": {"bases": [1 << 15]},
    "heads": {"shape": {"num_kv_heads": 0}},
    "head_dim": {"shape": {"head_dim": 250}},
    "head_dim beyond": {"shape": {"head_dim": 512}},
    "dtype": {"shape": {"dtype": 99}},
    "another dtype": {"shape": {"dtype": KvDtype.FLOAT32}},
    "reserved of the shape": {"shape": {"reserved": 1}},
    "no tokens": {"shape": {"group_tokens": 0}},
    "tokens beyond": {"shape": {"group_tokens": 1 << 20}},
    "no groups in a segment": {"per_segment": 0},
    "too many groups in a segment": {"per_segment": FULL + 1},
    "target beyond": {"targets": [1 << 40]},
    "target at the end": {"targets": [1 << 15]},
    "negative target": {"targets": [(1 << 64) - 1]},
    "no target": {"targets": []},
    "too few targets": {"bases": [64, 640], "targets": [TARGET]},
    "target over a group": {"targets": [64 + GROUP_LBAS - 1]},
    "target before a group": {"targets": [63]},
    "targets over each other": {"bases": [64, 640], "targets": [TARGET, TARGET + 5]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(drive, namespace, name):
    """Refused before anything is written."""
    fields = {"bases": [64], "targets": [TARGET], "per_segment": 1, **BAD[name]}
    with pytest.raises(NvmeStatusError) as caught:
        namespace.seal_groups(payload(**fields))
    assert caught.value.status == Status.INVALID_DESCRIPTOR
    assert drive.ftl.counters.host_pages_written == 0


def test_any_bytes(drive):
    """Good data with bytes changed, or cut short: a request or a refusal, in no time and no memory."""
    good = payload([64, 640], [TARGET, 3000], 1)
    random = np.random.default_rng(0)
    for _ in range(3000):
        data = good.copy()
        for _ in range(random.integers(1, 4)):
            data[random.integers(len(data))] = random.integers(256)
        if random.random() < 0.2:
            data = data[: random.integers(len(data))]
        try:
            request = SealRequest.read(data, PAGE, drive.ftl.num_lbas)
        except CommandFailed as failure:
            assert failure.status == Status.INVALID_DESCRIPTOR
        else:
            assert len(request.bases) <= drive.ftl.num_lbas
