"""`kvfsctl warm-up`: what the first prompt would wait for is compiled before."""

import json

import numpy as np

import kvfs
from accel.workers import numba as worker
from kvfs.warm_up import COMMON_SHAPES, Shape
from tests.unit.kvfsctl.command_line import kvfsctl


def test_the_models_of_a_drive(tmp_path):
    """A first prompt that waits for the compiler, though it was told which models there are."""
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, "48MiB")
    shapes = [Shape("float32", 32, 2), Shape("int8", 64, 1)]
    with kvfs.open(path, cache_bytes="8MiB") as store:
        for dtype, head_dim, group_size in shapes:
            heads = {"num_query_heads": 2 * group_size, "num_kv_heads": 2, "head_dim": head_dim}
            store.add_model(f"{dtype}", num_layers=3, dtype=dtype, **heads)
    worker._kernel.cache_clear()
    answer = json.loads(kvfsctl("warm-up", path, "--json").stdout)
    assert [Shape(row["dtype"], row["head_dim"], row["group_size"]) for row in answer["shapes"]] == shapes
    for shape in shapes:
        assert worker.kernel(*shape).overloads, f"{shape} is compiled by its first prompt"
    assert not worker.kernel("float32", 32, 3).overloads


def test_common_shapes():
    """Shapes that no model can have would end an installation."""
    assert len(set(COMMON_SHAPES)) == len(COMMON_SHAPES)
    for dtype, head_dim, group_size in COMMON_SHAPES:
        kvfs.layout.KvGeometry(1, group_size, 1, head_dim, dtype)
        assert np.isfinite(head_dim)
