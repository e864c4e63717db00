"""How much X pays: the share of layers whose inputs X are stored instead of K and V.

While the drive attends to the other layers from its flash, X crosses the link and the host computes K and V of
it. The share is right when both take the same time. rho = |X| / |K + V| = group_size / 2, where group_size
query heads share a KV head: with multi-head attention X is half as long, with a group of two nothing is saved.
"""

from kvfs.errors import InvalidArgument

DRIVE, HOST = "drive", "host"
PLACEMENTS = (DRIVE, HOST)


def best_share(link_bandwidth: float, drive_bandwidth: float, group_size: int, placement: str = DRIVE) -> float:
    """alpha, 0 to 1. Bandwidths in bytes/s: of the link, and of the drive's inside.

    X on the drive: t_link = alpha * rho / link, t_drive = (1 - alpha + alpha * rho) / drive; for multi-head
    attention alpha = 2 link / (drive + link). In host memory the drive has 1 - alpha to read. Raises
    InvalidArgument.
    """
    check_placement(placement)
    for name, value in (
        ("link_bandwidth", link_bandwidth),
        ("drive_bandwidth", drive_bandwidth),
        ("group_size", group_size),
    ):
        if not value > 0:
            raise InvalidArgument(f"{name} is above zero, not {value}")
    return share_of(rho_of(group_size), link_bandwidth, drive_bandwidth, placement)


def rho_of(group_size: float) -> float:
    """Bytes of X over those of K and V, in a model as wide as its query heads."""
    return group_size / 2


def share_of(rho: float, link: float, drives: float, placement: str = DRIVE) -> float:
    """alpha for any rho. Bandwidths in bytes/s: of the link, and of all drives' insides together."""
    if placement == HOST:
        return link / (rho * drives + link)
    if rho >= 1:
        return 0.0
    return min(1.0, link / (rho * drives + (1 - rho) * link))


def seconds_of(
    share: float, rho: float, kv_bytes: float, link: float, drives: float, placement: str = DRIVE
) -> tuple[float, float]:
    """How long (drives, link) are busy where a share of kv_bytes of K and V is stored as X."""
    from_drives = (1 - share) + (share * rho if placement == DRIVE else 0)
    return kv_bytes * from_drives / drives, kv_bytes * share * rho / link


def layers_of_share(share: float, num_layers: int) -> list[int]:
    """Which layers keep X: as many as the share is nearest to, spread evenly, so that there is always something
    for the drive to do while X of the next one comes. Raises InvalidArgument."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise InvalidArgument(f"x_share is a number from 0 to 1, not {share!r}")
    count = round(share * num_layers)
    return [
        layer for layer in range(num_layers) if (layer + 1) * count // num_layers > layer * count // num_layers
    ]


def check_placement(placement: str) -> None:
    """Raises InvalidArgument."""
    if placement not in PLACEMENTS:
        raise InvalidArgument(f"x_placement is one of {', '.join(PLACEMENTS)}, not {placement!r}")
