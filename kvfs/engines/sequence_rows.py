"""The sequences of one cache: one per row of the batch, found, created and rearranged by name."""

from kvfs.engines.errors import CacheMismatch
from kvfs.errors import NoSuchSequence


def row_names(name, num_rows):
    """`chat-42` for a single row, `chat-42.0`, `chat-42.1`, ... for a batch."""
    return [name] if num_rows == 1 else [f"{name}.{row}" for row in range(num_rows)]


def find_rows(store, name):
    """The stored sequences of cache `name`, in row order; [] when there are none."""
    single = _find(store, name)
    if single is not None:
        return [single]
    rows = []
    while (row := _find(store, f"{name}.{len(rows)}")) is not None:
        rows.append(row)
    return rows


def create_rows(store, model, name, num_rows, attributes):
    """New empty sequences for a batch of `num_rows`."""
    return [store.create_sequence(model, row_name, attributes) for row_name in row_names(name, num_rows)]


def check_same_model(rows):
    """The one model of all rows; raises CacheMismatch when they differ (names of several caches mixed up)."""
    names = {row.model.name for row in rows}
    if len(names) > 1:
        raise CacheMismatch(f"sequences {[row.name for row in rows]} belong to several models: {sorted(names)}")
    return rows[0].model


def rearranged_rows(store, name, rows, sources, attributes):
    """Make row r of the new batch a copy of row sources[r] of the old one (beams, candidates, selections).

    Copies are forks and share their stored groups. Rows that stay where they are are not touched; the others
    are forked under a temporary name first, since a row may be needed by several after its own place is taken.

    Returns the new rows; old rows that nobody continues are deleted.
    """
    names = row_names(name, len(sources))
    forks = {}
    for target, source in enumerate(sources):
        if rows[source].name != names[target]:
            temporary = f"{names[target]}.rearranging"
            _delete_if_there(store, temporary)  # left by a killed process
            fork = rows[source].fork(temporary)
            for attribute, value in attributes.items():
                fork.set_attribute(attribute, value)
            forks[target] = temporary
    kept = {names[target] for target in range(len(sources)) if target not in forks}
    for row in rows:
        if row.name not in kept:
            store.delete_sequence(row.name)
    for target, temporary in forks.items():
        store.rename_sequence(temporary, names[target])
    return [store.sequence(row_name) for row_name in names]


def _find(store, name):
    try:
        return store.sequence(name)
    except NoSuchSequence:
        return None


def _delete_if_there(store, name):
    if _find(store, name) is not None:
        store.delete_sequence(name)
