"""Sparse commands over any segments and any visible tokens are what their definition says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.drive import Drive, DriveConfig
from ftl.geometry import Geometry
from spdk_glue.namespace import Namespace
from tests.unit.accel.sparse_drive import (
    GROUP_TOKENS,
    attend,
    expected,
    layout,
    random_queries,
    sparse_descriptor,
    store,
)

NUM_GROUPS = 7


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse") / "drive"
    Drive.format(path, Geometry(pages_per_erase_block=32, num_superblocks=48))
    drive = Drive.open(path, DriveConfig(cache_bytes=8 << 20, num_workers=2))
    yield Namespace(drive.transport)
    drive.close()


@st.composite
def commands(draw):
    """Segments that do not overlap, with gaps; what the last query sees of each item; a compression."""
    segments, first = [], 0
    while first < NUM_GROUPS:
        first += draw(st.integers(0, 2))
        count = draw(st.integers(1, 4))
        if first + count <= NUM_GROUPS:
            segments.append((first, count))
        first += count
    num_queries = draw(st.integers(1, 3))
    start = draw(st.integers(0, NUM_GROUPS * GROUP_TOKENS - 1))
    stop = draw(st.integers(min(start + num_queries, NUM_GROUPS * GROUP_TOKENS), NUM_GROUPS * GROUP_TOKENS))
    return segments, num_queries, (start, stop), draw(st.sampled_from([1, 3, 8])), draw(st.integers(0, 9))


@settings(deadline=None, max_examples=25)
@given(commands())
def test_commands(namespace, command):
    """A token counted twice, or not at all, would change the answer."""
    segments, num_queries, seen, compression, seed = command
    stored = store(namespace, NUM_GROUPS, segments, seed=seed)
    queries = random_queries(1, num_queries, seed)
    data = sparse_descriptor([stored], queries, seen=[seen], compression=compression)
    out, lse, header = attend(namespace, data, queries)
    # segments of which too little is seen are read from their tokens' own pages
    unused = [number for number, segment in enumerate(segments) if not is_worth_it(segment, seen)]
    wanted, num_chosen = expected([stored], queries, compression, seen=[seen], without=unused)
    # queries and weights are rounded to bytes where 2-bit codes are read
    assert np.linalg.norm(out - wanted[0]) <= 3e-2 * np.linalg.norm(wanted[0])
    np.testing.assert_allclose(lse, wanted[1], atol=3e-2)
    assert header["chosen_pages"] == num_chosen


def is_worth_it(segment, seen):
    """32 rows of K to a page, and as many of V; a sketch's pages by its definition."""
    first, count = segment
    low, high = max(seen[0], first * GROUP_TOKENS), min(seen[1], (first + count) * GROUP_TOKENS)
    return low < high and 2 * (-(-high // 32) - low // 32) > layout(count).index_pages
