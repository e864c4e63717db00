"""Calls that come seldom: their arguments and results are JSON. Bytes travel as text, one character each."""

from dataclasses import asdict

from kvfs.administration.remote_care import care
from kvfs.errors import InvalidArgument, NotPermitted
from kvfs.head_pieces import HeadRows
from kvfs.model import Model
from kvfs.objects import remote_objects
from kvfs.prefix import remote_reuse
from kvfs.remote.rights import Client
from kvfs.sealing import remote_sealing
from kvfs.sequence_attributes import GID, IMPORTING, MODE, OWNER, UID
from kvfs.sequence_version import Version
from kvfs.space import remote_space
from kvfs.telemetry import remote_telemetry

BYTES_AS_TEXT = "latin-1"
USER_PREFIX = "user."  # other attributes are kvfs's own: the owner of a sequence is one
NEW_SEQUENCE_MODE = b"%d" % 0o755
GOES_ALONG = frozenset((IMPORTING, OWNER))  # a sequence with one of these, with the client that made it so


def model_facts(model: Model) -> dict:
    return {
        "id": model.id,
        "name": model.name,
        "geometry": asdict(model.geometry),
        "page_size": model.layout.page_size,
    }


# of the store


def add_model(session, name, geometry: dict, seal: list | None = None) -> dict:
    is_new = name not in [known.name for known in session.store.models()]
    if is_new:
        session.check_writable()
    model = session.store.add_model(name, **geometry)
    if seal is not None:
        remote_sealing.seal_new_model(session, model, is_new, seal)
    return model_facts(model)


def model(session, name) -> dict:
    return model_facts(session.store.model(name))


def models(session) -> list[dict]:
    return [model_facts(model) for model in session.store.models()]


def create_sequence(session, model, name, attributes: dict) -> dict:
    session.check_writable()
    for attribute in attributes:
        _check_attribute_is_users(session, attribute)
    values = {attribute: _bytes(value) for attribute, value in attributes.items()}
    model = session.store.model(model)
    sequence = session.store.create_sequence(model, name, _ownership(session.client) | values)
    if GOES_ALONG.intersection(values):
        session.going_along.add(sequence)
    return session.hold(sequence)


def _ownership(client: Client) -> dict[str, bytes]:
    """Attributes of what a client makes: it is its user's, as a folder made in the mount would be."""
    if client.is_administrator:
        return {}
    return {MODE: NEW_SEQUENCE_MODE, UID: b"%d" % client.uid, GID: b"%d" % client.gid}


def _bytes(value) -> bytes:
    try:
        return value.encode(BYTES_AS_TEXT)
    except (AttributeError, UnicodeEncodeError) as error:
        raise InvalidArgument(f"an attribute's value is bytes sent as text, not {value!r}") from error


def sequence(session, name) -> dict:
    return session.hold(session.store.sequence(name))


def sequences(session) -> list[dict]:
    return [session.hold(sequence) for sequence in session.store.sequences()]


def catalogue_rows(session) -> list[dict]:
    return [asdict(row) for row in session.store.catalogue_rows()]


def delete_sequences(session, names) -> None:
    for name in names:
        session.check_may_change(session.store.sequence(name))
    session.store.delete_sequences(names)


def rename_sequence(session, old_name, new_name) -> None:
    session.check_may_change(session.store.sequence(old_name))
    session.store.rename_sequence(old_name, new_name)


def flush_store(session) -> None:
    session.store.flush()
    session.check_posted()


def restore_prefix(session, name, attributes: dict, **asked) -> dict:
    session.check_writable()
    for attribute in attributes:
        _check_attribute_is_users(session, attribute)
    values = {attribute: _bytes(value) for attribute, value in attributes.items()}
    sequence = remote_reuse.restored(
        session, **asked, name=name, attributes=_ownership(session.client) | values
    )
    return session.hold(sequence)


def check(session) -> list[str]:
    return session.store.check()


def drives(session, verb, arguments: dict):
    """Of a set of drives: see drive_set/remote_drives.py."""
    from kvfs.drive_set import remote_drives  # which asks by way of a RemoteStore, and that by these calls

    return remote_drives.answer(session, verb, arguments)


# of one sequence


def facts(session, handle) -> dict:
    """What may be known by all: a folder of the mount shows it."""
    sequence = session.held(handle).sequence
    names = ("id", "name", "created_ns", "changed_ns", "is_deleted", "num_token_ids")
    return {name: getattr(sequence, name) for name in names}


def version(session, handle) -> dict:
    return asdict(session.held(handle).sequence.version())


def holds(session, handle, version: dict) -> bool:
    return session.held(handle).sequence.holds(Version(**version))


def read_heads(session, handle, layer, kind, head, start, stop) -> memoryview:
    return session.readable(handle).read_heads([HeadRows(layer, kind, head, start, stop)])


def attributes(session, handle) -> dict[str, str]:
    return {name: value.decode(BYTES_AS_TEXT) for name, value in session.readable(handle).attributes().items()}


def set_attribute(session, handle, name, value) -> None:
    _check_attribute_is_users(session, name)
    sequence = session.writable(handle)
    sequence.set_attribute(name, _bytes(value))
    if name in GOES_ALONG:
        session.going_along.add(sequence)


def remove_attribute(session, handle, name) -> None:
    _check_attribute_is_users(session, name)
    sequence = session.writable(handle)
    sequence.remove_attribute(name)
    if not GOES_ALONG.intersection(sequence.attributes()):
        session.going_along.discard(sequence)


def _check_attribute_is_users(session, name) -> None:
    if not isinstance(name, str):
        raise InvalidArgument(f"an attribute's name is text, not {name!r}")
    if not name.startswith(USER_PREFIX) and name != IMPORTING and not session.client.is_administrator:
        raise NotPermitted(f"attribute {name} is not for user {session.client.uid} to change")


def flush_sequence(session, handle) -> None:
    session.readable(handle).flush()


def truncate(session, handle, num_tokens) -> None:
    session.writable(handle).truncate(num_tokens)


def fork(session, handle, name) -> dict:
    session.check_writable()
    child = session.readable(handle).fork(name)
    for attribute, value in _ownership(session.client).items():
        child.set_attribute(attribute, value)
    return session.hold(child)


def compact(session, handle) -> None:
    session.writable(handle).compact()


CALLS = {
    call.__name__: call
    for call in (
        add_model,
        model,
        models,
        create_sequence,
        sequence,
        sequences,
        catalogue_rows,
        delete_sequences,
        rename_sequence,
        flush_store,
        check,
        drives,
        care,
        remote_reuse.find_prefix,
        restore_prefix,
        remote_reuse.prefix_usage,
        remote_reuse.drop_prefixes,
        facts,
        version,
        holds,
        read_heads,
        attributes,
        set_attribute,
        remove_attribute,
        flush_sequence,
        truncate,
        fork,
        compact,
        remote_reuse.publish,
        *remote_objects.CALLS,
        *remote_sealing.CALLS,
        *remote_telemetry.CALLS,
        *remote_space.CALLS,
    )
}
