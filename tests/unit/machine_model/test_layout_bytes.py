"""Bytes of a step are those of the layout that the real drive reads."""

import pytest

from kvfs.layout import GroupLayout, KvGeometry
from machine_model import layout_bytes, load_machine
from machine_model.flash_time import program_time, read_time
from machine_model.layout_bytes import SPARF_PAGES_TOUCHED, pages_touched
from spdk_glue.vendor_command import ATTENTION_HEADER, ATTENTION_ITEM, GROUP_EXTENT

OPT = KvGeometry(40, 40, 40, 128)
GROUPED = KvGeometry(80, 64, 8, 128)
PAGE = 4096


def test_dense_pages_are_the_groups():
    """K and V of a head: 16 tokens a page each."""
    assert layout_bytes.dense_pages(OPT, 1024, PAGE).total == 2 * 64
    layout = GroupLayout(OPT, PAGE)
    assert layout_bytes.dense_pages(OPT, 256, PAGE).total * OPT.num_kv_heads == layout.layer_lbas


def test_sparf_reads_pages_not_tokens():
    """The trap: published as an eighth of the bytes, it touches several times as many pages."""
    dense = layout_bytes.dense_pages(OPT, 2048, PAGE).total
    found = layout_bytes.sparf_pages(OPT, 2048, PAGE, 8.0)
    assert found.ordered == 16 + 1  # 16 of 128 channels, a page each of 2,048 tokens, and the mean of V
    assert found.scattered == 2 * round(SPARF_PAGES_TOUCHED * 128 + 0.5)
    assert layout_bytes.sparf_ideal_pages(OPT, 2048, PAGE, 8.0).total == dense / 8
    assert 0.3 < found.total / dense < 0.5


def test_query_heads_that_share_a_head_read_the_union():
    """More of the pages, so that there is little left to gain."""
    alone = layout_bytes.sparf_pages(OPT, 8192, PAGE, 8.0).total
    together = layout_bytes.sparf_pages(GROUPED, 8192, PAGE, 8.0).total
    dense = layout_bytes.dense_pages(OPT, 8192, PAGE).total
    assert alone < 0.45 * dense
    assert together > 0.9 * dense


def test_tokens_that_are_not_sealed_are_read_dense():
    """Sketches and channels exist of whole groups only."""
    for pages in (layout_bytes.sketched_pages, layout_bytes.sparf_pages):
        assert pages(OPT, 240, PAGE, 8.0).total == layout_bytes.dense_pages(OPT, 240, PAGE).total


@pytest.mark.parametrize("compression", [2.0, 4.0, 8.0])
def test_sketches_keep_to_their_budget(compression):
    """4 / 3c of the dense pages, as the drive has it."""
    dense = layout_bytes.dense_pages(OPT, 65_536, PAGE).total
    share = layout_bytes.sketched_pages(OPT, 65_536, PAGE, compression).total / dense
    assert share == pytest.approx(min(4 / 3 / compression, share), rel=0.02)


def test_touched_pages_between_known_points():
    """The measured share at the measured point; all pages for all tokens."""
    assert pages_touched(16, 1 / 16) == pytest.approx(SPARF_PAGES_TOUCHED)
    assert pages_touched(16, 1 - 1e-12) == pytest.approx(1.0)
    assert pages_touched(1, 1 / 16) < 1 / 16 + 1e-9


def test_command_bytes_are_the_records():
    """The link carries descriptors, queries and answers, nothing of K and V."""
    found = layout_bytes.command_bytes(OPT, 2 * 40, 1024)
    records = ATTENTION_HEADER.itemsize + 2 * ATTENTION_ITEM.itemsize + 2 * 4 * GROUP_EXTENT.itemsize
    assert found.submit == records + 2 * 40 * 128 * 2
    assert found.answer > 2 * 40 * 128 * 4


def test_flash_is_as_fast_as_its_channels_or_the_path_behind():
    """The virtual clock's own pipeline, in long runs."""
    drive = load_machine("instinfer").drive
    assert PAGE / read_time(drive).page == pytest.approx(8 * 1.4e9 * 0.85, rel=0.02)
    drive = load_machine("inf2").drive
    assert PAGE / read_time(drive).page == pytest.approx(3.0e9, rel=0.02)
    assert read_time(drive).first > drive.read_seconds


def test_scattered_pages_wait_for_dies():
    """A page alone on its row costs a whole read of the die."""
    drive = load_machine("instinfer").drive
    few, all_pages = read_time(drive, 1 / 16).page, read_time(drive).page
    assert few > 1.5 * all_pages
    assert few >= drive.read_seconds / (drive.channels * drive.dies_per_channel) / 4


def test_programming_waits_for_dies():
    """tPROG over all planes."""
    drive = load_machine("instinfer").drive
    planes = drive.channels * drive.dies_per_channel * drive.planes_per_die
    assert program_time(drive).page == pytest.approx(
        max(drive.program_seconds / planes, PAGE / 9.52e9), rel=0.05
    )
