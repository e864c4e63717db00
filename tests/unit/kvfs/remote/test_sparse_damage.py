"""Damaged derived data as a client of a mount has it: the answer is right, it is counted, and said once."""

import numpy as np
import pytest

import kvfs
from kvfs.sealing.commands import derived_layout

from ..conftest import random_queries
from ..test_sparse import error_of, sealed


@pytest.mark.parametrize(
    ("options", "derive"),
    [({"compression": 1, "exact_if_cached": False}, "sketch"), ({"sparf": (64, 4096)}, "channel_major_keys")],
    ids=["sketch", "channel_major_keys"],
)
def test_damage_falls_back_to_the_tokens_own_pages(served, client, options, derive, caplog):
    """Everything that is derived is damaged: the client gets dense attention, and the mount goes on."""
    sequence = sealed(client, num_tokens=4200, derive=(derive,))  # two whole segments
    queries = random_queries()
    expected = client.attend(0, queries, sequence)
    owners = served.store.sequence(sequence.name)
    segments = list(owners.derived_segments(derive))
    for segment in segments:
        layout = derived_layout(owners.model.layout, segment.derive, segment.num_groups)
        read_first = 0 if derive == "sketch" else layout.index_pages - 1  # the sketch's header; the mean of V
        served.store._namespace.write(segment.base_lba + read_first, np.zeros(4096, np.uint8))
    counts = kvfs.PageCounts()
    with caplog.at_level("WARNING"):
        answers = [client.attend(0, queries, sequence, counts=counts, **options) for _ in range(4)]
    said = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(said) == len(set(said)) == len(segments)
    assert counts.damaged_segments >= len(segments)
    assert client.counters()["attention"]["damaged_segments"] == counts.damaged_segments
    assert error_of(answers[-1], expected) < 1e-6
    assert sequence.derived_segments(derive) == []
    before = counts.damaged_segments
    client.attend(0, queries, sequence, counts=counts, **options)
    assert counts.damaged_segments == before
    assert sequence.seal(derive) == 4200 // 256 * 256
    assert error_of(client.attend(0, queries, sequence, counts=counts, **options), expected) < 0.2
    assert counts.damaged_segments == before
    caplog.clear()
