"""Do the files' rows agree with one another? Finding what contradicts itself, and mending what is safe.

Safe is: forgetting rows that lead nowhere, counting anew, and giving files that have lost their names new ones
in lost+found. Bytes are never guessed: of blocks that two files name, neither file keeps any.
"""

import os
import stat
import time
from dataclasses import dataclass

from kvfs.tree import ROOT_INODE

LOST_AND_FOUND = b"lost+found"
IS_FOLDER = f"(inode.mode & {stat.S_IFMT(0o777777)}) = {stat.S_IFDIR}"
IS_FILE = f"(inode.mode & {stat.S_IFMT(0o777777)}) = {stat.S_IFREG}"

# of every inode, what its row says and what the others do
_COUNTED = f"""
    CREATE TEMP TABLE counted AS
    SELECT inode.id, {IS_FOLDER} AS is_folder, num_links, inode.parent,
        coalesce(names.count, 0) AS names, coalesce(below.count, 0) AS folders, names.parent AS entry_parent,
        coalesce(blocks.count, 0) AS blocks, num_blocks
    FROM inode
    LEFT JOIN (SELECT inode, count(*) AS count, min(parent) AS parent FROM entry GROUP BY inode) AS names
        ON names.inode = inode.id
    LEFT JOIN (SELECT entry.parent, count(*) AS count FROM entry JOIN inode ON inode.id = entry.inode
            WHERE {IS_FOLDER} GROUP BY entry.parent) AS below ON below.parent = inode.id
    LEFT JOIN (SELECT inode, sum(num_blocks) AS count FROM file_extent GROUP BY inode) AS blocks
        ON blocks.inode = inode.id
"""
_LINKS = "CASE WHEN is_folder THEN 2 + folders ELSE names END"
_IS_LIVE = f"num_links > 0 AND (names > 0 OR id = {ROOT_INODE})"

# rows that lead nowhere: what they are, their table, and which
_NOWHERE = (
    ("names that lead to no file", "entry", "inode NOT IN (SELECT id FROM inode)"),
    (
        "names in no folder",
        "entry",
        f"parent NOT IN (SELECT id FROM inode WHERE {IS_FOLDER} AND num_links > 0)",
    ),
    ("extended attributes of no file", "xattr", "inode NOT IN (SELECT id FROM inode)"),
    ("extents of no file", "file_extent", f"inode NOT IN (SELECT id FROM inode WHERE {IS_FILE})"),
)


class FilePaths:
    """From an inode to one of its paths, as text for people."""

    def __init__(self, execute):
        self._execute = execute
        self._names: dict[int, tuple[int, bytes]] | None = None

    def path(self, inode: int) -> str:
        if self._names is None:
            rows = self._execute("SELECT inode, parent, name FROM entry")
            self._names = {inode: (parent, name) for inode, parent, name in rows}
        parts: list[bytes] = []
        above = inode
        while above != ROOT_INODE:
            if above not in self._names or len(parts) > len(self._names):  # or in a circle
                return f"file number {inode}, which has no path"
            above, name = self._names[above]
            parts.append(name)
        return "file " + repr("/" + os.fsdecode(b"/".join(reversed(parts))))


@dataclass(frozen=True)
class FileExtent:
    """Blocks that a file has, as a row says."""

    first_lba: int
    num_lbas: int
    inode: int
    first_block: int  # of the file
    paths: FilePaths
    shares: tuple = ()  # no sequence has a part

    @property
    def stop_lba(self) -> int:
        return self.first_lba + self.num_lbas

    @property
    def path(self) -> str:
        return self.paths.path(self.inode)

    def __str__(self) -> str:
        return f"blocks {self.first_lba} to {self.stop_lba - 1} ({self.path})"


class FileRows:
    """The rows of the files, as damaged as they may be. execute: of the catalogue's connection."""

    def __init__(self, execute):
        self._execute = execute
        self.paths = FilePaths(execute)

    def extents(self) -> list[FileExtent]:
        rows = self._execute("SELECT lba, num_blocks, inode, first_block FROM file_extent")
        return [FileExtent(*row, self.paths) for row in rows]

    def orphans(self) -> int:
        """Files deleted while open: their process has ended, and the next mount gives their blocks back."""
        return self._execute("SELECT count(*) FROM inode WHERE num_links = 0").get

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        found = []
        if self._execute(f"SELECT count(*) FROM inode WHERE id = {ROOT_INODE} AND {IS_FOLDER}").get == 0:
            found.append("files: there is no root folder")
        for what, table, where in _NOWHERE:
            count = self._execute(f"SELECT count(*) FROM {table} WHERE {where}").get
            if count:
                found.append(f"files: {count} {what}")
        self._count()
        for inode, links, wanted in self._execute(
            f"SELECT id, num_links, {_LINKS} FROM counted WHERE {_IS_LIVE} AND num_links != {_LINKS}"
        ):
            found.append(f"{self.paths.path(inode)} counts {links} links but has {wanted}")
        for inode, parent in self._execute(
            f"SELECT id, parent FROM counted WHERE {_IS_LIVE} AND is_folder AND id != {ROOT_INODE}"
            " AND (names > 1 OR parent != entry_parent)"
        ):
            found.append(f"{self.paths.path(inode)} is in another folder than number {parent}, as it says")
        for (inode,) in self._execute(
            f"SELECT id FROM counted WHERE num_links > 0 AND names = 0 AND id != {ROOT_INODE}"
        ):
            found.append(f"file number {inode} has no name")
        for inode, blocks, wanted in self._execute(
            "SELECT id, num_blocks, blocks FROM counted WHERE num_blocks != blocks"
        ):
            found.append(f"{self.paths.path(inode)} counts {blocks} blocks but has {wanted}")
        for inode, _ in self._crossing():
            found.append(f"{self.paths.path(inode)} has two blocks in one place")
        unreached = self._execute(
            f"WITH RECURSIVE reached(id) AS (SELECT {ROOT_INODE} UNION SELECT entry.inode FROM reached"
            " JOIN entry ON entry.parent = reached.id)"
            " SELECT count(*) FROM counted"
            " WHERE names > 0 AND num_links > 0 AND id NOT IN (SELECT id FROM reached)"
        ).get
        if unreached and not any("has no name" in text for text in found):
            found.append(f"files: {unreached} files cannot be reached from the root folder")
        self._execute("DROP TABLE temp.counted")
        return found

    def _count(self) -> None:
        self._execute("DROP TABLE IF EXISTS temp.counted")
        self._execute(_COUNTED)

    def _crossing(self) -> list[tuple[int, int]]:
        """(inode, first block) of extents that are empty, or reach into the next of their file."""
        rows = self._execute(
            "SELECT inode, first_block, num_blocks, lead(first_block) OVER"
            " (PARTITION BY inode ORDER BY first_block) FROM file_extent"
        )
        return [
            (inode, first)
            for inode, first, count, following in rows
            if count < 1 or first < 0 or (following is not None and first + count > following)
        ]

    # mending, in the caller's transaction

    def remove_extents(self, extents: list[FileExtent]) -> list[str]:
        """Make holes where a file's blocks are not its own; what was done, a line each."""
        done = []
        for extent in extents:
            where = (extent.inode, extent.first_block)
            self._execute("DELETE FROM file_extent WHERE inode = ? AND first_block = ?", where)
            done.append(f"made a hole of {extent}")
        return done

    def mend(self) -> list[str]:
        """What was done, a line each."""
        done = []
        self._make_root(done)
        orphans = self.orphans()
        for what, table, where in (
            ("files that were deleted while open", "inode", f"num_links = 0 AND id != {ROOT_INODE}"),
            *_NOWHERE,
        ):
            self._execute(f"DELETE FROM {table} WHERE {where}")
            count = self._changes()
            if count and not (orphans and table in ("xattr", "file_extent")):  # those go with their file
                done.append(f"removed {count} {what}")
        crossing = self._crossing()
        for where in crossing:
            self._execute("DELETE FROM file_extent WHERE inode = ? AND first_block = ?", where)
        if crossing:
            done.append(f"removed {len(crossing)} extents of files with two blocks in one place")
        self._count()
        self._name_the_lost(done)
        self._count()
        self._execute(
            f"UPDATE inode SET num_links = (SELECT {_LINKS} FROM counted WHERE id = inode.id) WHERE id IN"
            f" (SELECT id FROM counted WHERE num_links != {_LINKS})"
        )
        if self._changes():
            done.append(f"counted the links of {self._changes()} files anew")
        self._execute(
            "UPDATE inode SET parent = (SELECT entry_parent FROM counted WHERE id = inode.id) WHERE id IN"
            f" (SELECT id FROM counted WHERE is_folder AND id != {ROOT_INODE} AND parent != entry_parent)"
        )
        if self._changes():
            done.append(f"corrected the parents of {self._changes()} folders")
        self._execute(
            "UPDATE inode SET num_blocks = (SELECT blocks FROM counted WHERE id = inode.id) WHERE id IN"
            " (SELECT id FROM counted WHERE num_blocks != blocks)"
        )
        if self._changes():
            done.append(f"counted the blocks of {self._changes()} files anew")
        self._execute("DROP TABLE temp.counted")
        return done

    def _changes(self) -> int:
        return self._execute("SELECT changes()").get

    def _make_root(self, done: list[str]) -> None:
        if self._execute(f"SELECT count(*) FROM inode WHERE id = {ROOT_INODE} AND {IS_FOLDER}").get == 0:
            self._add_folder(ROOT_INODE, ROOT_INODE)
            done.append("made a new root folder")

    def _add_folder(self, inode: int, parent: int) -> None:
        now = time.time_ns()
        owner = (os.getuid(), os.getgid())
        row = (inode, parent, stat.S_IFDIR | 0o700, 2, *owner, 0, 0, 0, now, now, now, None)
        self._execute(f"INSERT OR REPLACE INTO inode VALUES ({', '.join('?' * len(row))})", row)

    def _name_the_lost(self, done: list[str]) -> None:
        lost = self._execute(f"SELECT id, is_folder FROM counted WHERE names = 0 AND id != {ROOT_INODE}")
        if not lost:
            return
        where = (ROOT_INODE, LOST_AND_FOUND)
        found = self._execute("SELECT inode FROM entry WHERE parent = ? AND name = ?", where).fetchone()
        if found is None:
            folder = self._execute("SELECT max(id) + 1 FROM inode").get
            self._add_folder(folder, ROOT_INODE)
            self._add_entry(*where, folder)
        else:
            folder = found[0]
        for inode, is_folder in lost:
            self._add_entry(folder, b"file-%d" % inode, inode)
            if is_folder:
                self._execute("UPDATE inode SET parent = ? WHERE id = ?", (folder, inode))
        done.append(f"named {len(lost)} files without a name in /{LOST_AND_FOUND.decode()}")

    def _add_entry(self, parent: int, name: bytes, inode: int) -> None:
        position = self._execute("SELECT coalesce(max(position), 0) + 1 FROM entry").get
        self._execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?)", (parent, name, inode, position))
