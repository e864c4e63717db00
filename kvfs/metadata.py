"""The catalogue: models, sequences, groups and tokens, in SQLite on the drive's own blocks.

Every method is one transaction (or part of one under way), visible at once and durable after `sync`. Rows name
blocks only after their data were written. One row per token group, never one per page. Files have tables of
their own, see files/file_catalogue.py.
"""

import itertools
import os
import stat
import time
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import apsw
import numpy as np

from kvfs.allocator import Extent
from kvfs.batch import Batch
from kvfs.catalogue_connection import CatalogueConnection
from kvfs.errors import CatalogueDamaged, CatalogueFull, NotADrive
from kvfs.files.file_catalogue import FILE_SCHEMA, INSERT_INODE, FileCatalogue
from kvfs.layout import KvGeometry
from kvfs.metadata_vfs import DATABASE_NAME, Volume, VolumeVfs
from kvfs.sequence_attributes import NOT_INHERITED
from kvfs.tree import ROOT_INODE
from spdk_glue.status import NvmeError

SCHEMA_VERSION = 2
OLDEST_VERSION = 1  # that is brought up to date when it is opened
SET_VERSION = 3  # version 2 of a drive that is one of a set, and of no use alone
SET_SCHEMA = """
CREATE TABLE set_membership (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    record BLOB NOT NULL           -- drive_set/membership.py
) STRICT;
"""
LONGEST_LOG_BYTES = 4 << 20  # of what opening after a crash has to read
SCHEMA = """
CREATE TABLE model (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    num_layers INTEGER NOT NULL,
    num_query_heads INTEGER NOT NULL,
    num_kv_heads INTEGER NOT NULL,
    head_dim INTEGER NOT NULL,
    dtype TEXT NOT NULL,
    group_tokens INTEGER NOT NULL
) STRICT;
CREATE TABLE sequence (
    id INTEGER PRIMARY KEY,
    model_id INTEGER NOT NULL REFERENCES model(id),
    name TEXT NOT NULL UNIQUE,
    created_ns INTEGER NOT NULL,
    changed_ns INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,   -- complete in every layer
    num_spilled INTEGER NOT NULL,  -- of these, in whole pages of the groups; the rest is in the tail record
    tail_lba INTEGER NOT NULL,
    tail_lbas INTEGER NOT NULL     -- 0: no tail record
) STRICT;
CREATE TABLE kv_group (
    id INTEGER PRIMARY KEY,
    base_lba INTEGER NOT NULL UNIQUE,
    num_lbas INTEGER NOT NULL,
    reference_count INTEGER NOT NULL
) STRICT;
CREATE TABLE sequence_group (
    sequence_id INTEGER NOT NULL REFERENCES sequence(id),
    position INTEGER NOT NULL,     -- token group of the sequence
    group_id INTEGER NOT NULL REFERENCES kv_group(id),
    PRIMARY KEY (sequence_id, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE token_chunk (
    sequence_id INTEGER NOT NULL REFERENCES sequence(id),
    position INTEGER NOT NULL,     -- first token of the chunk
    token_ids BLOB NOT NULL,       -- <u4, up to TOKEN_CHUNK of them
    PRIMARY KEY (sequence_id, position)
) STRICT, WITHOUT ROWID;
"""
ADDED_IN_VERSION_2 = (
    """
CREATE TABLE sequence_attribute (
    sequence_id INTEGER NOT NULL REFERENCES sequence(id),
    name TEXT NOT NULL,            -- sequence_attributes.py
    value BLOB NOT NULL,
    PRIMARY KEY (sequence_id, name)
) STRICT, WITHOUT ROWID;
"""
    + FILE_SCHEMA
)
TOKEN_CHUNK = 1024
_vfs_numbers = itertools.count()


@dataclass(frozen=True)
class ModelRow:
    id: int
    name: str
    geometry: KvGeometry


@dataclass(frozen=True)
class GroupRow:
    """A token group. id is None until a flush has named it in the catalogue."""

    id: int | None
    base_lba: int
    num_lbas: int


@dataclass
class SequenceRow:
    id: int
    model_id: int
    name: str
    created_ns: int
    changed_ns: int
    num_tokens: int
    num_spilled: int
    tail_lba: int
    tail_lbas: int


_SEQUENCE_COLUMNS = "id, model_id, name, created_ns, changed_ns, num_tokens, num_spilled, tail_lba, tail_lbas"


_LINKED = "(SELECT group_id FROM sequence_group)"


class Catalogue:
    """Typed access to the tables above."""

    def __init__(self, volume: Volume, page_size: int, path, create: bool = False):
        self._volume = volume
        self.is_durable = True  # whether every transaction so far survives a power cut
        self._is_log_own = False  # whether the log was begun by this process
        vfs_name = f"kvfs-{next(_vfs_numbers)}"
        self._vfs = VolumeVfs(vfs_name, volume)
        self._db: CatalogueConnection | None = None
        self.batch: Batch | None = None
        try:
            version = self._open(vfs_name, page_size, create)
        except BaseException as error:
            self.abandon()
            if isinstance(error, CatalogueDamaged):
                raise NotADrive(path, f"the catalogue is damaged: {error.why}") from error
            raise
        if not OLDEST_VERSION <= version <= SET_VERSION:
            self.abandon()
            known = f"{OLDEST_VERSION} to {SET_VERSION}"
            raise NotADrive(path, f"catalogue version {version}, but this kvfs reads {known}")
        try:
            if version < SCHEMA_VERSION:
                self._upgrade()
            pages = [file.capacity // page_size for file in (volume.database, volume.wal)]
            self.batch = Batch(self._db, page_size, *pages, self._renew_log)  # of small changes to files
        except BaseException:
            self.abandon()
            raise
        self.files = FileCatalogue(self._db.execute, self._db.executemany)

    def _open(self, vfs_name: str, page_size: int, create: bool) -> int:
        """Connect; the version of the schema."""
        self._db = CatalogueConnection(DATABASE_NAME, vfs=vfs_name)
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA temp_store = MEMORY")
        if create:
            # no rollback journal file exists on a volume; the switch to WAL is the only use of one
            self._db.execute(f"PRAGMA page_size = {min(max(page_size, 4096), 65536)}")
            self._db.execute("PRAGMA journal_mode = MEMORY")
        mode = self._db.execute("PRAGMA journal_mode = WAL").get
        assert mode == "wal", mode
        self._db.execute("PRAGMA synchronous = NORMAL")  # durability is `sync`'s, in one batch
        # a commit that has come through must not fail because the log cannot be emptied: see _renew_log
        self._db.execute("PRAGMA wal_autocheckpoint = 0")
        self._db.execute("PRAGMA cache_size = -16384")
        if create:
            with self.transaction():
                self._db.execute(SCHEMA)
                self._upgrade()
        return self._db.execute("PRAGMA user_version").get

    def _upgrade(self) -> None:
        """From version 1: the attributes of sequences, and files. Durable with the next sync, if one comes."""
        with self.transaction():
            self._db.execute(ADDED_IN_VERSION_2)
            now = time.time_ns()
            mode = stat.S_IFDIR | 0o755
            root = (ROOT_INODE, ROOT_INODE, mode, 2, os.getuid(), os.getgid(), 0, 0, 0, now, now, now, None)
            self._db.execute(INSERT_INODE, root)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def transaction(self):
        """All of what is done inside or none of it; those inside others are part of them."""
        if self._db.in_transaction and not (self.batch and self.batch.is_open):
            yield
            return
        self._end_batch()
        self._renew_log()
        self._db.execute("BEGIN")
        try:
            yield
            self._db.execute("COMMIT")
            self.is_durable = False
        except BaseException as error:
            if self._db.in_transaction:  # a full database has ended it by itself
                self._db.execute("ROLLBACK")
            if isinstance(error, apsw.FullError):
                raise CatalogueFull(self._volume.database.capacity) from error
            raise

    def _end_batch(self) -> None:
        if self.batch is not None and self.batch.has_changes:
            self.is_durable = False
            self.batch.end()

    @property
    def has_changes(self) -> bool:
        """Whether something is not durable, or not even a transaction yet."""
        return not self.is_durable or self.batch.has_changes

    def _renew_log(self) -> None:
        """Begin the log anew, with another salt, before the first transaction and whenever it has grown long.

        A power cut may have left frames of lost transactions in it. They hold once more if, under the same
        salt, the ones before them are written again with the same bytes.
        """
        wal = self._volume.wal
        if self._is_log_own and wal.size <= min(LONGEST_LOG_BYTES, wal.capacity // 4):
            return
        # a drive that is full says so when the transaction is made durable
        with suppress(apsw.IOError, NvmeError):
            busy, _, _ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").get
            self._is_log_own = not busy

    def sync(self) -> None:
        """Make every transaction so far durable."""
        self._end_batch()
        self._volume.sync()
        self.is_durable = True

    def close(self) -> None:
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        self._volume.sync()
        self._vfs.unregister()

    def abandon(self) -> None:
        """Close without touching the drive, which has failed: what was not durable is gone."""
        self._volume.detached = True
        with suppress(apsw.Error, NvmeError):
            if self._db is not None:
                self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
                self._db.close()
        self._vfs.unregister()

    # the set of drives that this is one of

    def membership(self) -> bytes | None:
        """What a drive of a set says of it."""
        if self._db.execute("PRAGMA user_version").get < SET_VERSION:
            return None
        return self._db.execute("SELECT record FROM set_membership").get

    def set_membership(self, record: bytes | None) -> None:
        """None: it is one of a set no longer."""
        with self.transaction():
            is_member = self.membership() is not None
            if record is None:
                if is_member:
                    self._db.execute("DROP TABLE set_membership")
                    self._db.execute(
                        "DELETE FROM model WHERE instr(name, '/')"
                    )  # of parts, of which none is left
            else:
                if not is_member:
                    self._db.execute(SET_SCHEMA)
                self._db.execute("INSERT OR REPLACE INTO set_membership VALUES (1, ?)", (record,))
            version = SCHEMA_VERSION if record is None else SET_VERSION
            self._db.execute(f"PRAGMA user_version = {version}")

    # models

    def models(self) -> list[ModelRow]:
        rows = self._db.execute(
            "SELECT id, name, num_layers, num_query_heads, num_kv_heads, head_dim, dtype, group_tokens"
            " FROM model ORDER BY name"
        )
        return [ModelRow(row[0], row[1], KvGeometry(*row[2:])) for row in rows]

    def add_model(self, name: str, geometry: KvGeometry) -> ModelRow:
        with self.transaction():
            self._db.execute(
                "INSERT INTO model (name, num_layers, num_query_heads, num_kv_heads, head_dim, dtype,"
                " group_tokens) VALUES (:name, :num_layers, :num_query_heads, :num_kv_heads, :head_dim,"
                " :dtype, :group_tokens)",
                {"name": name, **asdict(geometry)},
            )
            return ModelRow(self._db.last_insert_rowid(), name, geometry)

    # sequences

    def sequences(self) -> list[SequenceRow]:
        rows = self._db.execute(f"SELECT {_SEQUENCE_COLUMNS} FROM sequence ORDER BY name")
        return [SequenceRow(*row) for row in rows]

    def sequence(self, name: str) -> SequenceRow | None:
        row = self._db.execute(f"SELECT {_SEQUENCE_COLUMNS} FROM sequence WHERE name = ?", (name,)).fetchone()
        return row and SequenceRow(*row)

    def create_sequence(self, model_id: int, name: str) -> SequenceRow:
        now = time.time_ns()
        with self.transaction():
            self._db.execute(
                "INSERT INTO sequence (model_id, name, created_ns, changed_ns, num_tokens, num_spilled,"
                " tail_lba, tail_lbas) VALUES (?, ?, ?, ?, 0, 0, 0, 0)",
                (model_id, name, now, now),
            )
            return SequenceRow(self._db.last_insert_rowid(), model_id, name, now, now, 0, 0, 0, 0)

    def rename_sequence(self, sequence_id: int, name: str) -> None:
        with self.transaction():
            self._db.execute("UPDATE sequence SET name = ? WHERE id = ?", (name, sequence_id))

    def groups(self, sequence_id: int) -> list[GroupRow]:
        """The sequence's groups in the order of their tokens."""
        rows = self._db.execute(
            "SELECT kv_group.id, base_lba, num_lbas FROM sequence_group"
            " JOIN kv_group ON kv_group.id = group_id WHERE sequence_id = ? ORDER BY position",
            (sequence_id,),
        )
        return [GroupRow(*row) for row in rows]

    def store_sequence(
        self,
        row: SequenceRow,
        groups: list[GroupRow],
        first_changed: int,
        tokens: np.ndarray,
        first_new_token: int,
    ) -> tuple[list[GroupRow], list[Extent]]:
        """Write a sequence's state: its row, its groups from position `first_changed` on, its tokens.

        Groups without id are new, those with one are shared or kept. Returns the groups, all with ids,
        and the extents of groups that nothing names any more.
        """
        with self.transaction():
            freed = self._release_groups(row.id, first_changed)
            stored = list(groups[:first_changed])
            for position, group in enumerate(groups[first_changed:], first_changed):
                stored.append(self._link_group(row.id, position, group))
            self._db.execute(
                "UPDATE sequence SET changed_ns = ?, num_tokens = ?, num_spilled = ?, tail_lba = ?,"
                " tail_lbas = ? WHERE id = ?",
                (row.changed_ns, row.num_tokens, row.num_spilled, row.tail_lba, row.tail_lbas, row.id),
            )
            self._store_tokens(row.id, tokens, first_new_token)
        return stored, freed

    def _link_group(self, sequence_id: int, position: int, group: GroupRow) -> GroupRow:
        if group.id is None:
            self._db.execute(
                "INSERT INTO kv_group (base_lba, num_lbas, reference_count) VALUES (?, ?, 1)",
                (group.base_lba, group.num_lbas),
            )
            group = GroupRow(self._db.last_insert_rowid(), group.base_lba, group.num_lbas)
        else:
            self._db.execute(
                "UPDATE kv_group SET reference_count = reference_count + 1 WHERE id = ?", (group.id,)
            )
        self._db.execute(
            "INSERT INTO sequence_group (sequence_id, position, group_id) VALUES (?, ?, ?)",
            (sequence_id, position, group.id),
        )
        return group

    def _release_groups(self, sequence_id: int, first_position: int) -> list[Extent]:
        """Unlink groups from `first_position` on; the extents of those that nothing links any more."""
        of_sequence = "SELECT group_id FROM sequence_group WHERE sequence_id = ?1 AND position >= ?2"
        arguments = (sequence_id, first_position)
        self._db.execute(
            f"UPDATE kv_group SET reference_count = reference_count - 1 WHERE id IN ({of_sequence})", arguments
        )
        unused = self._db.execute(
            f"SELECT id, base_lba, num_lbas FROM kv_group WHERE reference_count = 0 AND id IN ({of_sequence})",
            arguments,
        )
        self._db.execute("DELETE FROM sequence_group WHERE sequence_id = ? AND position >= ?", arguments)
        self._db.executemany("DELETE FROM kv_group WHERE id = ?", [(group_id,) for group_id, _, _ in unused])
        return [(base_lba, num_lbas) for _, base_lba, num_lbas in unused]

    def delete_sequence(self, row: SequenceRow) -> list[Extent]:
        """Forget a sequence. Returns the extents that nothing names any more."""
        with self.transaction():
            freed = self._release_groups(row.id, 0)
            for table in ("token_chunk", "sequence_attribute"):
                self._db.execute(f"DELETE FROM {table} WHERE sequence_id = ?", (row.id,))
            self._db.execute("DELETE FROM sequence WHERE id = ?", (row.id,))
        if row.tail_lbas:
            freed.append((row.tail_lba, row.tail_lbas))
        return freed

    # tokens

    def tokens(self, sequence_id: int) -> np.ndarray:
        """uint32 [any number]: token ids kept beside the KV."""
        rows = self._db.execute(
            "SELECT token_ids FROM token_chunk WHERE sequence_id = ? ORDER BY position", (sequence_id,)
        )
        return np.frombuffer(b"".join(row[0] for row in rows), "<u4").copy()

    def num_token_ids(self) -> dict[int, int]:
        """How many token ids are kept, by the ids of the sequences that have any."""
        lengths = "SELECT sequence_id, sum(length(token_ids)) / 4 FROM token_chunk GROUP BY sequence_id"
        return dict(self._db.execute(lengths))

    def _store_tokens(self, sequence_id: int, tokens: np.ndarray, first_new: int) -> None:
        first_chunk = first_new - first_new % TOKEN_CHUNK
        self._db.execute(
            "DELETE FROM token_chunk WHERE sequence_id = ? AND position >= ?", (sequence_id, first_chunk)
        )
        self._db.executemany(
            "INSERT INTO token_chunk (sequence_id, position, token_ids) VALUES (?, ?, ?)",
            [
                (sequence_id, start, tokens[start : start + TOKEN_CHUNK].astype("<u4").tobytes())
                for start in range(first_chunk, len(tokens), TOKEN_CHUNK)
            ],
        )

    # attributes

    def attributes(self, sequence_id: int) -> dict[str, bytes]:
        return dict(
            self._db.execute(
                "SELECT name, value FROM sequence_attribute WHERE sequence_id = ? ORDER BY name", (sequence_id,)
            )
        )

    def set_attribute(self, sequence_id: int, name: str, value: bytes) -> None:
        with self.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO sequence_attribute VALUES (?, ?, ?)", (sequence_id, name, value)
            )

    def remove_attribute(self, sequence_id: int, name: str) -> None:
        with self.transaction():
            self._db.execute(
                "DELETE FROM sequence_attribute WHERE sequence_id = ? AND name = ?", (sequence_id, name)
            )

    def values_of(self, name: str) -> dict[int, bytes]:
        """An attribute of all sequences that have it, by their ids."""
        return dict(
            self._db.execute("SELECT sequence_id, value FROM sequence_attribute WHERE name = ?", (name,))
        )

    def inherit_attributes(self, child_id: int, parent_id: int) -> None:
        """What a fork takes over from its parent."""
        not_inherited = ", ".join(f"'{name}'" for name in NOT_INHERITED)
        with self.transaction():
            self._db.execute(
                "INSERT INTO sequence_attribute SELECT ?, name, value FROM sequence_attribute"
                f" WHERE sequence_id = ? AND name NOT IN ({not_inherited})",
                (child_id, parent_id),
            )

    def sequences_with(self, attribute: str) -> list[SequenceRow]:
        rows = self._db.execute(
            f"SELECT {_SEQUENCE_COLUMNS} FROM sequence"
            " WHERE id IN (SELECT sequence_id FROM sequence_attribute WHERE name = ?)",
            (attribute,),
        )
        return [SequenceRow(*row) for row in rows]

    # blocks

    def used_extents(self) -> Iterable[Extent]:
        """Every extent that a row names."""
        yield from self.files.used_extents()
        yield from self._db.execute("SELECT base_lba, num_lbas FROM kv_group")
        yield from self._db.execute("SELECT tail_lba, tail_lbas FROM sequence WHERE tail_lbas > 0")

    def links(self) -> Iterable[tuple[int, int, int, int | None, int | None]]:
        """(sequence id, position, group id, base LBA, number of LBAs), the last two None without a group."""
        return self._db.execute(
            "SELECT sequence_id, position, group_id, base_lba, num_lbas FROM sequence_group"
            " LEFT JOIN kv_group ON kv_group.id = group_id ORDER BY sequence_id, position"
        )

    def unlinked_groups(self) -> Iterable[Extent]:
        """Extents of groups that no sequence has."""
        return self._db.execute(f"SELECT base_lba, num_lbas FROM kv_group WHERE id NOT IN {_LINKED}")

    def mend_references(self) -> tuple[int, int, list[Extent]]:
        """Forget what is linked to nothing, and make reference counts what the links say.

        Returns how many rows led nowhere, how many counts were wrong, and the extents of groups that no
        sequence has.
        """
        with self.transaction():
            start = self._db.total_changes()
            for table in ("sequence_group", "token_chunk", "sequence_attribute"):
                self._db.execute(f"DELETE FROM {table} WHERE sequence_id NOT IN (SELECT id FROM sequence)")
            nowhere = "position < 0 OR group_id NOT IN (SELECT id FROM kv_group)"
            self._db.execute(f"DELETE FROM sequence_group WHERE {nowhere}")
            num_broken = self._db.total_changes() - start
            freed = list(self.unlinked_groups())
            self._db.execute(f"DELETE FROM kv_group WHERE id NOT IN {_LINKED}")
            before = self._db.total_changes()
            links = "(SELECT count(*) FROM sequence_group WHERE group_id = kv_group.id)"
            self._db.execute(f"UPDATE kv_group SET reference_count = {links} WHERE reference_count != {links}")
            return num_broken, self._db.total_changes() - before, freed

    def problems(self) -> list[str]:
        """What contradicts itself in the catalogue, one line each; empty when all is well."""
        found = [
            f"SQLite: {line}"
            for row in self._db.execute("PRAGMA integrity_check")
            for line in row[0].splitlines()
            if line != "ok"
        ]
        for group_id, count, links in self._db.execute(
            "SELECT kv_group.id, reference_count, count(sequence_id) FROM kv_group"
            " LEFT JOIN sequence_group ON group_id = kv_group.id"
            " GROUP BY kv_group.id HAVING reference_count != count(sequence_id)"
        ):
            found.append(f"group {group_id} counts {count} references but has {links}")
        for name, tokens, group_tokens, groups in self._db.execute(
            "SELECT sequence.name, num_spilled, group_tokens,"
            " (SELECT count(*) FROM sequence_group WHERE sequence_id = sequence.id)"
            " FROM sequence JOIN model ON model.id = model_id"
        ):
            if -(-tokens // group_tokens) != groups:
                found.append(f"sequence {name!r} has {tokens} tokens in groups but {groups} groups")
        return found
