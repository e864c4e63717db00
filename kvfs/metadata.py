"""The catalogue: models, sequences, groups and tokens, in SQLite on the drive's own blocks.

Every method is one transaction (or part of one under way), visible at once and durable after `sync`. Rows name
blocks only after their data were written. One row per token group, never one per page. Files have tables of
their own, see files/file_catalogue.py.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np

from kvfs.allocator import Extent
from kvfs.catalogue_database import CatalogueDatabase
from kvfs.catalogue_schema import GOING_INDEX, SCHEMA_VERSION, SET_SCHEMA, SET_VERSION
from kvfs.catalogue_totals import CatalogueTotals
from kvfs.files.file_catalogue import FileCatalogue
from kvfs.free_space import FreeSpace
from kvfs.layout import KvGeometry
from kvfs.metadata_vfs import Volume
from kvfs.objects.object_catalogue import ObjectCatalogue
from kvfs.prefix.prefix_catalogue import PrefixCatalogue
from kvfs.sealing.derived_catalogue import DerivedCatalogue
from kvfs.sequence_attributes import NOT_INHERITED
from kvfs.space.space_catalogue import SpaceCatalogue

TOKEN_CHUNK = 1024


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


class Catalogue(CatalogueDatabase):
    """Typed access to the tables (catalogue_schema.py)."""

    def __init__(self, volume: Volume, page_size: int, path, create: bool = False):
        super().__init__(volume, page_size, path, create)
        self.files = FileCatalogue(self._db.execute, self._db.executemany)
        self.prefixes = PrefixCatalogue(self._db, self.transaction, lambda: self.batch.free_bytes)
        self.objects = ObjectCatalogue(self._db, self.transaction, self.batch.max_changes, page_size)
        self.free_space = FreeSpace(self._db, self.transaction, lambda: self.batch.free_bytes)
        self.derived = DerivedCatalogue(self._db, self.transaction)
        self.space = SpaceCatalogue(self._db, self.transaction)
        self.row_totals = CatalogueTotals(self._db, self.transaction, page_size)
        if create:
            self.row_totals.make_sure()
            with self.transaction():
                self._db.execute(GOING_INDEX)

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
                    # of parts, of which none is left
                    parts = "(SELECT id FROM model WHERE instr(name, '/'))"
                    self._db.execute(f"DELETE FROM prefix_scope WHERE model_id IN {parts}")
                    self._db.execute(f"DELETE FROM model WHERE id IN {parts}")
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

    def delete_model(self, model_id: int) -> None:
        """One without sequences: what may be found of it, and what is made of it, goes too."""
        with self.transaction():
            self.prefixes.forget_model(model_id)
            self.space.forget_model(model_id)
            self._db.execute("DELETE FROM model WHERE id = ?", (model_id,))

    # sequences

    def sequences(self, after: str = "", limit: int = -1, model_id: int | None = None) -> list[SequenceRow]:
        """In order of names, those behind `after`; limit: below 0: all; model_id: only this model's."""
        rows = self._db.execute(
            f"SELECT {_SEQUENCE_COLUMNS} FROM sequence WHERE name > ?1 AND (?3 IS NULL OR model_id = ?3)"
            " ORDER BY name LIMIT ?2",
            (after, limit, model_id),
        )
        return [SequenceRow(*row) for row in rows]

    def newest_sequences(self, limit: int) -> list[SequenceRow]:
        """Those made last, the newest first."""
        rows = self._db.execute(f"SELECT {_SEQUENCE_COLUMNS} FROM sequence ORDER BY id DESC LIMIT ?", (limit,))
        return [SequenceRow(*row) for row in rows]

    def totals(self) -> tuple[int, int]:
        """(number of sequences, of their tokens)"""
        found = self.row_totals.sequences().values()
        return sum(each.num_rows for each in found), sum(each.num_tokens for each in found)

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
            self.prefixes.publish(row.id, tokens)
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
        """Unlink groups from `first_position` on; the extents of those that nothing links any more, and of what
        was derived of them."""
        of_sequence = "SELECT group_id FROM sequence_group WHERE sequence_id = ?1 AND position >= ?2"
        arguments = (sequence_id, first_position)
        self._db.execute(
            f"UPDATE kv_group SET reference_count = reference_count - 1 WHERE id IN ({of_sequence})", arguments
        )
        unused = self._db.execute(
            f"SELECT id, base_lba, num_lbas FROM kv_group WHERE reference_count = 0 AND id IN ({of_sequence})",
            arguments,
        )
        freed = [(base_lba, num_lbas) for _, base_lba, num_lbas in unused]
        freed += [extent for group_id, _, _ in unused for extent in self.derived.drop_ending_in(group_id)]
        self._db.execute("DELETE FROM sequence_group WHERE sequence_id = ? AND position >= ?", arguments)
        self._db.executemany("DELETE FROM kv_group WHERE id = ?", [(group_id,) for group_id, _, _ in unused])
        return freed

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
        """An attribute of all sequences that have it, by their ids. name: a constant, for GOING_INDEX."""
        query = f"SELECT sequence_id, value FROM sequence_attribute WHERE name = '{name}'"
        return dict(self._db.execute(query))

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
        """attribute: a constant, for GOING_INDEX."""
        rows = self._db.execute(
            f"SELECT {_SEQUENCE_COLUMNS} FROM sequence"
            f" WHERE id IN (SELECT sequence_id FROM sequence_attribute WHERE name = '{attribute}')"
        )
        return [SequenceRow(*row) for row in rows]

    # blocks

    def used_extents(self) -> Iterable[Extent]:
        """Every extent that a row names."""
        yield from self.files.used_extents()
        yield from self.objects.used_extents()
        yield from self.derived.used_extents()
        yield from self._db.execute("SELECT base_lba, num_lbas FROM kv_group")
        yield from self._db.execute("SELECT tail_lba, tail_lbas FROM sequence WHERE tail_lbas > 0")

    def used_extents_array(self) -> np.ndarray:
        """The same, int64 [any number, 2], in a fifth of the time."""
        pairs = [
            chain.from_iterable(self.files.used_extents()),
            chain.from_iterable(self.derived.used_extents()),
            chain.from_iterable(self._db.execute("SELECT base_lba, num_lbas FROM kv_group")),
            chain.from_iterable(
                self._db.execute("SELECT tail_lba, tail_lbas FROM sequence WHERE tail_lbas > 0")
            ),
        ]
        arrays = [np.fromiter(each, np.int64).reshape(-1, 2) for each in pairs]
        return np.concatenate([*arrays, self.objects.used_extents_array()])

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
            num_broken = self._db.total_changes() - start + self.prefixes.mend()
            freed = list(self.unlinked_groups())
            self._db.execute(f"DELETE FROM kv_group WHERE id NOT IN {_LINKED}")
            before = self._db.total_changes()
            links = "(SELECT count(*) FROM sequence_group WHERE group_id = kv_group.id)"
            self._db.execute(f"UPDATE kv_group SET reference_count = {links} WHERE reference_count != {links}")
            num_wrong = self._db.total_changes() - before
            self.row_totals.mend()
            return num_broken, num_wrong, freed

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
        return (
            found
            + self.prefixes.problems()
            + self.objects.problems()
            + self.derived.problems()
            + self.row_totals.problems()
        )
