"""Which blocks are free, as a clean end leaves it, so that opening need not read every row that names blocks.

The summary is a row of the catalogue. Triggers take it away in the transaction of the first change to what
names blocks, so it can never be wrong, whichever version of kvfs makes the change. After a crash it is not
there, and all rows are read.
"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from kvfs.allocator import Extent
from kvfs.errors import CatalogueFull

SCHEMA = """
CREATE TABLE IF NOT EXISTS free_space (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    extents BLOB NOT NULL          -- <u8 pairs: first LBA, number of LBAs; in order
) STRICT;
"""
# changes of tables whose rows name blocks
CHANGES = tuple(
    (table, change)
    for table, columns in (
        ("kv_group", "base_lba, num_lbas"),
        ("sequence", "tail_lba, tail_lbas"),
        ("object", "extents"),
        ("derived_segment", "base_lba, num_lbas"),
        ("file_extent", "lba, num_blocks"),
    )
    for change in ("INSERT", "DELETE", f"UPDATE OF {columns}")
)
LEAST_PAGES = 256  # of the catalogue: a smaller one is read in no time, and may have no room to spare
MAX_BYTES = 1 << 20
OF_ROOM = 4  # in the catalogue the summary takes one part of so many at most


class FreeSpace:
    """db: the catalogue's connection; transaction: its context manager; free_bytes: room for rows, roughly."""

    def __init__(self, db, transaction, free_bytes: Callable[[], int]):
        self._db = db
        self._transaction = transaction
        self._free_bytes = free_bytes

    def load(self) -> list[Extent] | None:
        """None where rows have changed since it was stored."""
        query = "SELECT count(*) FROM sqlite_master WHERE type = ? AND name LIKE 'free_space%'"
        if self._db.execute(query, ("trigger",)).get != len(CHANGES):
            return None
        packed = self._db.execute("SELECT extents FROM free_space").get
        return None if packed is None else [tuple(pair) for pair in _pairs(packed).tolist()]

    def store(self, extents: list[Extent]) -> None:
        """What is free, while rows name all else. Nothing happens where it is known, or not worth its room."""
        if self._db.execute("PRAGMA page_count").get < LEAST_PAGES:
            return
        packed = np.array(extents, "<u8").tobytes()
        if self.load() is not None or len(packed) > min(MAX_BYTES, self._free_bytes() // OF_ROOM):
            return
        with suppress(CatalogueFull), self._transaction():
            self._db.execute(SCHEMA)
            for number, (table, change) in enumerate(CHANGES):
                self._db.execute(
                    f"CREATE TRIGGER IF NOT EXISTS free_space_{number} AFTER {change} ON {table}"
                    " BEGIN DELETE FROM free_space; END"
                )
            self._db.execute("INSERT OR REPLACE INTO free_space VALUES (1, ?)", (packed,))


def _pairs(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, "<u8").reshape(-1, 2)
