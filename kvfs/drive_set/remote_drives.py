"""The drives of a set that another process has open: what Drives does, asked of the owner."""

from collections.abc import Callable
from dataclasses import asdict

from kvfs.drive_set.drives import Drives, Progress
from kvfs.errors import InvalidArgument, NotPermitted
from kvfs.remote.remote_store import RemoteStore


class RemoteDrives:
    """As Drives, of a RemoteStore."""

    def __init__(self, store: RemoteStore):
        self._store = store

    def states(self) -> list[dict]:
        return self._ask("states")

    def add(self, location: str) -> None:
        self._ask("add", location=location)

    def drain(self, drive: str, progress: Callable[[int, int], None] | None = None) -> None:
        """As Drives.drain. The owner goes on as long as it is asked to: it can be ended at any time."""
        Drives.drain(self, drive, progress)

    def drain_step(self, drive: str) -> Progress:
        return Progress(**self._ask("drain_step", drive=drive))

    def stay(self, drive: str) -> None:
        self._ask("stay", drive=drive)

    def bring_back(self, drive: str, location: str | None = None) -> None:
        self._ask("bring_back", drive=drive, location=location)

    def forget(self, sequence: str) -> None:
        self._ask("forget", sequence=sequence)

    def remove_lost(self, drive: str) -> None:
        self._ask("remove_lost", drive=drive)

    def _ask(self, verb: str, **arguments):
        return self._store._call("drives", verb=verb, arguments=arguments)


VERBS = ("states", "add", "drain_step", "stay", "bring_back", "forget", "remove_lost")


def answer(session, verb: str, arguments: dict):
    """The owner's side, for a client's session. Raises NotPermitted to all but administrators."""
    if verb not in VERBS or not isinstance(arguments, dict):
        raise InvalidArgument(f"{verb!r} is nothing that drives are asked for")
    if verb != "states" and not session.client.is_administrator:
        raise NotPermitted(f"the set's drives are not for user {session.client.uid} to change")
    if verb != "states":
        session.check_writable()
    found = getattr(drives_of(session.store), verb)(**arguments)
    return asdict(found) if isinstance(found, Progress) else found


def drives_of(store) -> Drives | RemoteDrives:
    """The drives of a store, wherever it is open. Raises InvalidArgument for a store on one drive."""
    if isinstance(store, RemoteStore):
        return RemoteDrives(store)
    drives = getattr(store, "drives", None)
    if drives is None:
        raise InvalidArgument(f"{store.path} is one drive, not a set of them: kvfsctl format makes a set")
    return drives
