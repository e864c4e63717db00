"""Part groups on flash: what one writeback_tokens stores, a store with another goes on with."""

import numpy as np
import pytest

import kvfs


@pytest.mark.parametrize("first, then", [(1, 1 << 20), (1 << 20, 1), (1, 1)])
def test_another_writeback(tmp_path, first, then):
    """Tokens of a part group that a flush gives up, and whose blocks others get."""
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, "48MiB")
    rows = np.arange(400 * 64, dtype=np.float32).reshape(400, 1, 64)
    with kvfs.open(path, cache_bytes="8MiB", writeback_tokens=first) as store:
        model = store.add_model(
            "m", num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=64, dtype="float32"
        )
        store.create_sequence(model, "s").append(0, rows[:336], -rows[:336])
    with kvfs.open(path, cache_bytes="8MiB", writeback_tokens=then) as store:
        sequence = store.sequence("s")
        for start, stop in ((336, 337), (337, 350)):
            sequence.append(0, rows[start:stop], -rows[start:stop])
            sequence.flush()
            keys, values = sequence.read(0)
            assert np.array_equal(keys, rows[:stop]) and np.array_equal(values, -rows[:stop])
        other = store.create_sequence(store.model("m"), "other")
        other.append(0, rows, rows)
        other.flush()
        assert np.array_equal(sequence.read(0)[0], rows[:350])
    with kvfs.open(path, cache_bytes="8MiB") as store:
        assert np.array_equal(store.sequence("s").read(0)[0], rows[:350])
        assert store.check() == []
