"""The benchmark of very many sequences at a small number: every figure is there, and the drive stays sound."""

import kvfs
import kvfs_bench.many_sequences as bench

NUM_SEQUENCES = 3 * bench.NUM_EVICTED  # two processes evict so many each


def test_many_sequences(tmp_path):
    """Rows that no flush would leave, figures of an empty drive, or evictions other than those asked for."""
    drive = tmp_path / "drive.kvfs"
    figures = bench.measure(tmp_path, NUM_SEQUENCES, drive)
    found = {figure.name.removeprefix("many_sequences."): figure.value for figure in figures}
    assert found["stored"] == NUM_SEQUENCES and found["catalogue_bytes"] > 256 * NUM_SEQUENCES
    assert {"first_page", "df", "first_cap", "evict_1000", "peak_rss", "open_after_crash"} <= found.keys()
    with kvfs.open(drive, worker="reference", cache_bytes="8MiB") as store:
        assert store.sequence_counts() == {"bench": bench.NUM_EVICTED}
        first = next(iter(store.sequence_rows()))  # those used longest ago are gone
        assert first.name == f"sequence-{2 * bench.NUM_EVICTED + 1:08d}"
        assert first.num_tokens == bench.GROUP_TOKENS
