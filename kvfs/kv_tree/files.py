"""The files of the KV tree. What a file holds is fixed when it is looked up: a change makes another inode."""

import json
import os
from functools import cached_property
from hashlib import blake2b

import numpy as np

from kvfs.head_pieces import HeadRows
from kvfs.kv_tree.attend import AttendContent
from kvfs.kv_tree.early_content import EarlyContent
from kvfs.kv_tree.nodes import File, Folder, Mounted, OpenContent, Permissions, file_attributes
from kvfs.kv_tree.npy_format import HEADER_BYTES, npy_header
from kvfs.kv_tree.safetensors_format import KINDS
from kvfs.kv_tree.snapshot import Snapshot
from kvfs.kv_tree.transfer import SafetensorsReader
from kvfs.kv_tree.uploads import Upload
from kvfs.sequence import Sequence
from kvfs.tree import AttributeChanges, Attributes, Caller


class _NamedFile(File):
    def __init__(self, parent: Folder, name: str, key: tuple, permissions: Permissions, changed_ns: int):
        self.parent, self.name = parent, name
        self.key = (*parent.key, name, *key)
        self._permissions = permissions
        self._changed_ns = changed_ns

    @property
    def path(self) -> str:
        return f"{self.parent.path}/{self.name}"

    def _attributes(self, size: int) -> Attributes:
        return file_attributes(self._permissions.of_files, self._permissions, size, self._changed_ns)


class BytesContent(OpenContent):
    def __init__(self, data: bytes):
        self._data = memoryview(data)
        self.size = len(data)

    def read(self, offset: int, size: int) -> memoryview:
        return self._data[offset : offset + size]


class TextFile(_NamedFile):
    """What can be written down when the file is looked up."""

    def __init__(self, parent: Folder, name: str, permissions: Permissions, changed_ns: int, data: bytes):
        super().__init__(parent, name, (blake2b(data, digest_size=16).hexdigest(),), permissions, changed_ns)
        self._data = data

    def attributes(self) -> Attributes:
        return self._attributes(len(self._data))

    def open(self, flags: int, caller: Caller) -> OpenContent:
        self.check_read_only(flags)
        return BytesContent(self._data)


def json_text(values: dict) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


class ConnectFile(_NamedFile):
    """`connect`: how another process reaches the store. Each open invites the caller once."""

    is_direct = True

    def __init__(self, parent: Folder, permissions: Permissions, mounted: Mounted):
        super().__init__(parent, "connect", (), permissions, mounted.mounted_ns)
        self._invite = mounted.invite

    def attributes(self) -> Attributes:
        return self._attributes(0)

    def open(self, flags: int, caller: Caller) -> OpenContent:
        self.check_read_only(flags)
        return BytesContent(self._invite(caller))


class _SnapshotFile(_NamedFile):
    def __init__(self, parent: Folder, name: str, permissions: Permissions, snapshot: Snapshot):
        super().__init__(parent, name, snapshot.key, permissions, snapshot.sequence.changed_ns)
        self._snapshot = snapshot

    def attributes(self) -> Attributes:
        return self._attributes(self.content.size)

    def open(self, flags: int, caller: Caller) -> OpenContent:
        self.check_read_only(flags)
        self._snapshot.check()
        if flags & os.O_DIRECT:  # for all others the kernel reads ahead
            return EarlyContent(self.content, self._snapshot.check)
        return self.content

    @cached_property
    def content(self) -> OpenContent:
        """One for all who open it: it has no state."""
        raise NotImplementedError


class HeadFile(_SnapshotFile):
    """`keys.npy` or `values.npy` of one head."""

    def __init__(self, parent, permissions: Permissions, snapshot: Snapshot, layer: int, head: int, kind: int):
        super().__init__(parent, f"{KINDS[kind]}.npy", permissions, snapshot)
        self._place = (layer, kind, head)

    @cached_property
    def content(self) -> OpenContent:
        return HeadContent(self._snapshot, *self._place)


class HeadContent(OpenContent):
    def __init__(self, snapshot: Snapshot, layer: int, kind: int, head: int):
        self._snapshot = snapshot
        self._place = (layer, kind, head)
        model = snapshot.sequence.model
        self._row_bytes = model.layout.row_bytes
        self._header = npy_header(model.geometry.numpy_dtype, (snapshot.num_tokens, model.head_dim))
        self.size = HEADER_BYTES + snapshot.num_tokens * self._row_bytes

    def read(self, offset: int, size: int) -> memoryview | bytes:
        stop = min(offset + size, self.size)
        if offset >= stop:
            return b""
        if stop <= HEADER_BYTES:
            return self._header[offset:stop]
        start, stop = max(0, offset - HEADER_BYTES), stop - HEADER_BYTES
        first, last = start // self._row_bytes, -(-stop // self._row_bytes)
        rows = self._snapshot.read_heads([HeadRows(*self._place, first, last)])
        data = rows[start - first * self._row_bytes : stop - first * self._row_bytes]
        return self._header[offset:] + data if offset < HEADER_BYTES else data


class TokensFile(_SnapshotFile):
    """`tokens.npy`: the token ids that were kept beside the KV."""

    def __init__(self, parent: Folder, permissions: Permissions, snapshot: Snapshot):
        super().__init__(parent, "tokens.npy", permissions, snapshot)

    @cached_property
    def content(self) -> OpenContent:
        return TokensContent(self._snapshot)


class TokensContent(OpenContent):
    def __init__(self, snapshot: Snapshot):
        self._snapshot = snapshot
        self._header = npy_header(np.dtype("<u4"), (snapshot.num_token_ids,))
        self.size = HEADER_BYTES + 4 * snapshot.num_token_ids

    def read(self, offset: int, size: int) -> bytes:
        if offset + size <= HEADER_BYTES:
            return self._header[offset : offset + size]
        return (self._header + self._snapshot.token_ids().astype("<u4").tobytes())[offset : offset + size]


class SafetensorsFile(_SnapshotFile):
    def __init__(self, parent: Folder, permissions: Permissions, snapshot: Snapshot):
        super().__init__(parent, "sequence.safetensors", permissions, snapshot)

    @cached_property
    def content(self) -> OpenContent:
        return SafetensorsContent(self._snapshot)


class SafetensorsContent(OpenContent):
    def __init__(self, snapshot: Snapshot):
        self.reader = SafetensorsReader(snapshot)
        self.size = self.reader.size

    def read(self, offset: int, size: int) -> memoryview | bytes:
        return self.reader.read(offset, size)


class AttendFile(_NamedFile):
    is_direct = True

    def __init__(
        self, parent: Folder, permissions: Permissions, mounted: Mounted, sequence: Sequence, layer: int
    ):
        super().__init__(parent, "attend", (), permissions, sequence.changed_ns)
        self._mounted, self._sequence, self._layer = mounted, sequence, layer

    def attributes(self) -> Attributes:
        attributes = self._attributes(0)
        attributes.mode |= self._permissions.of_questions
        return attributes

    def set_attributes(self, changes: AttributeChanges) -> None:
        if changes.size is None:  # opening for writing cuts what is there
            super().set_attributes(changes)

    def open(self, flags: int, caller: Caller) -> OpenContent:
        return AttendContent(self._mounted.store, self._sequence, self._layer)


class UploadFile(_NamedFile):
    """A file that is being written: it is something else once it is closed."""

    is_direct = True

    def __init__(self, parent: Folder, name: str, caller: Caller, now_ns: int, upload: Upload):
        permissions = Permissions(0o600, caller.uid, caller.gid)
        super().__init__(parent, name, (now_ns,), permissions, now_ns)
        self.caller = caller
        self._upload = upload

    def attributes(self) -> Attributes:
        attributes = self._attributes(self._upload.size)
        attributes.mode |= 0o200
        attributes.timeout_s = 0.0
        return attributes

    def set_attributes(self, changes: AttributeChanges) -> None:
        """Times and permissions are not kept: the file is not going to be."""
        if changes.size is not None:
            self._upload.truncate(changes.size)

    def open(self, flags: int, caller: Caller) -> OpenContent:
        self._upload.opened()
        return self._upload
