"""Caps, and what eviction asks of sequences: whose, how large, when used last. In SQL, none of it in Python.

The tables are made with the first cap. Triggers keep them in step with the sequences in the same transaction,
whatever makes the change, so that they are right after a crash and after a repair.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvfs.sequence_attributes import IMPORTING, PINNED, SET_PART, TENANT, TTL
from kvfs.space.background_policy import OFF, Background

Account = tuple[int, str]  # number of a model, tenant (empty: none named)
PAGE_ROWS = 256  # of sequences that are looked at together
_NS = 1_000_000_000

TABLES = """
CREATE TABLE space_quota (
    model TEXT NOT NULL,           -- empty: all models together
    tenant TEXT NOT NULL,          -- empty: all tenants together
    capacity_bytes INTEGER NOT NULL,
    low_percent INTEGER NOT NULL,  -- of the cap: how far an eviction goes
    policy TEXT NOT NULL,
    PRIMARY KEY (model, tenant)
) STRICT, WITHOUT ROWID;
CREATE TABLE space_sequence (
    sequence_id INTEGER PRIMARY KEY,
    model_id INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    is_kept INTEGER NOT NULL,      -- pinned, being imported, or part of a sequence of a set
    ttl_s INTEGER,                 -- seconds since the last use
    last_use_ns INTEGER NOT NULL,  -- roughly
    num_uses INTEGER NOT NULL,     -- MOST_USES at most; fewer, the longer it was not looked for
    num_groups INTEGER NOT NULL,
    tail_lbas INTEGER NOT NULL
) STRICT;
CREATE TABLE space_account (
    model_id INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    num_sequences INTEGER NOT NULL,
    num_groups INTEGER NOT NULL,
    tail_lbas INTEGER NOT NULL,
    PRIMARY KEY (model_id, tenant)
) STRICT, WITHOUT ROWID;
"""
INDEXES = """
CREATE INDEX space_sequence_by_use ON space_sequence (model_id, tenant, is_kept, last_use_ns);
CREATE INDEX space_sequence_by_end ON space_sequence (last_use_ns + ttl_s * 1000000000)
    WHERE ttl_s IS NOT NULL AND NOT is_kept;
"""
BACKGROUND_TABLE = """
CREATE TABLE space_background (     -- background_policy.py
    id INTEGER PRIMARY KEY CHECK (id = 1),
    expired INTEGER NOT NULL,
    high_percent INTEGER,
    low_percent INTEGER
) STRICT;
"""
_GROUPS = (
    "({row}.num_spilled + (SELECT group_tokens FROM model WHERE id = {row}.model_id) - 1)"
    " / (SELECT group_tokens FROM model WHERE id = {row}.model_id)"
)


def _value(name: str, sequence_id: str) -> str:
    return f"(SELECT value FROM sequence_attribute WHERE sequence_id = {sequence_id} AND name = '{name}')"


def _is_kept(sequence_id: str) -> str:
    return (
        f"EXISTS (SELECT 1 FROM sequence_attribute WHERE sequence_id = {sequence_id} AND"
        f" (name = '{PINNED}' AND value = x'31' OR name IN ('{IMPORTING}', '{SET_PART}')))"
    )


def _from_attributes(sequence_id: str) -> str:
    return (
        f"coalesce(CAST({_value(TENANT, sequence_id)} AS TEXT), ''), {_is_kept(sequence_id)},"
        f" CAST(CAST({_value(TTL, sequence_id)} AS TEXT) AS INTEGER)"
    )


def _counting(row: str, sign: str) -> str:
    # no upsert: the conflict clause of the statement that fires a trigger would replace its own
    key = f"model_id = {row}.model_id AND tenant = {row}.tenant"
    return (
        f"INSERT INTO space_account SELECT {row}.model_id, {row}.tenant, 0, 0, 0"
        f" WHERE NOT EXISTS (SELECT 1 FROM space_account WHERE {key});"
        f" UPDATE space_account SET num_sequences = num_sequences {sign} 1,"
        f" num_groups = num_groups {sign} {row}.num_groups, tail_lbas = tail_lbas {sign} {row}.tail_lbas"
        f" WHERE {key};"
        f" DELETE FROM space_account WHERE {key} AND num_sequences = 0;"
    )


_ATTRIBUTES = (
    "UPDATE space_sequence SET (tenant, is_kept, ttl_s) = (SELECT {values})"
    " WHERE sequence_id = {row}.sequence_id;"
)
TRIGGERS = {
    "INSERT ON sequence": (
        "INSERT INTO space_sequence VALUES (new.id, new.model_id, '', 0, NULL, new.created_ns, 0,"
        f" {_GROUPS.format(row='new')}, new.tail_lbas);"
    ),
    "DELETE ON sequence": "DELETE FROM space_sequence WHERE sequence_id = old.id;",
    "UPDATE OF num_spilled, tail_lbas, changed_ns ON sequence": (
        f"UPDATE space_sequence SET num_groups = {_GROUPS.format(row='new')}, tail_lbas = new.tail_lbas,"
        " last_use_ns = max(last_use_ns, new.changed_ns) WHERE sequence_id = new.id;"
    ),
    "INSERT ON sequence_attribute": _ATTRIBUTES.format(row="new", values=_from_attributes("new.sequence_id")),
    "DELETE ON sequence_attribute": _ATTRIBUTES.format(row="old", values=_from_attributes("old.sequence_id")),
    "INSERT ON space_sequence": _counting("new", "+"),
    "DELETE ON space_sequence": _counting("old", "-"),
    "UPDATE OF tenant, num_groups, tail_lbas ON space_sequence": _counting("old", "-") + _counting("new", "+"),
}
ADOPT = (
    "INSERT INTO space_sequence SELECT id, model_id, {attributes}, changed_ns, 0, {groups}, tail_lbas"
    " FROM sequence ORDER BY id"
).format(attributes=_from_attributes("sequence.id"), groups=_GROUPS.format(row="sequence"))
SUM_UP = (
    "INSERT INTO space_account SELECT model_id, tenant, count(*), sum(num_groups), sum(tail_lbas)"
    " FROM space_sequence GROUP BY model_id, tenant"
)


@dataclass(frozen=True)
class Quota:
    """model, tenant: empty: all of them together. low_percent: of the cap: how far an eviction goes."""

    model: str
    tenant: str
    capacity_bytes: int
    low_percent: int = 100
    policy: str = "lru"


@dataclass(frozen=True)
class AccountRow:
    model_id: int
    tenant: str
    num_sequences: int
    num_groups: int
    tail_lbas: int


@dataclass(frozen=True)
class Candidate:
    """A sequence that may be evicted."""

    id: int
    name: str
    model_id: int
    num_tokens: int
    last_use_ns: int
    num_uses: int
    num_groups: int
    tail_lbas: int


_CANDIDATE = (
    "sequence_id, name, sequence.model_id, num_tokens, last_use_ns, num_uses, num_groups,"
    " space_sequence.tail_lbas"
)


class SpaceCatalogue:
    """db: the catalogue's connection; transaction: its context manager."""

    def __init__(self, db, transaction):
        self._db = db
        self._transaction = transaction

    @property
    def exists(self) -> bool:
        return self._has("space_quota")

    def _has(self, table: str) -> bool:
        return bool(self._db.execute("SELECT count(*) FROM sqlite_master WHERE name = ?", (table,)).get)

    def quotas(self) -> list[Quota]:
        if not self.exists:
            return []
        columns = "model, tenant, capacity_bytes, low_percent, policy"
        return [Quota(*row) for row in self._db.execute(f"SELECT {columns} FROM space_quota ORDER BY 1, 2")]

    def set_quota(self, quota: Quota) -> None:
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO space_quota VALUES (?, ?, ?, ?, ?)",
                (quota.model, quota.tenant, quota.capacity_bytes, quota.low_percent, quota.policy),
            )

    def remove_quota(self, model: str, tenant: str) -> bool:
        if not self.exists:
            return False
        with self._transaction():
            self._db.execute("DELETE FROM space_quota WHERE model = ? AND tenant = ?", (model, tenant))
            return self._db.changes() > 0

    def forget_model(self, model_id: int) -> None:
        """Its caps: the model is about to be deleted."""
        if self.exists:
            name = "(SELECT name FROM model WHERE id = ?)"
            self._db.execute(f"DELETE FROM space_quota WHERE model = {name}", (model_id,))

    def make(self) -> None:
        """Tables and triggers, if there are none yet."""
        if self.exists:
            return
        with self._transaction():
            self._db.execute(TABLES)
            # all at once, and indexes of what is there: row by row takes ten times as long
            self._db.execute(ADOPT)
            self._db.execute(SUM_UP)
            self._db.execute(INDEXES)
            for number, (event, body) in enumerate(TRIGGERS.items()):
                self._db.execute(f"CREATE TRIGGER space_{number} AFTER {event} BEGIN {body} END")

    def background(self) -> Background:
        """What is evicted unasked."""
        if not self._has("space_background"):
            return OFF
        row = self._db.execute("SELECT expired, high_percent, low_percent FROM space_background").fetchone()
        return OFF if row is None else Background(bool(row[0]), *row[1:])

    def set_background(self, background: Background) -> None:
        with self._transaction():
            if not self._has("space_background"):
                self._db.execute(BACKGROUND_TABLE)
            values = (background.expired, background.high_percent, background.low_percent)
            self._db.execute("INSERT OR REPLACE INTO space_background VALUES (1, ?, ?, ?)", values)

    def accounts(self) -> list[AccountRow]:
        columns = "model_id, tenant, num_sequences, num_groups, tail_lbas"
        return [AccountRow(*row) for row in self._db.execute(f"SELECT {columns} FROM space_account")]

    def sequence_lbas(self) -> int:
        """Blocks that sequences have, each once however many share it. Reads a row for each group."""
        groups = self._db.execute("SELECT coalesce(sum(num_lbas), 0) FROM kv_group").get
        return groups + self._db.execute("SELECT coalesce(sum(tail_lbas), 0) FROM sequence").get

    def tenant_of(self, sequence_id: int) -> str:
        return self._db.execute("SELECT tenant FROM space_sequence WHERE sequence_id = ?", (sequence_id,)).get

    def uses(self) -> Iterator[tuple[int, int, int]]:
        """(sequence, time in ns of its last use, number of uses) of all."""
        return iter(self._db.execute("SELECT sequence_id, last_use_ns, num_uses FROM space_sequence"))

    def write_uses(self, uses: Iterable[tuple[int, int, int]], most_uses: int) -> None:
        """(time in ns, number of uses, sequence) each."""
        with self._transaction():
            self._db.executemany(
                "UPDATE space_sequence SET last_use_ns = max(last_use_ns, ?1),"
                f" num_uses = min(num_uses + ?2, {most_uses}) WHERE sequence_id = ?3",
                uses,
            )

    def note_uses(self, rows: Iterable[tuple[int, int, str]]) -> None:
        """(time in ns, number of uses, name) each: of parts of a set, which counts them itself."""
        with self._transaction():
            self._db.executemany(
                "UPDATE space_sequence SET last_use_ns = max(last_use_ns, ?), num_uses = ?"
                " WHERE sequence_id = (SELECT id FROM sequence WHERE name = ?)",
                rows,
            )

    def reprieve(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """(time in ns, number of uses from now on, sequence) each."""
        with self._transaction():
            self._db.executemany(
                "UPDATE space_sequence SET last_use_ns = ?, num_uses = ? WHERE sequence_id = ?", rows
            )

    def oldest(self, account: Account) -> Iterator[Candidate]:
        """What of an account may be evicted, used longest ago first; read by the page."""
        last = (-1, -1)
        while True:
            found = self._db.execute(
                f"SELECT {_CANDIDATE} FROM space_sequence JOIN sequence ON sequence.id = sequence_id"
                " WHERE space_sequence.model_id = ? AND tenant = ? AND is_kept = 0"
                f" AND (last_use_ns, sequence_id) > (?, ?) ORDER BY last_use_ns, sequence_id LIMIT {PAGE_ROWS}",
                (*account, *last),
            )
            rows = list(found)
            yield from (Candidate(*row) for row in rows)
            if len(rows) < PAGE_ROWS:
                return
            last = rows[-1][4], rows[-1][0]

    def expired(self, now_ns: int, limit: int = PAGE_ROWS) -> list[Candidate]:
        """Sequences whose time to live is over, the oldest first."""
        end = f"last_use_ns + ttl_s * {_NS}"
        rows = self._db.execute(
            f"SELECT {_CANDIDATE} FROM space_sequence JOIN sequence ON sequence.id = sequence_id"
            f" WHERE ttl_s IS NOT NULL AND NOT is_kept AND {end} <= ? ORDER BY {end} LIMIT ?",
            (now_ns, limit),
        )
        return [Candidate(*row) for row in rows]
