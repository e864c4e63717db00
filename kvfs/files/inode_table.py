"""The inodes in memory: which are referred to, which differ from their rows, which blocks wait for a row.

Two locks. The store's guards the catalogue, the allocator, references and names. `data_lock` is held for
moments only, inside the store's or alone: it guards sizes and extents, and what is to be written of them, so
that the rows of a batch are always one state of a file.
"""

import threading
from collections.abc import Iterable

from kvfs.allocator import Extent
from kvfs.files.extent_map import ExtentMap
from kvfs.files.file_catalogue import row_of
from kvfs.files.inode import Inode
from kvfs.files.write_behind import WriteBehind
from kvfs.tree import ROOT_INODE


class InodeTable:
    def __init__(self, store, behind: WriteBehind):
        self._store = store
        self._behind = behind
        self._rows = store._catalogue.files
        self._batch = store._catalogue.batch
        self._batch.pending = self
        self.data_lock = threading.Lock()
        self._inodes: dict[int, Inode] = {}
        self.next_id = self._rows.next_inode_id()  # higher than any that a kernel may still refer to
        self.num_inodes = self._rows.num_inodes()
        self._changed: dict[int, Inode] = {}  # differ from their rows
        self._in_flight: set[Extent] = set()  # allocated, their data on the way
        self._unnamed: list[Extent] = []  # in a file, but in no row yet
        self._freed: list[Extent] = []  # in no file any more, but perhaps in a row
        self._leaving: list[Extent] = []  # in no row once the batch is committed
        for orphan in self._rows.orphans():  # deleted while open, and then the process ended
            self._remove(orphan)

    # finding; under the store's lock

    def get(self, inode_id: int) -> Inode | None:
        inode = self._inodes.get(inode_id)
        if inode is None:
            inode = self._rows.inode(inode_id)
            if inode is not None:
                self._inodes[inode_id] = inode
        return inode

    def in_memory(self, inode_id: int) -> Inode | None:
        """Needs no lock."""
        return self._inodes.get(inode_id)

    def load_extents(self, inode: Inode) -> None:
        if inode.extents is None:
            inode.extents = self._rows.extents(inode.id)

    def new(self, parent: int, mode: int, uid: int, gid: int, rdev: int, now_ns: int, target=None) -> Inode:
        """With one link, of a folder two."""
        inode = Inode(
            self.next_id, parent, mode, 1, uid, gid, rdev, 0, 0, now_ns, now_ns, now_ns, target, has_row=False
        )
        inode.num_links += inode.is_folder
        inode.size = len(target or b"")
        inode.xattrs = {}
        if inode.is_file:
            inode.extents = ExtentMap()
        self.next_id += 1
        self.num_inodes += 1
        self._inodes[inode.id] = inode
        self.changed(inode)
        return inode

    def drop_unused(self, inode: Inode) -> None:
        """Have an inode leave memory, and the drive if it has no name, once nothing refers to it."""
        if inode.is_in_use or inode.id == ROOT_INODE:
            return
        if inode.num_links == 0:
            self._remove(inode)
        elif inode.id not in self._changed:
            self._inodes.pop(inode.id, None)

    def _remove(self, inode: Inode) -> None:
        if inode.is_file:
            self.load_extents(inode)
        if inode.has_row or inode.xattrs:
            self._batch.join()
            self._rows.remove_inode(inode.id)
        with self.data_lock:
            if inode.is_file:
                self._freed += [(lba, count) for _, count, lba in inode.extents.runs()]
            self._changed.pop(inode.id, None)
        self._inodes.pop(inode.id, None)
        self.num_inodes -= 1

    # changing

    def changed(self, inode: Inode) -> None:
        with self.data_lock:
            self.note_changed(inode)

    # under data_lock:

    def note_changed(self, inode: Inode) -> None:
        self._changed[inode.id] = inode
        self._inodes[inode.id] = inode  # a batch that ended meanwhile may have let it go

    def add_extents(self, inode: Inode, first_block: int, extents: Iterable[Extent]) -> None:
        """Blocks whose data are on the drive, or on their way behind, become part of a file."""
        for lba, count in extents:
            inode.extents.add(first_block, count, lba)
            first_block += count
            self._in_flight.discard((lba, count))
            self._unnamed.append((lba, count))
        inode.num_blocks = inode.extents.num_blocks
        self.note_changed(inode)

    def remove_extents(self, inode: Inode, first_block: int, stop_block: int) -> None:
        """Make a hole."""
        self._freed += inode.extents.remove(first_block, stop_block)
        inode.num_blocks = inode.extents.num_blocks
        self.note_changed(inode)

    # space

    def allocated(self, extents: Iterable[Extent]) -> None:
        """Their data are on the way; `add_extents` or `not_written` follows."""
        with self.data_lock:
            self._in_flight.update(extents)

    def not_written(self, extents: Iterable[Extent]) -> None:
        """Allocated, and perhaps written in part: no file has them after all."""
        with self.data_lock:
            self._in_flight.difference_update(extents)
            self._freed += extents

    @property
    def freed_lbas(self) -> int:
        """On their way back to the allocator."""
        return sum(count for _, count in self._freed + self._leaving)

    def extents_in_memory(self) -> list[Extent]:
        """Handed out, and named by no row."""
        with self.data_lock:
            return [*self._in_flight, *self._unnamed, *self._freed, *self._leaving]

    # what the catalogue's batch asks for; under the store's lock

    def num_pending(self) -> int:
        return len(self._changed) + len(self._freed)

    def write_pending(self) -> None:
        inodes, extents = [], []
        self._behind.wait()  # no row may name what is not written
        with self.data_lock:
            for inode in self._changed.values():
                self._behind.wait(inode)  # what has begun since
            changed, self._changed = self._changed, {}
            self._leaving += self._freed
            self._freed = []
            self._unnamed = []
            for inode in changed.values():
                inode.has_row = True
                inodes.append(row_of(inode))
                blocks = inode.extents and inode.extents.take_changed()
                if blocks:
                    extents.append((inode.id, blocks, list(inode.extents.runs(*blocks))))
        self._rows.store_inodes(inodes)
        for change in extents:
            self._rows.store_extents(*change)
        for inode in changed.values():
            if not inode.is_in_use and inode.num_links and inode.id != ROOT_INODE:
                self._inodes.pop(inode.id, None)

    def pending_committed(self) -> None:
        # nothing is on its way to these any more: what was behind has been waited for
        leaving, self._leaving = self._leaving, []
        for extent in leaving:
            self._store._allocator.hold(*extent)
