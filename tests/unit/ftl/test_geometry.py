"""Geometry: the arithmetic of page numbers, what is refused, and shapes for a capacity."""

from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftl.geometry import KIB, MIB, Geometry

FIELDS = [field.name for field in fields(Geometry)]


def test_sizes():
    geometry = Geometry(
        page_size=16 * KIB,
        num_channels=3,
        dies_per_channel=2,
        planes_per_die=4,
        pages_per_erase_block=10,
        num_superblocks=9,
    )
    assert geometry.num_planes == 24
    assert geometry.pages_per_superblock == 240
    assert geometry.superblock_bytes == 240 * 16 * KIB
    assert geometry.num_pages == 9 * 240
    assert geometry.capacity_bytes == 9 * 240 * 16 * KIB
    assert geometry.num_erase_blocks == 9 * 24


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [0, -1, True, 4096.0, "8", None])
def test_fields_are_positive_whole_numbers(name, value):
    """Out of a damaged header or a caller's hand: the message says which field."""
    if (name, value) == ("parity", 0) and not isinstance(value, bool):
        return  # none is a choice
    with pytest.raises(ValueError, match=name):
        Geometry(**{name: value})


@pytest.mark.parametrize("page_size", [1, 2048, 4095, 4097, 6144, 65535, 128 * KIB])
def test_bad_page_sizes(page_size):
    with pytest.raises(ValueError, match="page_size"):
        Geometry(page_size=page_size)


@pytest.mark.parametrize("page_size", [4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB])
def test_page_sizes(page_size):
    assert Geometry(page_size=page_size).page_size == page_size


def test_number_of_superblocks():
    assert Geometry(num_superblocks=8).num_superblocks == 8
    with pytest.raises(ValueError, match="at least 8"):
        Geometry(num_superblocks=7)


def test_number_of_pages():
    """Page numbers fit 48 bits."""
    shape = {"num_channels": 1, "pages_per_erase_block": 1}
    assert Geometry(**shape, num_superblocks=(1 << 48) - 1).num_pages == (1 << 48) - 1
    with pytest.raises(ValueError, match="num_superblocks"):
        Geometry(**shape, num_superblocks=1 << 48)


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        Geometry().page_size = 8192


@given(st.integers(16 * MIB, 1 << 46), st.sampled_from([4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB]))
def test_for_capacity(size_bytes, page_size):
    """Never more flash than was asked for, and less by no more than a superblock."""
    geometry = Geometry.for_capacity(size_bytes, page_size)
    superblock = geometry.superblock_bytes
    assert geometry.page_size == page_size
    assert size_bytes - superblock < geometry.capacity_bytes <= size_bytes
    assert 1 * MIB <= superblock <= 16 * MIB
    assert superblock & (superblock - 1) == 0
    assert superblock == 16 * MIB or geometry.num_superblocks < 256 or size_bytes < 256 * MIB
    assert geometry.num_superblocks >= 16


@pytest.mark.parametrize(
    ("size_bytes", "superblock_bytes"),
    [
        (16 * MIB, 1 * MIB),
        (128 * MIB, 1 * MIB),
        (256 * MIB - 1, 1 * MIB),
        (256 * MIB, 2 * MIB),
        (2048 * MIB, 16 * MIB),
        (1 << 40, 16 * MIB),
    ],
)
def test_superblock_follows_the_capacity(size_bytes, superblock_bytes):
    assert Geometry.for_capacity(size_bytes).superblock_bytes == superblock_bytes


@pytest.mark.parametrize("size_bytes", [-1, 0, 16 * MIB - 1])
def test_too_small(size_bytes):
    with pytest.raises(ValueError, match="at least 16 MiB"):
        Geometry.for_capacity(size_bytes)


@pytest.mark.parametrize("page_size", [0, 5000, 128 * KIB])
def test_for_capacity_with_a_bad_page_size(page_size):
    with pytest.raises(ValueError, match="page_size"):
        Geometry.for_capacity(64 * MIB, page_size)


def test_too_large():
    with pytest.raises(ValueError, match="num_superblocks"):
        Geometry.for_capacity(1 << 60)
