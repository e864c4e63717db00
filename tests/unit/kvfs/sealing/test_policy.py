"""Which segments are made next, by a policy that is only arithmetic."""

import pytest

from kvfs.errors import InvalidArgument
from kvfs.sealing.policy import DERIVES, derive_of, next_segment
from spdk_glue.vendor_command import Derive

FULL = 8


def grown(num_groups, derive=Derive.SKETCH, at_once=False, have=None, step=1):
    """(segments, groups written) of a sequence that has grown to so many groups, sealed after every `step`."""
    have, written = dict(have or {}), 0
    for complete in range(step, num_groups + 1, step):
        while (found := next_segment(complete, FULL, have, derive, at_once)) is not None:
            first, count = found
            assert count > have.get(first, 0) and first + count <= complete and first % FULL == 0
            have[first] = count
            written += count
    return have, written


def test_growing_by_single_groups():
    """Decode: each group is sealed soon, and short segments together cost less than the full one."""
    assert grown(2 * FULL + 7) == ({0: 8, 8: 8, 16: 4}, 2 * (1 + 2 + 4 + 8) + 1 + 2 + 4)
    for num_groups in range(1, 40):
        have, written = grown(num_groups)
        assert 2 * sum(have.values()) > num_groups
        assert written < 2 * num_groups


def test_prefill_at_once():
    """What comes at once is written once, or a power of two of what is left over."""
    assert grown(21, step=21) == ({0: 8, 8: 8, 16: 4}, 20)
    assert grown(21, at_once=True, step=21) == ({0: 8, 8: 8, 16: 5}, 21)
    assert grown(21, at_once=True, step=21, have={16: 4}) == ({0: 8, 8: 8, 16: 5}, 21)


def test_channel_major_copies_do_not_grow():
    """They have a page for each channel however short they are."""
    assert grown(21, Derive.CHANNEL_MAJOR_KEYS) == ({0: 8, 8: 8}, 16)
    assert grown(3, Derive.CHANNEL_MAJOR_KEYS, at_once=True, step=3) == ({0: 3}, 3)


def test_refused_ones_are_left_out():
    """One that cannot be made stops none of the others."""
    refused = {(8, 8)}
    assert next_segment(24, 8, {0: 8}, Derive.SKETCH, False, lambda *one: one in refused) == (16, 8)


def test_names():
    """As users write them."""
    assert derive_of("sketch") is derive_of(Derive.SKETCH) is DERIVES["sketch"]
    for wrong in ("", "compact", Derive.COMPACT, None, 4, Derive.SKETCH | Derive.COMPACT):
        with pytest.raises(InvalidArgument, match="channel_major_keys"):
            derive_of(wrong)
