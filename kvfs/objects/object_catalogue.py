"""What the catalogue knows of objects: which caches there are, whose objects, and where each one lies.

Rows follow the index in memory (cache_index.py), gathered and written with a flush. An object's row is written
after its data, and its blocks are given back after its row. Nothing looks an object up here: a cache is read as
a whole when it is opened.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvfs.allocator import Extent

OBJECT_SCHEMA = """
CREATE TABLE object_cache (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    capacity_bytes INTEGER         -- null: what the drive has
) STRICT;
CREATE TABLE object_identity (
    id INTEGER PRIMARY KEY,
    cache_id INTEGER NOT NULL REFERENCES object_cache(id),
    identity TEXT NOT NULL,        -- JSON: what the objects' bytes depend on beside the key
    UNIQUE (cache_id, identity)
) STRICT;
CREATE TABLE object (
    id INTEGER PRIMARY KEY,
    identity_id INTEGER NOT NULL REFERENCES object_identity(id),
    key BLOB NOT NULL,             -- up to 64 bytes
    num_bytes INTEGER NOT NULL,
    last_use INTEGER NOT NULL,     -- higher: used later
    extents BLOB NOT NULL          -- <u8 pairs: first LBA, number of LBAs
) STRICT;
"""
OBJECT_TABLES = ("object", "object_identity", "object_cache")
MAX_KEY_BYTES = 64
ROW_BYTES = 160  # of an object, generously
_ROWS_READ_AT_ONCE = 4096
_EXTENT = struct.Struct("<QQ")


@dataclass(frozen=True)
class CacheRow:
    id: int
    name: str
    capacity_bytes: int | None


@dataclass(frozen=True)
class ObjectRow:
    id: int
    identity_id: int
    key: bytes
    num_bytes: int
    last_use: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class CacheUsage:
    """What of one cache is stored: bytes in whole blocks. identities: how many its objects are of."""

    name: str
    capacity_bytes: int | None
    identities: int
    objects: int
    bytes: int


def pack_extents(extents: Iterable[Extent]) -> bytes:
    return b"".join(_EXTENT.pack(*extent) for extent in extents)


def unpack_extents(packed: bytes) -> tuple[Extent, ...]:
    """Of a damaged row what can be read."""
    whole = len(packed) - len(packed) % _EXTENT.size
    return tuple(_EXTENT.iter_unpack(packed[:whole]))


class ObjectCatalogue:
    """db: the catalogue's connection; transaction: its context manager; rows_at_once: that one transaction
    takes; block_bytes: of the blocks that objects lie in."""

    def __init__(self, db, transaction, rows_at_once: int, block_bytes: int):
        self._db = db
        self._transaction = transaction
        self._rows_at_once = rows_at_once
        self._block_bytes = block_bytes

    # caches

    def cache(self, name: str) -> CacheRow | None:
        row = self._db.execute(
            "SELECT id, name, capacity_bytes FROM object_cache WHERE name = ?", (name,)
        ).fetchone()
        return row and CacheRow(*row)

    def caches(self) -> list[CacheRow]:
        rows = self._db.execute("SELECT id, name, capacity_bytes FROM object_cache ORDER BY name")
        return [CacheRow(*row) for row in rows]

    def add_cache(self, name: str) -> CacheRow:
        with self._transaction():
            self._db.execute("INSERT INTO object_cache (name) VALUES (?)", (name,))
            return CacheRow(self._db.last_insert_rowid(), name, None)

    def set_capacity(self, cache_id: int, capacity_bytes: int | None) -> None:
        with self._transaction():
            self._db.execute(
                "UPDATE object_cache SET capacity_bytes = ? WHERE id = ?", (capacity_bytes, cache_id)
            )

    def identity(self, cache_id: int, identity: str) -> int:
        """Its number, a new one if it is new."""
        query = "SELECT id FROM object_identity WHERE cache_id = ? AND identity = ?"
        found = self._db.execute(query, (cache_id, identity)).get
        if found is not None:
            return found
        with self._transaction():
            self._db.execute(
                "INSERT INTO object_identity (cache_id, identity) VALUES (?, ?)", (cache_id, identity)
            )
            return self._db.last_insert_rowid()

    def drop_other_identities(self, cache_id: int, kept: Iterable[int]) -> None:
        """Those of a cache that are not to be kept, because they have no objects."""
        rows = self._db.execute("SELECT id FROM object_identity WHERE cache_id = ?", (cache_id,))
        unused = {number for (number,) in rows} - {*kept}
        with self._transaction():
            self._db.executemany("DELETE FROM object_identity WHERE id = ?", [(each,) for each in unused])

    def usage(self) -> list[CacheUsage]:
        """Of all caches as their rows are, by name. Reads all objects' rows."""
        rows = self._db.execute(
            "SELECT name, capacity_bytes, count(DISTINCT identity_id), count(object.id),"
            " coalesce(sum((num_bytes + ?1 - 1) / ?1 * ?1), 0) FROM object_cache"
            " LEFT JOIN object_identity ON cache_id = object_cache.id"
            " LEFT JOIN object ON identity_id = object_identity.id GROUP BY object_cache.id ORDER BY name",
            (self._block_bytes,),
        )
        return [CacheUsage(*row) for row in rows]

    def identities(self, name: str) -> list[str]:
        """Those that objects of a cache are of."""
        rows = self._db.execute(
            "SELECT identity FROM object_identity JOIN object_cache ON object_cache.id = cache_id"
            " WHERE name = ? AND object_identity.id IN (SELECT identity_id FROM object)",
            (name,),
        )
        return [identity for (identity,) in rows]

    # objects

    def next_id(self) -> int:
        return self._db.execute("SELECT coalesce(max(id), 0) + 1 FROM object").get

    def packed_objects(self, cache_id: int) -> Iterator[list[tuple]]:
        """Of one cache, by id, some at once: (id, identity, key, bytes, last use, packed extents)."""
        return self._in_batches(
            "id, identity_id, key, num_bytes, last_use, extents",
            " AND identity_id IN (SELECT id FROM object_identity WHERE cache_id = ?)"
            " AND length(key) BETWEEN 1 AND ?",
            (cache_id, MAX_KEY_BYTES),
        )

    def _in_batches(self, columns: str, where: str = "", bindings: tuple = ()) -> Iterator[list[tuple]]:
        """Rows of objects, in the order of their first column, the id: never all of them in memory."""
        query = f"SELECT {columns} FROM object WHERE id > ?{where} ORDER BY id LIMIT {_ROWS_READ_AT_ONCE}"
        last_id = -(1 << 63)
        while rows := self._db.execute(query, (last_id, *bindings)):
            yield rows
            last_id = rows[-1][0]

    def write(self, deleted: Sequence[int], uses: Sequence[tuple[int, int]]) -> None:
        """Forget objects; note (last use, id) of others."""
        self._in_parts("DELETE FROM object WHERE id = ?", [(object_id,) for object_id in deleted])
        self._in_parts("UPDATE object SET last_use = ? WHERE id = ?", uses)

    def add(self, rows: Sequence[ObjectRow]) -> None:
        """Raises CatalogueFull; those before are added then."""
        self._in_parts(
            "INSERT OR REPLACE INTO object VALUES (?, ?, ?, ?, ?, ?)",
            [
                (row.id, row.identity_id, row.key, row.num_bytes, row.last_use, pack_extents(row.extents))
                for row in rows
            ],
        )

    def _in_parts(self, statement: str, arguments: Sequence[tuple]) -> None:
        """Transactions that the log has room for. Objects of a cache stand each for itself."""
        for start in range(0, len(arguments), self._rows_at_once):
            with self._transaction():
                self._db.executemany(statement, arguments[start : start + self._rows_at_once])

    # blocks, checking

    def used_extents(self) -> Iterable[Extent]:
        for (packed,) in self._db.execute("SELECT extents FROM object"):
            yield from unpack_extents(packed)

    def used_extents_array(self) -> np.ndarray:
        """The same, int64 [any number, 2]. Of damaged rows what can be read."""
        parts = [np.zeros((0, 2), "<i8")]
        for rows in self._in_batches("id, extents"):
            whole = b"".join([each[: len(each) - len(each) % _EXTENT.size] for _, each in rows])
            parts.append(np.frombuffer(whole, "<i8").reshape(-1, 2))
        return np.concatenate(parts)

    def placed(self) -> Iterable[tuple[int, str, bytes, tuple[Extent, ...]]]:
        """(id, cache's name or "?", key, extents) of every object."""
        rows = self._db.execute(
            "SELECT object.id, coalesce(name, '?'), key, extents FROM object"
            " LEFT JOIN object_identity ON object_identity.id = identity_id"
            " LEFT JOIN object_cache ON object_cache.id = cache_id"
        )
        return ((object_id, name, key, unpack_extents(packed)) for object_id, name, key, packed in rows)

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        found = [f"object {object_id} belongs to no cache" for object_id in self._homeless()]
        found += [f"object {object_id} has a key that another has" for object_id in self._doubles()]
        found += [f"object {object_id} has blocks for another size" for object_id in self._misfits()]
        return found

    def _homeless(self) -> list[int]:
        rows = self._db.execute(
            "SELECT id FROM object WHERE identity_id NOT IN (SELECT object_identity.id FROM object_identity"
            " JOIN object_cache ON object_cache.id = cache_id)"
        )
        return [object_id for (object_id,) in rows]

    def _doubles(self) -> list[int]:
        rows = self._db.execute(
            "SELECT id FROM object WHERE (identity_id, key) IN"
            " (SELECT identity_id, key FROM object GROUP BY identity_id, key HAVING count(*) > 1)"
        )
        return [object_id for (object_id,) in rows]

    def _misfits(self) -> list[int]:
        rows = self._db.execute("SELECT id, num_bytes, extents FROM object")
        return [
            object_id
            for object_id, num_bytes, packed in rows
            if len(packed) % _EXTENT.size
            or sum(count for _, count in unpack_extents(packed)) != -(-num_bytes // self._block_bytes)
        ]

    def mend(self, damaged: Iterable[int] = ()) -> int:
        """Forget what `problems` finds, and what is damaged; how many objects."""
        lost = {*self._homeless(), *self._doubles(), *self._misfits(), *damaged}
        self.write(sorted(lost), ())
        return len(lost)
