"""Which segments a sequence should have: whole ones, and behind them one that grows by powers of two.

Segments begin at multiples of their full length, so forks that share groups share segments. What is behind the
last full one is sealed at 1, 2, 4 .. groups, each replacing the one before: together the shorter ones are
written less than once for each full one, and more than half of what is complete is sealed at any time. A
channel-major copy has a page for each channel however few its tokens, so of those the shorter ones are made
only where one asks.
"""

from collections.abc import Callable, Mapping

from kvfs.errors import InvalidArgument
from spdk_glue.vendor_command import Derive

GROWING = {Derive.SKETCH}  # layouts whose last segment grows
DERIVES = {derive.name.lower(): derive for derive in (Derive.SKETCH, Derive.CHANNEL_MAJOR_KEYS)}


def derive_of(name: "str | Derive") -> Derive:
    """A layout by its name. Raises InvalidArgument."""
    if isinstance(name, Derive) and name in DERIVES.values():
        return name
    if not isinstance(name, str) or name not in DERIVES:
        raise InvalidArgument(f"derived data are among {', '.join(DERIVES)}, not {name!r}")
    return DERIVES[name]


def name_of(derive: Derive) -> str:
    return derive.name.lower()


def next_segment(
    num_groups: int,
    full: int,
    have: Mapping[int, int],
    derive: Derive,
    at_once: bool,
    is_refused: Callable[[int, int], bool] = lambda first, count: False,
) -> tuple[int, int] | None:
    """(first group, number of groups) of the first segment that is missing or too short; None: all is well.

    num_groups: complete ones; full: groups of a full segment; have: groups sealed, by the first one
    at_once: seal all that is complete, whatever comes next
    """
    for first in range(0, num_groups, full):
        count = min(full, num_groups - first)
        if count < full and not at_once:
            count = 1 << count.bit_length() - 1 if derive in GROWING else 0
        if have.get(first, 0) < count and not is_refused(first, count):
            return first, count
    return None
