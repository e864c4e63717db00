"""What the catalogue knows of groups that can be found: their entries, and whose they are.

A scope is a tenant, a model and its settings. An entry gives a group its name (hashing.py) in a scope; the
group's tokens are those of any sequence that has it, at the same place in each. Entries are written in the
transaction that names the group for the first time or later, and triggers take them away with the group's last
reference: an entry without its group cannot be, whatever becomes of the sequence that published it.

Of a group that has an entry, all groups before it in any sequence have one, too: sequences share groups from
the first one on, and lose them from the last one on. Dropping an entry drops those behind it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from kvfs.layout import KvGeometry
from kvfs.prefix import hashing

PREFIX_SCHEMA = """
CREATE TABLE prefix_scope (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,          -- empty: of those who name none
    model_id INTEGER NOT NULL REFERENCES model(id),
    settings TEXT NOT NULL,        -- JSON: what keys and values depend on beside model and tokens
    salt BLOB NOT NULL,            -- 32 random bytes
    UNIQUE (tenant, model_id, settings)
) STRICT;
CREATE TABLE prefix_entry (
    group_id INTEGER NOT NULL REFERENCES kv_group(id),
    scope_id INTEGER NOT NULL REFERENCES prefix_scope(id),
    name BLOB NOT NULL,            -- 20 bytes: prefix/hashing.py
    PRIMARY KEY (group_id, scope_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX prefix_entry_by_name ON prefix_entry (name);
CREATE TABLE prefix_publication (
    sequence_id INTEGER PRIMARY KEY REFERENCES sequence(id),
    scope_id INTEGER NOT NULL REFERENCES prefix_scope(id)  -- its groups get entries there once they are stored
) STRICT;
CREATE INDEX prefix_publication_by_scope ON prefix_publication (scope_id);
CREATE INDEX sequence_group_by_group ON sequence_group (group_id);
CREATE TRIGGER prefix_entry_of_no_group AFTER DELETE ON kv_group BEGIN
    DELETE FROM prefix_entry WHERE group_id = OLD.id;
END;
CREATE TRIGGER prefix_publication_of_no_sequence AFTER DELETE ON sequence BEGIN
    DELETE FROM prefix_publication WHERE sequence_id = OLD.id;
END;
"""
PREFIX_TABLES = ("prefix_publication", "prefix_entry", "prefix_scope")
ENTRY_BYTES = 160  # of an entry and its place in the index, generously
RECENT_SCOPES = 16  # of a tenant, that a miss is explained by
RECENT_PUBLICATIONS = 64

_MODEL = "model.name, num_layers, num_query_heads, num_kv_heads, head_dim, dtype, group_tokens"


@dataclass(frozen=True)
class Scope:
    """id: None where nothing was ever published, and so nothing can be found."""

    id: int | None
    model_id: int
    model: str
    geometry: KvGeometry
    settings: str
    salt: bytes

    def chain(self, tokens: bytes) -> list[bytes]:
        """The name of each whole group of a prompt. tokens: <u4."""
        first = hashing.root(self.salt, self.model, self.geometry, self.settings)
        return hashing.chain(self.salt, first, 0, tokens, 4 * self.geometry.group_tokens)


@dataclass(frozen=True)
class Usage:
    """What of one tenant and model can be found. settings: JSON; num_sequences: those that publish."""

    scope_id: int
    tenant: str
    model: str
    settings: str
    num_groups: int
    num_sequences: int


class PrefixCatalogue:
    """db: the catalogue's connection; transaction: its context manager; free_bytes: room for rows, roughly."""

    def __init__(self, db, transaction, free_bytes: Callable[[], int]):
        self._db = db
        self._transaction = transaction
        self._free_bytes = free_bytes

    # scopes

    def scope(self, tenant: str, model_id: int, settings: str) -> Scope | None:
        """None where nothing was ever published."""
        rows = self._scopes("tenant = ? AND model_id = ? AND settings = ?", (tenant, model_id, settings))
        return rows[0] if rows else None

    def recent_scopes(self, tenant: str) -> list[Scope]:
        return self._scopes("tenant = ? ORDER BY prefix_scope.id DESC LIMIT ?", (tenant, RECENT_SCOPES))

    def _scopes(self, condition: str, arguments: tuple = ()) -> list[Scope]:
        rows = self._db.execute(
            f"SELECT prefix_scope.id, settings, salt, model.id, {_MODEL} FROM prefix_scope"
            f" JOIN model ON model.id = model_id WHERE {condition}",
            arguments,
        )
        return [Scope(row[0], *row[3:5], KvGeometry(*row[5:]), row[1], row[2]) for row in rows]

    def usage(self) -> list[Usage]:
        """Of all scopes, by tenant and model."""
        rows = self._db.execute(
            "SELECT prefix_scope.id, tenant, model.name, settings,"
            " (SELECT count(*) FROM prefix_publication WHERE scope_id = prefix_scope.id) FROM prefix_scope"
            " JOIN model ON model.id = model_id ORDER BY tenant, model.name, settings"
        )
        counts = dict(self._db.execute("SELECT scope_id, count(*) FROM prefix_entry GROUP BY scope_id"))
        return [Usage(*row[:4], counts.get(row[0], 0), row[4]) for row in rows]

    def drop_scopes(self, scope_ids: Iterable[int]) -> None:
        """Nothing of them is found any more, and their salts are gone; sequences stay."""
        with self._transaction():
            for scope_id in scope_ids:
                for table in ("prefix_entry", "prefix_publication"):
                    self._db.execute(f"DELETE FROM {table} WHERE scope_id = ?", (scope_id,))
                self._db.execute("DELETE FROM prefix_scope WHERE id = ?", (scope_id,))

    # publishing

    def set_publication(self, sequence_id: int, tenant: str, model_id: int, settings: str) -> None:
        """The sequence's groups get entries from the next `publish` on."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO prefix_scope (tenant, model_id, settings, salt) VALUES (?, ?, ?, ?)",
                (tenant, model_id, settings, hashing.new_salt()),
            )
            self._db.execute(
                "INSERT OR REPLACE INTO prefix_publication SELECT ?, id FROM prefix_scope"
                " WHERE tenant = ? AND model_id = ? AND settings = ?",
                (sequence_id, tenant, model_id, settings),
            )

    def publish(self, sequence_id: int, token_ids: np.ndarray) -> int:
        """Give a published sequence's groups entries, those that are stored whole and have their token ids.

        Part of the transaction that stores them. Returns how many groups have entries now. Where the catalogue
        is almost full they wait: what can be found later is no reason to refuse what is to be kept now.
        """
        row = self._db.execute(
            "SELECT scope_id FROM prefix_publication WHERE sequence_id = ?", (sequence_id,)
        ).fetchone()
        if row is None:
            return 0
        [scope] = self._scopes("prefix_scope.id = ?", row)
        num_spilled = self._db.execute("SELECT num_spilled FROM sequence WHERE id = ?", (sequence_id,)).get
        group_tokens = scope.geometry.group_tokens
        num_groups = min(num_spilled, len(token_ids)) // group_tokens
        last = self._db.execute(
            "SELECT position, name FROM sequence_group JOIN prefix_entry USING (group_id)"
            " WHERE sequence_id = ? AND scope_id = ? ORDER BY position DESC LIMIT 1",
            (sequence_id, scope.id),
        ).fetchone()
        first = 0 if last is None else last[0] + 1
        if first >= num_groups or self._free_bytes() < ENTRY_BYTES * (num_groups - first):
            return first
        tokens = token_ids[first * group_tokens : num_groups * group_tokens].astype("<u4").tobytes()
        if last is None:
            names = scope.chain(tokens)
        else:
            names = hashing.chain(scope.salt, last[1], first, tokens, 4 * group_tokens)
        self._db.executemany(
            "INSERT OR IGNORE INTO prefix_entry SELECT group_id, ?, ? FROM sequence_group"
            " WHERE sequence_id = ? AND position = ?",
            [(scope.id, name, sequence_id, position) for position, name in enumerate(names, first)],
        )
        return num_groups

    def publication(self, sequence_id: int) -> tuple[str, str] | None:
        """(tenant, settings) that a sequence publishes with; None for one that does not."""
        return self._db.execute(
            "SELECT tenant, settings FROM prefix_publication JOIN prefix_scope ON id = scope_id"
            " WHERE sequence_id = ?",
            (sequence_id,),
        ).fetchone()

    def publishing(self, scope_id: int) -> list[str]:
        """Names of the sequences that were published last."""
        rows = self._db.execute(
            "SELECT name FROM prefix_publication JOIN sequence ON id = sequence_id WHERE scope_id = ?"
            " ORDER BY sequence_id DESC LIMIT ?",
            (scope_id, RECENT_PUBLICATIONS),
        )
        return [name for (name,) in rows]

    # finding

    def has(self, scope_id: int | None, name: bytes) -> bool:
        """Whether a group of this name can be found. scope_id: None is none's."""
        query = "SELECT 1 FROM prefix_entry WHERE name = ? AND scope_id = ? LIMIT 1"
        return bool(self._db.execute(query, (name, scope_id)))

    def holder(self, scope: Scope, name: bytes, position: int) -> tuple[int, int | None]:
        """(group of this name, a sequence that has it at this position and all to there on flash, or None).

        Of a sequence without the token ids nothing can be told: forks are made before ids are known, too.
        """
        stop = (position + 1) * scope.geometry.group_tokens
        found = self._db.execute(
            "SELECT prefix_entry.group_id, sequence.id FROM prefix_entry"
            " CROSS JOIN sequence_group ON sequence_group.group_id = prefix_entry.group_id AND position = ?1"
            " CROSS JOIN sequence ON sequence.id = sequence_id"
            " WHERE prefix_entry.name = ?2 AND scope_id = ?3 AND model_id = ?4 AND num_spilled >= ?5"
            " AND (SELECT chunk.position + length(token_ids) / 4 FROM token_chunk AS chunk"
            "  WHERE chunk.sequence_id = sequence.id AND chunk.position < ?5"
            "  ORDER BY chunk.position DESC LIMIT 1) >= ?5 LIMIT 1",
            (position, name, scope.id, scope.model_id, stop),
        ).fetchone()
        if found is not None:
            return found
        query = "SELECT group_id, NULL FROM prefix_entry WHERE name = ? AND scope_id = ? LIMIT 1"
        return self._db.execute(query, (name, scope.id))[0]

    def tokens(self, sequence_id: int, stop: int) -> bytes:
        """<u4: a sequence's token ids before token `stop`."""
        rows = self._db.execute(
            "SELECT token_ids FROM token_chunk WHERE sequence_id = ? AND position < ? ORDER BY position",
            (sequence_id, stop),
        )
        return b"".join(row[0] for row in rows)[: 4 * stop]

    def groups(self, sequence_id: int, stop: int) -> list[tuple[int, int, int]]:
        """(id, first LBA, number of LBAs) of a sequence's groups before position `stop`."""
        rows = self._db.execute(
            "SELECT kv_group.id, base_lba, num_lbas FROM sequence_group JOIN kv_group ON kv_group.id = group_id"
            " WHERE sequence_id = ? AND position < ? ORDER BY position",
            (sequence_id, stop),
        )
        return list(rows)

    def drop_from(self, group_id: int) -> int:
        """Forget a group's entries, and in every sequence that has it those of what follows.

        These sequences publish no more. Returns how many entries it were.
        """
        with self._transaction():
            before = self._db.total_changes()
            self._db.execute(
                "DELETE FROM prefix_entry WHERE group_id = ?1 OR group_id IN (SELECT later.group_id"
                " FROM sequence_group AS first JOIN sequence_group AS later"
                " ON later.sequence_id = first.sequence_id AND later.position > first.position"
                " WHERE first.group_id = ?1)",
                (group_id,),
            )
            num_dropped = self._db.total_changes() - before
            self._db.execute(
                "DELETE FROM prefix_publication WHERE sequence_id IN"
                " (SELECT sequence_id FROM sequence_group WHERE group_id = ?)",
                (group_id,),
            )
            return num_dropped

    def share(self, sequence_id: int, source_id: int, num_groups: int, num_tokens: int) -> int:
        """An empty sequence has another's first groups and their tokens from here on; how many groups."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO sequence_group SELECT ?, position, group_id FROM sequence_group"
                " WHERE sequence_id = ? AND position < ?",
                (sequence_id, source_id, num_groups),
            )
            self._db.execute(
                "UPDATE kv_group SET reference_count = reference_count + 1"
                " WHERE id IN (SELECT group_id FROM sequence_group WHERE sequence_id = ?)",
                (sequence_id,),
            )
            num_shared = self._db.changes()
            self._db.execute(
                "INSERT INTO token_chunk SELECT ?1, position, substr(token_ids, 1, 4 * (?3 - position))"
                " FROM token_chunk WHERE sequence_id = ?2 AND position < ?3",
                (sequence_id, source_id, num_tokens),
            )
            self._db.execute(
                "UPDATE sequence SET num_tokens = ?1, num_spilled = ?1 WHERE id = ?2", (num_tokens, sequence_id)
            )
            return num_shared

    # checking

    def _lost_entries(self) -> list[tuple[int, int]]:
        """(group, scope) of entries that one of these is missing of."""
        return self._db.execute(
            "SELECT group_id, scope_id FROM prefix_entry"
            " WHERE group_id NOT IN (SELECT group_id FROM sequence_group)"
            " OR scope_id NOT IN (SELECT prefix_scope.id FROM prefix_scope JOIN model ON model.id = model_id)"
        )

    def _useless_entries(self) -> list[tuple[int, int]]:
        """(group, scope) of entries that no sequence's tokens give: whoever knew them is deleted, say."""
        return [
            (group_id, scope.id)
            for scope in self._scopes("1")
            for group_id in {*self._group_ids(scope)} - {*self._named_by_tokens(scope)}
        ]

    def _group_ids(self, scope: Scope) -> Iterable[int]:
        query = (
            "SELECT group_id FROM prefix_entry WHERE scope_id = ?"
            " AND group_id IN (SELECT group_id FROM sequence_group)"
        )
        return (group_id for (group_id,) in self._db.execute(query, (scope.id,)))

    def _named_by_tokens(self, scope: Scope) -> Iterable[int]:
        """Groups whose entries are what their tokens give, by any sequence that has them."""
        named: set[int] = set()
        group_tokens = scope.geometry.group_tokens
        for sequence_id, num_spilled in self._db.execute(
            "SELECT id, num_spilled FROM sequence WHERE model_id = ? AND id IN (SELECT sequence_id"
            " FROM prefix_entry JOIN sequence_group USING (group_id) WHERE scope_id = ?)",
            (scope.model_id, scope.id),
        ):
            entries = self._db.execute(
                "SELECT position, group_id, name FROM sequence_group JOIN prefix_entry USING (group_id)"
                " WHERE sequence_id = ? AND scope_id = ? AND position BETWEEN 0 AND ? ORDER BY position",
                (sequence_id, scope.id, num_spilled // group_tokens - 1),
            )
            if all(group_id in named for _, group_id, _ in entries):
                continue  # a fork
            names = scope.chain(self.tokens(sequence_id, (entries[-1][0] + 1) * group_tokens))
            named.update(
                group_id
                for position, group_id, name in entries
                if position < len(names) and names[position] == name
            )
        return named

    def _lost_publications(self) -> list[tuple[int]]:
        return self._db.execute(
            "SELECT sequence_id FROM prefix_publication WHERE sequence_id NOT IN (SELECT id FROM sequence)"
            " OR scope_id NOT IN (SELECT id FROM prefix_scope)"
        )

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        found = [
            f"the prefix entry of group {group_id} has no sequence, or no tenant and model"
            for group_id, _ in self._lost_entries()
        ]
        for (sequence_id,) in self._lost_publications():
            found.append(f"sequence number {sequence_id} is published, but it or its tenant does not exist")
        return found

    def leftovers(self) -> list[str]:
        """What only takes space, a line each."""
        count = len(self._useless_entries())
        return [f"{count} prefix entries that no sequence's tokens give"] if count else []

    def forget_model(self, model_id: int) -> None:
        """Scopes of a model without sequences: nothing is published in them."""
        self._db.execute("DELETE FROM prefix_scope WHERE model_id = ?", (model_id,))

    def mend(self) -> int:
        """Forget what `problems` and `leftovers` find; how many rows."""
        with self._transaction():
            entries = [*self._lost_entries(), *self._useless_entries()]
            self._db.executemany("DELETE FROM prefix_entry WHERE group_id = ? AND scope_id = ?", entries)
            publications = self._lost_publications()
            self._db.executemany("DELETE FROM prefix_publication WHERE sequence_id = ?", publications)
            return len(entries) + len(publications)
