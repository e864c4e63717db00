"""A mounted drive is used by the same interface, and answers as the drive's file does."""

import inspect

import pytest

import kvfs
from kvfs.remote.remote_sequence import RemoteSequence
from kvfs.remote.remote_store import RemoteStore

from .. import test_bad_input, test_store
from .owner import Served


def public(kind):
    """name: signature of a method, None of a property."""
    found = {}
    for name, member in inspect.getmembers(kind):
        if not name.startswith("_") or name in ("__enter__", "__exit__"):
            signature = inspect.signature(member) if callable(member) else None
            found[name] = signature and [(p.name, p.kind, p.default) for p in signature.parameters.values()]
    return found


@pytest.mark.parametrize(("ours", "theirs"), [(kvfs.Store, RemoteStore), (kvfs.Sequence, RemoteSequence)])
def test_same_methods(ours, theirs):
    """A method that only the drive's owner has makes a program fail when it is run through the mount."""
    assert public(theirs) == public(ours)


class _OpenedRemotely(RemoteStore):
    """Closes its owner as well."""

    def __init__(self, served):
        self._served = served
        super().__init__(served.invite())

    def close(self):
        try:
            super().close()
        finally:
            self._served.server.close()
            self._served.store.close()


@pytest.fixture(autouse=True)
def remote_kvfs_open(monkeypatch, tmp_path_factory):
    """kvfs.open of a drive's file: it is opened and served, and what is returned is a client's store."""
    open_drive = kvfs.open

    def open_remotely(path, **options):
        store = open_drive(path, **options)
        return _OpenedRemotely(Served(store, tmp_path_factory.mktemp("mount"), memory_bytes=2 << 20))

    monkeypatch.setattr(kvfs, "open", open_remotely)


def for_clients(modules, of_the_owner):
    """The store's own tests, on a client's store; those that look inside, or at files, say nothing of it."""
    return {
        name: test
        for module in modules
        for name, test in vars(module).items()
        if name.startswith("test_") and name not in of_the_owner
    }


_OF_THE_OWNER = {
    "test_attention_leaves_nothing_behind",
    "test_attend_waits_for_no_spill",
    "test_groups_written_in_small_pieces_end_in_one",
    "test_tails_stay_within_their_memory",
    "test_corrupt_page_is_an_error_with_facts",
    "test_files_that_are_no_drive",
    "test_drive_of_a_newer_version",
    "test_drive_open_elsewhere",
    "test_format_refuses",
    "test_options_of_open",
    "test_every_error_has_an_errno",
    "test_sizes",
}
globals().update(for_clients((test_store, test_bad_input), _OF_THE_OWNER))
sequence = test_bad_input.sequence
