"""The files' part of the catalogue: inodes, names, extended attributes and extents, as rows.

Names and extended attributes change here at once, inodes and extents when a batch ends (see Catalogue.batch).
"""

from collections.abc import Iterable, Iterator

from kvfs.allocator import Extent
from kvfs.files.extent_map import ExtentMap
from kvfs.files.file_check import FileRows
from kvfs.files.inode import Inode

FILE_SCHEMA = """
CREATE TABLE inode (
    id INTEGER PRIMARY KEY,        -- 1: the root folder
    parent INTEGER NOT NULL,       -- of a folder; 0 of all else
    mode INTEGER NOT NULL,         -- as in stat, with the type
    num_links INTEGER NOT NULL,    -- 0: was deleted while open
    uid INTEGER NOT NULL,
    gid INTEGER NOT NULL,
    rdev INTEGER NOT NULL,
    size INTEGER NOT NULL,
    num_blocks INTEGER NOT NULL,   -- the sum of its extents
    atime_ns INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    target BLOB                    -- of a symbolic link
) STRICT;
CREATE TABLE entry (
    parent INTEGER NOT NULL REFERENCES inode(id),
    name BLOB NOT NULL,
    inode INTEGER NOT NULL REFERENCES inode(id),
    position INTEGER NOT NULL,     -- among all entries; a listing goes by it
    PRIMARY KEY (parent, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX entry_position ON entry (parent, position);
CREATE TABLE xattr (
    inode INTEGER NOT NULL REFERENCES inode(id),
    name BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (inode, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE file_extent (
    inode INTEGER NOT NULL REFERENCES inode(id),
    first_block INTEGER NOT NULL,
    num_blocks INTEGER NOT NULL,
    lba INTEGER NOT NULL,
    PRIMARY KEY (inode, first_block)
) STRICT, WITHOUT ROWID;
"""
INSERT_INODE = "INSERT OR REPLACE INTO inode VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
LISTED_AT_ONCE = 256  # entries

# bytes that a row takes at most, in tables and indices, besides what is said to be added
INODE_BYTES, ENTRY_BYTES, EXTENT_BYTES, XATTR_BYTES = 96, 80, 32, 32

Entry = tuple[int, int]  # inode, position
InodeRow = tuple  # the columns of inode, in order: the first fields of Inode


def row_of(inode: Inode) -> InodeRow:
    return (
        inode.id,
        inode.parent,
        inode.mode,
        inode.num_links,
        inode.uid,
        inode.gid,
        inode.rdev,
        inode.size,
        inode.num_blocks,
        inode.atime_ns,
        inode.mtime_ns,
        inode.ctime_ns,
        inode.target,
    )


class FileCatalogue:
    """Typed access to the tables above; within the caller's lock and transaction."""

    def __init__(self, execute, executemany):
        """Of an apsw connection."""
        self._execute = execute
        self._executemany = executemany

    # inodes

    def inode(self, inode_id: int) -> Inode | None:
        row = self._execute("SELECT * FROM inode WHERE id = ?", (inode_id,)).fetchone()
        return row and Inode(*row)

    def store_inodes(self, rows: Iterable[InodeRow]) -> None:
        self._executemany(INSERT_INODE, rows)

    def remove_inode(self, inode_id: int) -> None:
        for table in ("xattr", "file_extent"):
            self._execute(f"DELETE FROM {table} WHERE inode = ?", (inode_id,))
        self._execute("DELETE FROM inode WHERE id = ?", (inode_id,))

    def orphans(self) -> list[Inode]:
        """Inodes without a name."""
        return [Inode(*row) for row in self._execute("SELECT * FROM inode WHERE num_links = 0")]

    def next_inode_id(self) -> int:
        return (self._execute("SELECT max(id) FROM inode").get or 0) + 1

    def num_inodes(self) -> int:
        return self._execute("SELECT count(*) FROM inode").get

    # names

    def entry(self, parent: int, name: bytes) -> Entry | None:
        found = "SELECT inode, position FROM entry WHERE parent = ? AND name = ?"
        return self._execute(found, (parent, name)).fetchone()

    def has_entries(self, parent: int) -> bool:
        return self._execute("SELECT 1 FROM entry WHERE parent = ? LIMIT 1", (parent,)).fetchone() is not None

    def next_position(self) -> int:
        return (self._execute("SELECT max(position) FROM entry").get or 0) + 1

    def add_entry(self, parent: int, name: bytes, inode_id: int, position: int) -> None:
        self._execute("INSERT INTO entry VALUES (?, ?, ?, ?)", (parent, name, inode_id, position))

    def change_entry(self, parent: int, name: bytes, inode_id: int) -> None:
        """Have a name lead to another inode."""
        self._execute("UPDATE entry SET inode = ? WHERE parent = ? AND name = ?", (inode_id, parent, name))

    def rename_entry(self, parent: int, name: bytes, new_name: bytes) -> None:
        """Within a folder, so that a listing under way neither misses nor repeats it."""
        self._execute("UPDATE entry SET name = ? WHERE parent = ? AND name = ?", (new_name, parent, name))

    def remove_entry(self, parent: int, name: bytes) -> None:
        self._execute("DELETE FROM entry WHERE parent = ? AND name = ?", (parent, name))

    def list_entries(self, parent: int, after: int, last: int) -> list[tuple[bytes, int, int, InodeRow]]:
        """(name, position, inode id, its row, of None where there is none) of some entries with positions in
        (after, last], in order."""
        rows = self._execute(
            "SELECT name, position, entry.inode, inode.* FROM entry LEFT JOIN inode ON inode.id = entry.inode"
            " WHERE entry.parent = ? AND position > ? AND position <= ? ORDER BY position LIMIT ?",
            (parent, after, last, LISTED_AT_ONCE),
        )
        return [(name, position, inode_id, columns) for name, position, inode_id, *columns in rows]

    # extents

    def extents(self, inode_id: int) -> ExtentMap:
        rows = "SELECT first_block, num_blocks, lba FROM file_extent WHERE inode = ? ORDER BY first_block"
        return ExtentMap(self._execute(rows, (inode_id,)))

    def store_extents(self, inode_id: int, changed: tuple[int, int], runs: Iterable[tuple]) -> None:
        """What begins in the blocks [first, stop) is replaced by `runs`."""
        self._execute(
            "DELETE FROM file_extent WHERE inode = ? AND first_block >= ? AND first_block < ?",
            (inode_id, *changed),
        )
        self._executemany("INSERT INTO file_extent VALUES (?, ?, ?, ?)", [(inode_id, *run) for run in runs])

    # extended attributes

    def xattrs(self, inode_id: int) -> dict[bytes, bytes]:
        return dict(self._execute("SELECT name, value FROM xattr WHERE inode = ?", (inode_id,)))

    def set_xattr(self, inode_id: int, name: bytes, value: bytes) -> None:
        self._execute("INSERT OR REPLACE INTO xattr VALUES (?, ?, ?)", (inode_id, name, value))

    def remove_xattr(self, inode_id: int, name: bytes) -> None:
        self._execute("DELETE FROM xattr WHERE inode = ? AND name = ?", (inode_id, name))

    # checking

    def rows(self) -> FileRows:
        return FileRows(self._execute)

    def used_extents(self) -> Iterator[Extent]:
        return self._execute("SELECT lba, num_blocks FROM file_extent")
