"""What a drive, or a set of drives, is to have evicted unasked."""

from dataclasses import dataclass

from kvfs.errors import InvalidArgument

LOW_BELOW_HIGH = 10  # percent, where nothing else is said


@dataclass(frozen=True)
class Background:
    """expired: sequences that have outlived their time to live go.

    high_percent: of a drive in use: from there on those used longest ago go, until low_percent are in use;
    None: however full it is
    """

    expired: bool = False
    high_percent: int | None = None
    low_percent: int | None = None

    @property
    def is_on(self) -> bool:
        return self.expired or self.high_percent is not None


OFF = Background()


def checked_background(expired: bool, high_percent: int | None, low_percent: int | None) -> Background:
    """Raises InvalidArgument."""
    if high_percent is None:
        if low_percent is not None:
            raise InvalidArgument("low_percent is how far an eviction goes that high_percent begins: give both")
        return Background(bool(expired))
    if type(high_percent) is not int or not 1 <= high_percent <= 99:
        raise InvalidArgument(f"high_percent is 1 to 99, not {high_percent!r}")
    low = max(0, high_percent - LOW_BELOW_HIGH) if low_percent is None else low_percent
    if type(low) is not int or not 0 <= low <= high_percent:
        raise InvalidArgument(f"low_percent is 0 to high_percent, not {low_percent!r}")
    return Background(bool(expired), high_percent, low)
