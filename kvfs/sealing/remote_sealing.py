"""Sealing of a store that another process owns: what crosses to it, and what the owner makes of it.

Whoever may change a sequence may have it sealed. What a model's sequences are sealed as, and what all of them
have, is for root and whoever mounted.
"""

from collections.abc import Iterable
from dataclasses import asdict

from kvfs.derived import DerivedSegment
from kvfs.errors import InvalidArgument, NotPermitted
from kvfs.model import Model
from kvfs.sealing.derived_catalogue import DerivedUsage
from kvfs.sealing.interface import derives_of, names_of
from kvfs.sealing.policy import derive_of, name_of
from spdk_glue.vendor_command import Derive


class RemoteSealingStore:
    """What RemoteStore adds for it; see SealingStore."""

    def set_sealing(self, model: Model, seal: Iterable[str]) -> None:
        """See Store.set_sealing; for root and whoever mounted."""
        self._check_own(model)
        self._call("set_sealing", model=model.name, seal=names_of(derives_of(seal)))

    def sealing(self, model: Model) -> tuple[str, ...]:
        """What `set_sealing` has asked for."""
        self._check_own(model)
        return tuple(self._call("sealing", model=model.name))

    def derived_usage(self) -> list[DerivedUsage]:
        """See Store.derived_usage."""
        return [DerivedUsage(**usage) for usage in self._call("derived_usage")]

    def drop_derived(self, model: str | None = None, derive: str | None = None) -> int:
        """See Store.drop_derived; for root and whoever mounted."""
        name = None if derive is None else name_of(derive_of(derive))
        return self._call("drop_derived", model=model, derive=name)


class RemoteSealedSequence:
    """What RemoteSequence adds for it; see SealedSequence."""

    def derived_segments(self, derive: str | Derive) -> list[DerivedSegment]:
        """See Sequence.derived_segments."""
        kind = derive_of(derive)
        found = self._call("derived_segments", derive=name_of(kind))
        return [DerivedSegment(**{**segment, "derive": kind}) for segment in found]

    def seal(self, derive: str | Derive = "sketch") -> int:
        """See Sequence.seal."""
        return self._call("seal", derive=name_of(derive_of(derive)))

    def reseal(self, derive: str | Derive | None = None) -> int:
        """See Sequence.reseal."""
        return self._call("reseal", derive=None if derive is None else name_of(derive_of(derive)))


# the owner's side: calls as in remote/calls.py


def set_sealing(session, model, seal) -> None:
    _check_administrator(session, f"what is derived of model {model!r}")
    session.store.set_sealing(session.store.model(model), _names(seal))


def sealing(session, model) -> list[str]:
    return list(session.store.sealing(session.store.model(model)))


def derived_usage(session) -> list[dict]:
    return [asdict(usage) for usage in session.store.derived_usage()]


def drop_derived(session, model, derive) -> int:
    _check_administrator(session, "derived data of all sequences")
    return session.store.drop_derived(model, derive)


def derived_segments(session, handle, derive) -> list[dict]:
    return [asdict(segment) for segment in session.readable(handle).derived_segments(derive)]


def seal(session, handle, derive) -> int:
    return session.writable(handle).seal(derive)


def reseal(session, handle, derive) -> int:
    return session.writable(handle).reseal(derive)


def seal_new_model(session, model: Model, is_new: bool, seal) -> None:
    """What add_model asks for: of one that is there already it is the administrator's to change."""
    if not is_new and list(session.store.sealing(model)) != names_of(derives_of(_names(seal))):
        _check_administrator(session, f"what is derived of model {model.name!r}")
    session.store.set_sealing(model, seal)


def _names(seal) -> list:
    if not isinstance(seal, list):
        raise InvalidArgument(f"what is to be derived is a list of names, not {seal!r}")
    return seal


def _check_administrator(session, what: str) -> None:
    session.check_writable()
    if not session.client.is_administrator:
        raise NotPermitted(f"{what} is not for user {session.client.uid} to change")


CALLS = (set_sealing, sealing, derived_usage, drop_derived, derived_segments, seal, reseal)
