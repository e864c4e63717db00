"""The KV cache as files: models, sequences, layers and heads in `kv`, the store's state in `.kvfs`.

KvTree translates requests with inode numbers and handles into calls of nodes (folders.py, files.py), and what
goes wrong there into FileErrors. Decisions: DESIGN.md.
"""

import errno
import itertools
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps

from kvfs.errors import KvfsError, NvmeStatusError, errno_of
from kvfs.kv_tree.early_content import EarlyContent
from kvfs.kv_tree.files import File, SafetensorsContent
from kvfs.kv_tree.folders import ControlFolder, KvFolder
from kvfs.kv_tree.inodes import InodeTable
from kvfs.kv_tree.nodes import DEFAULT_MODE, Folder, Mounted, Node, OpenContent, Permissions
from kvfs.kv_tree.uploads import COPY_BYTES, Upload
from kvfs.store import Store
from kvfs.tree import ROOT_INODE, AttributeChanges, Attributes, Caller, FileError, OpenFile

MAX_NAME_BYTES = 255
XATTR_CREATE, XATTR_REPLACE = 1, 2
SEEK_DATA, SEEK_HOLE = 3, 4
EVERYDAY = (errno.ENOENT, errno.ENODATA, errno.ESTALE, errno.ENXIO)  # not worth a line in the log
log = logging.getLogger("kvfs.kv_tree")


def _reported(operation: Callable) -> Callable:
    """Raises FileError for whatever a user or a drive did wrong, and logs a line where that says more."""

    @wraps(operation)
    def translated(self, *arguments):
        try:
            return operation(self, *arguments)
        except FileError as error:
            found = error
        except (KvfsError, NvmeStatusError) as error:
            found = FileError(errno_of(error), str(error))
        except OSError as error:
            found = FileError(error.errno or errno.EIO, str(error))
        if found.text and found.errno not in EVERYDAY:
            log.warning("%s", found.text)
        raise found from None

    return translated


class KvTree:
    """A kvfs.tree.Tree. uid, gid: whose everything is that has no owner noted, by default this process's.

    invite: what `.kvfs/connect` holds for who opens it; None for no such file. is_shared: see nodes.Mounted.
    """

    def __init__(
        self,
        store: Store,
        *,
        uid: int | None = None,
        gid: int | None = None,
        invite: Callable[[Caller], bytes] | None = None,
        is_shared: bool = False,
    ):
        mounted = Mounted(
            store,
            Permissions(DEFAULT_MODE, os.getuid() if uid is None else uid, os.getgid() if gid is None else gid),
            time.time_ns(),
            invite,
            is_shared,
        )
        self._top: dict[str, Folder] = {
            "kv": KvFolder(mounted, "kv"),
            ".kvfs": ControlFolder(mounted, ".kvfs"),
        }
        self._inodes = InodeTable()
        self._lock = threading.Lock()
        self._handles: dict[int, OpenContent] = {}
        self._folder_handles: dict[int, tuple[Folder, list[str]]] = {}
        self._next_handle = itertools.count(1)

    # nodes

    def _folder(self, inode: int) -> Folder:
        node = self._inodes.node(inode)
        if not isinstance(node, Folder):
            raise FileError(errno.ENOTDIR)
        return node

    def _child(self, parent: int, name: bytes) -> Node:
        if parent == ROOT_INODE:
            if _text(name) not in self._top:
                raise FileError(errno.ENOENT)
            return self._top[_text(name)]
        if name == b".":
            return self._folder(parent)
        return self._folder(parent).child(_text(name))

    def _attributes(self, node: Node) -> Attributes:
        attributes = node.attributes()
        attributes.inode = self._inodes.number_of(node)
        return attributes

    def _entered(self, node: Node) -> Attributes:
        """A node's attributes, counted as a lookup."""
        attributes = self._attributes(node)
        self._inodes.count(attributes.inode)
        return attributes

    @_reported
    def lookup(self, parent: int, name: bytes) -> Attributes:
        """In the root's inode, "kv" and ".kvfs". ".." of these has the root's inode, and nothing else of it."""
        if name == b".." and parent != ROOT_INODE:
            folder = self._folder(parent).parent
            if folder is None:
                return Attributes(ROOT_INODE, stat.S_IFDIR | 0o755, 1, 0, 0, 0, 0, 0, 0, 0)
            return self._entered(folder)
        return self._entered(self._child(parent, name))

    def forget(self, inode: int, count: int) -> None:
        self._inodes.forget(inode, count)

    def count_lookup(self, inode: int) -> None:
        self._inodes.count(inode)

    @_reported
    def attributes(self, inode: int) -> Attributes:
        return self._attributes(self._inodes.node(inode))

    @_reported
    def set_attributes(self, inode: int, changes: AttributeChanges, caller: Caller) -> Attributes:
        node = self._inodes.node(inode)
        node.set_attributes(changes)
        return self._attributes(node)

    # names

    @_reported
    def read_link(self, inode: int) -> bytes:
        raise FileError(errno.EINVAL)

    @_reported
    def make_node(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attributes:
        self._refuse(parent, name, "holds no special files")

    @_reported
    def make_symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attributes:
        self._refuse(parent, name, "holds no symbolic links")

    @_reported
    def link(self, inode: int, parent: int, name: bytes) -> Attributes:
        self._refuse(parent, name, "holds no hard links: a sequence can be forked")

    def _refuse(self, parent: int, name: bytes, why: str) -> None:
        folder = self._folder(parent)
        raise FileError(errno.EPERM, f"{folder.path} {why} ({_text(name)})")

    @_reported
    def make_folder(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes:
        return self._entered(self._folder(parent).make_folder(_text(name), stat.S_IMODE(mode), caller))

    @_reported
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[OpenFile, Attributes]:
        folder = self._folder(parent)
        try:
            node = folder.child(_text(name))
        except FileError as error:
            if error.errno != errno.ENOENT:
                raise
            node = folder.create(_text(name), caller)
        else:
            if flags & os.O_EXCL:
                raise FileError(errno.EEXIST)
        return self._open(node, flags, caller), self._entered(node)

    @_reported
    def unlink(self, parent: int, name: bytes) -> None:
        self._folder(parent).unlink(_text(name))

    @_reported
    def remove_folder(self, parent: int, name: bytes) -> None:
        self._folder(parent).remove_folder(_text(name))

    @_reported
    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        self._folder(parent).rename(_text(name), self._folder(new_parent), _text(new_name), flags)

    # files

    @_reported
    def open(self, inode: int, flags: int, caller: Caller) -> OpenFile:
        return self._open(self._inodes.node(inode), flags, caller)

    def _open(self, node: Node, flags: int, caller: Caller) -> OpenFile:
        if not isinstance(node, File):
            raise FileError(errno.EISDIR)
        handle = next(self._next_handle)
        self._handles[handle] = node.open(flags, caller)
        return OpenFile(handle, direct=node.is_direct)

    @_reported
    def read(self, handle: int, offset: int, size: int) -> memoryview | bytes:
        return self._handles[handle].read(offset, size)

    def read_now(self, handle: int, offset: int, size: int) -> None:
        """Never: what a file shows is put together."""

    @_reported
    def write(self, handle: int, offset: int, data: memoryview | bytes) -> int:
        return self._handles[handle].write(offset, data)

    def flush_waits(self, handle: int) -> bool:
        return True

    @_reported
    def flush(self, handle: int) -> None:
        """What was written becomes what it is to be: importing a sequence may take long."""
        self._handles[handle].flush()

    def release(self, handle: int) -> None:
        self._handles.pop(handle).release()

    @_reported
    def sync(self, handle: int, data_only: bool) -> None:
        self._handles[handle].sync()

    @_reported
    def allocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        if mode:
            raise FileError(errno.EOPNOTSUPP)
        self._handles[handle].allocate(length)

    @_reported
    def seek(self, handle: int, offset: int, whence: int) -> int:
        """There are no holes."""
        size = self._handles[handle].size
        if whence not in (SEEK_DATA, SEEK_HOLE):
            raise FileError(errno.EINVAL)
        if not 0 <= offset < size:
            raise FileError(errno.ENXIO)
        return offset if whence == SEEK_DATA else size

    @_reported
    def copy_range(
        self, source_handle: int, source_offset: int, target_handle: int, target_offset: int, length: int
    ) -> int:
        """Copy between open files; how many bytes. A whole sequence.safetensors makes a fork, not a copy."""
        source, target = self._handles[source_handle], self._handles[target_handle]
        source = source.content if isinstance(source, EarlyContent) else source
        if isinstance(source, SafetensorsContent) and isinstance(target, Upload):
            taken = target.take_over(source.reader, source_offset, target_offset, length)
            if taken is not None:
                return taken
        copied = 0
        while copied < length:
            piece = source.read(source_offset + copied, min(COPY_BYTES, length - copied))
            if not len(piece):
                break
            copied += target.write(target_offset + copied, piece)
        return copied

    # folders

    @_reported
    def open_folder(self, inode: int, caller: Caller) -> int:
        folder = self._folder(inode)
        handle = next(self._next_handle)
        self._folder_handles[handle] = folder, folder.listing()
        return handle

    def read_folder(self, handle: int, start_id: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """Those of the names that are still there when it is their turn."""
        folder, listing = self._folder_handles[handle]
        for name, position in listing.behind(start_id):
            try:
                attributes = self._entry(folder, name)
            except FileError as error:
                if error.errno not in EVERYDAY:
                    raise
                continue
            yield name.encode("utf-8", "surrogateescape"), attributes, position

    @_reported
    def _entry(self, folder: Folder, name: str) -> Attributes:
        return self._attributes(folder.child(name))

    def release_folder(self, handle: int) -> None:
        del self._folder_handles[handle]

    @_reported
    def sync_folder(self, handle: int, data_only: bool) -> None:
        self._folder_handles[handle][0].sync()

    # extended attributes

    @_reported
    def get_xattr(self, inode: int, name: bytes) -> bytes:
        node = self._inodes.node(inode)
        values = node.xattrs() if name.startswith(b"user.") else {}
        if _text(name) not in values:
            raise FileError(errno.ENODATA)
        return values[_text(name)]

    @_reported
    def set_xattr(self, inode: int, name: bytes, value: bytes, flags: int) -> None:
        node = self._inodes.node(inode)
        if flags and (_text(name) in node.xattrs()) != (flags == XATTR_REPLACE):
            raise FileError(errno.ENODATA if flags == XATTR_REPLACE else errno.EEXIST)
        node.set_xattr(_text(name), bytes(value))

    @_reported
    def list_xattrs(self, inode: int) -> list[bytes]:
        return [name.encode() for name in self._inodes.node(inode).xattrs()]

    @_reported
    def remove_xattr(self, inode: int, name: bytes) -> None:
        self._inodes.node(inode).remove_xattr(_text(name))


def _text(name: bytes) -> str:
    """A name from the kernel. Raises FileError ENAMETOOLONG, EILSEQ."""
    if len(name) > MAX_NAME_BYTES:
        raise FileError(errno.ENAMETOOLONG)
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FileError(
            errno.EILSEQ, f"names of models and sequences are UTF-8, which {name!r} is not"
        ) from None
