"""Sums over the catalogue's rows, so that nobody who asks how full a drive is reads a million of them.

Triggers keep them in the transaction of each change, whichever version of kvfs makes it. A drive that was made
without them gets them when somebody asks first.
"""

from dataclasses import dataclass

TABLE = """
CREATE TABLE row_totals (
    kind TEXT NOT NULL,            -- sequence, group or object
    model_id INTEGER NOT NULL,     -- of sequences; 0: of all models together
    num_rows INTEGER NOT NULL,
    num_lbas INTEGER NOT NULL,     -- of sequences: their tail records'
    num_tokens INTEGER NOT NULL,   -- complete in every layer
    PRIMARY KEY (kind, model_id)
) STRICT, WITHOUT ROWID;
"""
_NAME = "row_totals_"  # of triggers, with a number


def _change(kind: str, sign: str, row: str, lbas: str, model: str = "0", tokens: str = "0") -> str:
    return (
        f"UPDATE row_totals SET num_rows = num_rows {sign} 1, num_lbas = num_lbas {sign} {row}.{lbas},"
        f" num_tokens = num_tokens {sign} {tokens} WHERE kind = '{kind}' AND model_id = {model};"
    )


def _of_sequence(sign: str, row: str) -> str:
    return _change("sequence", sign, row, "tail_lbas", f"{row}.model_id", f"{row}.num_tokens")


def _of_object(sign: str, row: str, block_bytes: int) -> str:
    return _change("object", sign, row, f"num_bytes / {block_bytes}").replace(
        f"{row}.num_bytes", f"({row}.num_bytes + {block_bytes - 1})"
    )


def _triggers(block_bytes: int) -> dict[str, str]:
    """By the event: what it does."""
    # a row that an INSERT OR REPLACE takes away fires no trigger of its own
    replaced = (
        "UPDATE row_totals SET (num_rows, num_lbas) = (SELECT row_totals.num_rows - 1, row_totals.num_lbas -"
        f" (num_bytes + {block_bytes - 1}) / {block_bytes} FROM object WHERE id = new.id)"
        " WHERE kind = 'object' AND EXISTS (SELECT 1 FROM object WHERE id = new.id);"
    )
    return {
        "AFTER INSERT ON model": "INSERT OR IGNORE INTO row_totals VALUES ('sequence', new.id, 0, 0, 0);",
        "AFTER DELETE ON model": "DELETE FROM row_totals WHERE kind = 'sequence' AND model_id = old.id;",
        "AFTER INSERT ON sequence": _of_sequence("+", "new"),
        "AFTER DELETE ON sequence": _of_sequence("-", "old"),
        "AFTER UPDATE OF model_id, num_tokens, tail_lbas ON sequence": _of_sequence("-", "old")
        + _of_sequence("+", "new"),
        "AFTER INSERT ON kv_group": _change("group", "+", "new", "num_lbas"),
        "AFTER DELETE ON kv_group": _change("group", "-", "old", "num_lbas"),
        "AFTER UPDATE OF num_lbas ON kv_group": _change("group", "-", "old", "num_lbas")
        + _change("group", "+", "new", "num_lbas"),
        "BEFORE INSERT ON object": replaced,
        "AFTER INSERT ON object": _of_object("+", "new", block_bytes),
        "AFTER DELETE ON object": _of_object("-", "old", block_bytes),
    }


def _counted(block_bytes: int) -> str:
    return (
        "SELECT 'sequence', model.id, count(sequence.id), coalesce(sum(tail_lbas), 0),"
        " coalesce(sum(num_tokens), 0) FROM model LEFT JOIN sequence ON model_id = model.id GROUP BY model.id"
        " UNION ALL SELECT 'group', 0, count(*), coalesce(sum(num_lbas), 0), 0 FROM kv_group"
        " UNION ALL SELECT 'object', 0, count(*),"
        f" coalesce(sum((num_bytes + {block_bytes - 1}) / {block_bytes}), 0), 0 FROM object"
    )


@dataclass(frozen=True)
class Totals:
    num_rows: int
    num_lbas: int
    num_tokens: int


class CatalogueTotals:
    """db: the catalogue's connection; transaction: its context manager; block_bytes: of logical blocks."""

    def __init__(self, db, transaction, block_bytes: int):
        self._db = db
        self._transaction = transaction
        self._counted = _counted(block_bytes)
        self._triggers = _triggers(block_bytes)

    def make_sure(self) -> None:
        """That they are kept from now on: counts all rows where they were not."""
        if self._are_kept:
            return
        with self._transaction():
            for number in range(len(self._triggers)):
                self._db.execute(f"DROP TRIGGER IF EXISTS {_NAME}{number}")
            self._db.execute("DROP TABLE IF EXISTS row_totals")
            self._db.execute(TABLE)
            self._db.execute(f"INSERT INTO row_totals {self._counted}")
            for number, (event, body) in enumerate(self._triggers.items()):
                self._db.execute(f"CREATE TRIGGER {_NAME}{number} {event} BEGIN {body} END")

    def sequences(self) -> dict[int, Totals]:
        """By the numbers of the models that are known."""
        self.make_sure()
        query = "SELECT model_id, num_rows, num_lbas, num_tokens FROM row_totals WHERE kind = 'sequence'"
        return {model_id: Totals(*counts) for model_id, *counts in self._db.execute(query)}

    def of(self, kind: str) -> Totals:
        """kind: "group" or "object"."""
        self.make_sure()
        query = "SELECT num_rows, num_lbas, num_tokens FROM row_totals WHERE kind = ? AND model_id = 0"
        return Totals(*self._db.execute(query, (kind,)).fetchone())

    @property
    def _are_kept(self) -> bool:
        query = f"SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND name LIKE '{_NAME}%'"
        return self._db.execute(query).get == len(self._triggers)

    def problems(self) -> list[str]:
        """Sums that rows contradict, a line each."""
        if not self._are_kept:
            return []
        kept = "SELECT kind, model_id, num_rows, num_lbas, num_tokens FROM row_totals"
        wrong = self._db.execute(f"SELECT DISTINCT kind FROM ({kept} EXCEPT SELECT * FROM ({self._counted}))")
        return [f"the totals of all {kind}s are not what their rows say" for (kind,) in wrong]

    def mend(self) -> None:
        """Count again."""
        if self._are_kept:
            self._db.execute("DELETE FROM row_totals")
            self._db.execute(f"INSERT INTO row_totals {self._counted}")
