"""How much is offered: streams, blocks, and what is kept back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftl.geometry import MIB, Geometry
from ftl.provisioning import GC_RESERVE, INTERNAL_SUPERBLOCKS, STREAMS_MAX, num_lbas, num_streams


def geometry(num_superblocks, pages_per_erase_block=32):
    return Geometry(num_superblocks=num_superblocks, pages_per_erase_block=pages_per_erase_block)


@pytest.mark.parametrize(
    ("num_superblocks", "streams"),
    [(8, 2), (23, 2), (24, 3), (48, 6), (63, 7), (64, 8), (128, 8), (160, 10), (1024, 64), (10**6, 64)],
)
def test_streams(num_superblocks, streams):
    assert num_streams(geometry(num_superblocks)) == streams


@pytest.mark.parametrize(
    ("num_superblocks", "lbas"),
    [
        # 256 pages each: 93% less streams and five more superblocks
        (8, 112),
        (16, 2017),
        (48, 8611),
        (64, 11909),
    ],
)
def test_blocks(num_superblocks, lbas):
    """A drive's header holds this number: another result and it would not open any more."""
    assert num_lbas(geometry(num_superblocks)) == lbas


def test_flash_too_small():
    """Eight superblocks of one or two pages: no room behind what is kept back."""
    for pages in (1, 2):
        with pytest.raises(ValueError, match="num_superblocks: 8"):
            num_lbas(Geometry(num_channels=1, pages_per_erase_block=pages, num_superblocks=8))
    assert num_lbas(Geometry(num_channels=1, pages_per_erase_block=3, num_superblocks=8)) == 1


def test_reserve():
    """Collection and metadata each have an open superblock, besides what stays free."""
    assert INTERNAL_SUPERBLOCKS == 2 + GC_RESERVE


def check(shape):
    lbas, streams = num_lbas(shape), num_streams(shape)
    kept_back = (streams + INTERNAL_SUPERBLOCKS) * shape.pages_per_superblock
    assert 2 <= streams <= STREAMS_MAX
    assert lbas >= 1
    # with everything open and the reserve free, closed superblocks still hold 7% of garbage
    closed = shape.num_pages - kept_back
    assert closed - lbas >= int(0.07 * shape.num_pages)
    assert closed - lbas <= 0.07 * shape.num_pages + 1


@given(st.integers(16 * MIB, 1 << 46), st.sampled_from([4096, 16384, 65536]))
def test_any_capacity(size_bytes, page_size):
    """Every drive that can be asked for by size holds data, and collection always gains."""
    check(Geometry.for_capacity(size_bytes, page_size))


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 4), st.integers(4, 1024), st.integers(8, 1 << 20))
def test_any_geometry(channels, dies, planes, pages, superblocks):
    check(
        Geometry(
            num_channels=channels,
            dies_per_channel=dies,
            planes_per_die=planes,
            pages_per_erase_block=pages,
            num_superblocks=superblocks,
        )
    )


@pytest.mark.parametrize(("first", "stop"), [(8, 24), (24, 32), (56, 64), (64, 144)])
def test_more_flash_is_more_room(first, stop):
    """As long as it is not a further stream that takes it."""
    found = [num_lbas(geometry(count)) for count in range(first, stop)]
    assert found == sorted(set(found))
