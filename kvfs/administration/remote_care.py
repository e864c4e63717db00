"""A mounted drive's care, asked of the process that owns it."""

from kvfs.errors import InvalidArgument, NotPermitted

LOOKING = {"drives", "health", "superblocks"}
CHANGING = {"collect", "renew"}
VERBS = LOOKING | CHANGING | {"drop_cache", "allocated", "lost", "owner", "check_rows"}


class RemoteDriveCare:
    """As LiveDriveCare. store: a RemoteStore; drive: its location."""

    def __init__(self, store, drive: str):
        self._store, self._drive = store, drive

    def health(self) -> dict:
        return self._ask("health")

    def superblocks(self) -> list[dict]:
        return self._ask("superblocks")

    def collect(self, max_superblocks: int = 0) -> int:
        return self._ask("collect", max_superblocks=max_superblocks)

    def renew(self) -> int:
        return self._ask("renew")

    def drop_cache(self) -> int:
        return self._ask("drop_cache")

    def allocated(self) -> list[list[int]]:
        return self._ask("allocated")

    def lost(self, first_lba: int, num_lbas: int) -> list[dict]:
        return self._ask("lost", first_lba=first_lba, num_lbas=num_lbas)

    def owner(self, lba: int) -> dict:
        return self._ask("owner", lba=lba)

    def check_rows(self) -> list[dict]:
        return self._ask("check_rows")

    def _ask(self, verb: str, **arguments):
        return self._store._call("care", verb=verb, drive=self._drive, arguments=arguments)


def remote_cares(store) -> dict[str, RemoteDriveCare]:
    """By location, each drive of a RemoteStore."""
    drives = store._call("care", verb="drives", drive=None, arguments={})
    return {drive: RemoteDriveCare(store, drive) for drive in drives}


def care(session, verb, drive, arguments: dict):
    """The owner's side, for a client's session. Raises NotPermitted; all may look."""
    from kvfs.administration.drive_care import cares_of  # which opens stores, and those know of sessions

    if verb not in VERBS or not isinstance(arguments, dict):
        raise InvalidArgument(f"{verb!r} is nothing that a drive is asked for")
    if verb not in LOOKING and not session.client.is_administrator:
        raise NotPermitted(f"the drive is not for user {session.client.uid} to look after")
    if verb in CHANGING:
        session.check_writable()
    cares = cares_of(session.store)
    if verb == "drives":
        return list(cares)
    if drive not in cares:
        raise InvalidArgument(f"no drive {drive!r} here: there are {', '.join(cares)}")
    try:
        return getattr(cares[drive], verb)(**arguments)
    except TypeError as error:
        raise InvalidArgument(f"{verb}: {error}") from error
