"""The folders of the KV tree: kv, a model, a sequence, a layer, a head; and .kvfs."""

import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import fields

from kvfs.errors import InvalidArgument, NoSuchSequence, SequenceExists
from kvfs.kv_tree.files import (
    AttendFile,
    ConnectFile,
    HeadFile,
    SafetensorsFile,
    TextFile,
    TokensFile,
    UploadFile,
    json_text,
)
from kvfs.kv_tree.listing import Listing
from kvfs.kv_tree.nodes import DEFAULT_MODE, Folder, Mounted, Node, Permissions, folder_attributes
from kvfs.kv_tree.npy_format import HEADER_BYTES
from kvfs.kv_tree.safetensors_format import KINDS, layer_name
from kvfs.kv_tree.snapshot import Snapshot
from kvfs.kv_tree.transfer import SafetensorsReader, import_sequence
from kvfs.kv_tree.uploads import Purpose, Upload
from kvfs.layout import KvGeometry
from kvfs.model import Model
from kvfs.sequence import Sequence
from kvfs.sequence_attributes import KVFS
from kvfs.tree import AttributeChanges, Attributes, Caller, FileError

RENAME_NOREPLACE = 1
MAX_MODEL_JSON_BYTES = 65536
MAX_UPLOADS = 64  # of a folder, being written or waiting for their names
SAFETENSORS, JSON = ".safetensors", ".json"
MODEL_JSON = "model.json"
PAGE_ROWS = 10_000  # of names that are in memory while a folder is listed


class TopFolder(Folder):
    """Directly in the mount's root."""

    parent = None

    def __init__(self, mounted: Mounted, name: str):
        self._mounted, self._name, self.key = mounted, name, (name,)

    @property
    def path(self) -> str:
        return self._name

    def attributes(self) -> Attributes:
        return folder_attributes(self._mounted.permissions, 0, self._mounted.mounted_ns)

    def sync(self) -> None:
        self._mounted.store.flush()


class ControlFolder(TopFolder):
    """`.kvfs`: what the store says of itself."""

    def names(self) -> list[str]:
        return ["stats.json", "metrics", *(["connect"] if self._mounted.invite else [])]

    def child(self, name: str) -> Node:
        if name not in self.names():
            raise FileError(errno.ENOENT)
        if name == "connect":
            return ConnectFile(self, self._mounted.permissions, self._mounted)
        if name == "stats.json":
            data = json_text(self._mounted.counters())
        else:
            from kvfs.telemetry.metrics import metrics_text  # prometheus_client takes a while to import

            data = metrics_text(self._mounted.telemetry())
        return TextFile(self, name, self._mounted.permissions, time.time_ns(), data)


class UploadsFolder(Folder):
    """A folder in which files can be written that become something when they are closed.

    Files with a leading dot become it when they are renamed: so rsync and the safetensors library write.
    taken: the names of files that become something.
    """

    taken: str

    def __init__(self):
        self._uploads: dict[str, tuple[UploadFile, Upload]] = {}

    def _purpose(self, name: str, caller: Caller) -> Purpose | None:
        """What a file of this name becomes; None: nothing."""
        raise NotImplementedError

    def _upload(self, name: str) -> UploadFile | None:
        file, upload = self._uploads.get(name, (None, None))
        if upload is not None and upload.is_finished:
            self._uploads.pop(name, None)
            return None
        return file

    def _upload_names(self) -> list[str]:
        return [name for name in list(self._uploads) if self._upload(name) is not None]

    def attributes(self) -> Attributes:
        """One link, as Linux has it for folders that do not count those in them."""
        attributes = folder_attributes(self._mounted.permissions, 0, self._mounted.mounted_ns)
        attributes.num_links = 1
        return attributes

    def create(self, name: str, caller: Caller) -> UploadFile:
        purpose = self._purpose(name, caller)
        if purpose is None:
            if not name.startswith("."):
                raise FileError(errno.EPERM, f"{self.path} takes files as {self.taken}, not {name!r}")
            if len(self._upload_names()) >= MAX_UPLOADS:
                raise FileError(errno.ENOSPC, f"{MAX_UPLOADS} files wait in {self.path} to be renamed")
        upload = Upload(self._mounted.store.path, purpose)
        file = UploadFile(self, name, caller, time.time_ns(), upload)
        self._uploads[name] = file, upload
        return file

    def unlink(self, name: str) -> None:
        _, upload = self._uploads.get(name, (None, None))
        if upload is None or upload.is_finished:
            super().unlink(name)
        upload.remove()
        self._uploads.pop(name, None)

    def rename(self, name: str, target: Folder, new_name: str, flags: int) -> None:
        """Of a file that waits for its name."""
        file, upload = self._uploads.get(name, (None, None))
        if upload is None or upload.is_finished:
            super().rename(name, target, new_name, flags)
        purpose = self._purpose(new_name, file.caller)
        if target is not self or purpose is None:
            raise FileError(errno.EPERM, f"{self.path}/{name} can become {self.taken} there, not {new_name!r}")
        upload.become(purpose)


class KvFolder(UploadsFolder, TopFolder):
    """`kv`: a folder for each model. A model is made by writing its JSON to kv/NAME.json."""

    taken = "MODEL.json"

    def __init__(self, mounted: Mounted, name: str):
        TopFolder.__init__(self, mounted, name)
        UploadsFolder.__init__(self)
        self._models: dict[str, ModelFolder] = {}

    def names(self) -> list[str]:
        return [model.name for model in self._mounted.store.models()] + self._upload_names()

    def child(self, name: str) -> Node:
        for model in self._mounted.store.models():
            if model.name == name:
                return self._models.setdefault(name, ModelFolder(self._mounted, self, model))
        upload = self._upload(name)
        if upload is None:
            raise FileError(errno.ENOENT)
        return upload

    def make_folder(self, name: str, mode: int, caller: Caller) -> Node:
        text = f"a model needs its geometry: write a model.json to kv/{name}{JSON}, or use Store.add_model"
        raise FileError(errno.EPERM, text)

    def _purpose(self, name: str, caller: Caller) -> Purpose | None:
        model_name = name.removesuffix(JSON)
        if model_name in ("", name):
            return None
        return Purpose(lambda file: self._add_model(model_name, file))

    def _add_model(self, name: str, file) -> None:
        try:
            values = json.loads(os.pread(file.fileno(), MAX_MODEL_JSON_BYTES, 0))
            geometry = {field.name: values[field.name] for field in fields(KvGeometry) if field.name in values}
            self._mounted.store.add_model(name, **geometry)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidArgument(f"kv/{name}{JSON} is not a model: {error}") from error
        self._mounted.store.flush()


class ModelFolder(UploadsFolder):
    """The model's sequences. Copying a safetensors file to NAME.safetensors imports it as sequence NAME."""

    taken = "SEQUENCE.safetensors"

    def __init__(self, mounted: Mounted, parent: KvFolder, model: Model):
        super().__init__()
        self._mounted, self.parent, self.model = mounted, parent, model
        self.key = ("model", model.id, model.name)

    @property
    def path(self) -> str:
        return f"{self.parent.path}/{self.model.name}"

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for page in self._pages() for name in page))

    def listing(self) -> Listing:
        """There may be very many: not all at once."""
        return Listing(self._pages)

    def _pages(self) -> Iterator[list[str]]:
        yield [MODEL_JSON]
        after = ""
        while rows := list(self._mounted.store.sequence_rows(after, PAGE_ROWS, model=self.model.name)):
            yield [row.name for row in rows]
            after = rows[-1].name
        yield self._upload_names()

    def child(self, name: str) -> Node:
        if name == MODEL_JSON:
            return TextFile(
                self, name, self._mounted.permissions, self._mounted.mounted_ns, self._description()
            )
        try:
            return SequenceFolder(self._mounted, self, self._sequence(name))
        except NoSuchSequence:
            upload = self._upload(name)
            if upload is None:
                raise FileError(errno.ENOENT) from None
            return upload

    def _description(self) -> bytes:
        geometry = self.model.geometry
        return json_text({"name": self.model.name, **vars(geometry), "token_bytes": geometry.token_bytes})

    def _sequence(self, name: str) -> Sequence:
        sequence = self._mounted.store.sequence(name)
        if sequence.model is not self.model:
            raise NoSuchSequence(name)
        return sequence

    def make_folder(self, name: str, mode: int, caller: Caller) -> Node:
        if name == MODEL_JSON:
            raise FileError(errno.EEXIST)
        sequence = self._mounted.store.create_sequence(self.model, name, self._ownership(mode, caller))
        return SequenceFolder(self._mounted, self, sequence)

    def _ownership(self, mode: int, caller: Caller) -> dict[str, bytes]:
        """What of a new sequence's mode and owner is to be noted: nothing of what is so by default."""
        permissions = Permissions(mode, caller.uid, caller.gid)
        return {} if permissions == self._mounted.permissions else permissions.noted()

    def _purpose(self, name: str, caller: Caller) -> Purpose | None:
        sequence_name = name.removesuffix(SAFETENSORS)
        if sequence_name in ("", name):
            return None

        def finish(file) -> None:
            ownership = self._ownership(DEFAULT_MODE, caller)
            import_sequence(self._mounted.store, self.model, sequence_name, file, ownership)

        def fork(source: SafetensorsReader) -> None:
            parent = source.snapshot.sequence
            if parent.model is not self.model:
                raise InvalidArgument(f"{parent.name!r} cannot become a sequence of another model")
            inherited = Permissions.noted_of(parent, self._mounted.permissions)
            own = Permissions(inherited.mode, caller.uid, caller.gid)
            source.snapshot.fork(sequence_name, {} if own == inherited else own.noted())

        return Purpose(finish, fork)

    def remove_folder(self, name: str) -> None:
        """Removes the sequence, though its folder lists files: they are views of it, and go with it."""
        if name == MODEL_JSON:
            raise FileError(errno.ENOTDIR)
        self._sequence(name)
        self._mounted.store.delete_sequence(name)

    def rename(self, name: str, target: Folder, new_name: str, flags: int) -> None:
        if self._upload(name) is not None:
            super().rename(name, target, new_name, flags)
            return
        self._sequence(name)
        if target is not self:  # not EXDEV: mv would make an empty sequence and fail to copy
            raise FileError(errno.EPERM, f"{name!r} cannot become a sequence of another model")
        if flags & ~RENAME_NOREPLACE:
            raise FileError(errno.EINVAL)
        if new_name == name:
            return
        try:
            if new_name == MODEL_JSON:
                raise SequenceExists(new_name)
            self._mounted.store.rename_sequence(name, new_name)
        except SequenceExists:  # a folder that is not empty: its sequence may be of another model
            raise FileError(errno.EEXIST if flags & RENAME_NOREPLACE else errno.ENOTEMPTY) from None

    def sync(self) -> None:
        self._mounted.store.flush()


class _SequencePart(Folder):
    """A folder of a sequence: itself, a layer, a head."""

    def __init__(self, mounted: Mounted, parent: Folder, sequence: Sequence):
        self._mounted, self.parent, self.sequence = mounted, parent, sequence

    @property
    def _permissions(self) -> Permissions:
        self._check_alive()
        return Permissions.noted_of(self.sequence, self._mounted.permissions)

    def _check_alive(self) -> None:
        if self.sequence.is_deleted:
            raise FileError(errno.ESTALE)

    def unlink(self, name: str) -> None:
        """Nothing: `rm -r` goes on to the sequence's folder, and with that all files go."""
        if name not in self.names():
            raise FileError(errno.ENOENT)

    def remove_folder(self, name: str) -> None:
        """Nothing, as with files."""
        if name not in self.names():
            raise FileError(errno.ENOENT)

    def sync(self) -> None:
        self._check_alive()
        self.sequence.flush()


class SequenceFolder(_SequencePart):
    def __init__(self, mounted: Mounted, parent: ModelFolder, sequence: Sequence):
        super().__init__(mounted, parent, sequence)
        self.key = ("sequence", sequence.id, sequence.created_ns)

    @property
    def path(self) -> str:
        return f"{self.parent.path}/{self.sequence.name}"

    def attributes(self) -> Attributes:
        """Not to be believed for long: sequences are renamed, deleted and made through the API too."""
        num_layers = self.sequence.model.num_layers
        permissions, changed_ns = self._permissions, self.sequence.changed_ns
        return folder_attributes(permissions, num_layers, changed_ns, timeout_s=0.0)

    def set_attributes(self, changes: AttributeChanges) -> None:
        """Mode and owner are kept; times are those of the tokens, and stay."""
        now = self._permissions
        wanted = Permissions(
            now.mode if changes.mode is None else changes.mode,
            now.uid if changes.uid is None else changes.uid,
            now.gid if changes.gid is None else changes.gid,
        )
        if wanted != now:
            for name, value in wanted.noted().items():
                self.sequence.set_attribute(name, value)

    def names(self) -> list[str]:
        layers = range(self.sequence.model.num_layers)
        return ["sequence.json", "tokens.npy", "sequence.safetensors", *map(layer_name, layers)]

    def child(self, name: str) -> Node:
        layer = _index(name, self.sequence.model.num_layers, layer_name)
        if layer is not None:
            return LayerFolder(self._mounted, self, self.sequence, layer)
        if name not in self.names():
            raise FileError(errno.ENOENT)
        permissions = self._permissions
        if name == "sequence.json":
            return TextFile(self, name, permissions, self.sequence.changed_ns, self._description())
        snapshot = Snapshot.of(self.sequence)
        if name == "tokens.npy":
            return TokensFile(self, permissions, snapshot)
        return SafetensorsFile(self, permissions, snapshot)

    def _description(self) -> bytes:
        geometry = self.sequence.model.geometry
        return json_text(
            {
                "name": self.sequence.name,
                "model": self.sequence.model.name,
                "num_tokens": self.sequence.num_tokens,
                "num_token_ids": self.sequence.num_token_ids,
                "dtype": geometry.dtype,
                "npy_dtype": geometry.numpy_dtype.str,
                "npy_header_bytes": HEADER_BYTES,
                "created_ns": self.sequence.created_ns,
                "changed_ns": self.sequence.changed_ns,
                "attributes": {
                    name: value.decode("utf-8", "backslashreplace") for name, value in self._given().items()
                },
            }
        )

    # extended attributes

    def _given(self) -> dict[str, bytes]:
        """Attributes that users gave."""
        self._check_alive()
        return {name: value for name, value in self.sequence.attributes().items() if name.startswith("user.")}

    def _told(self) -> dict[str, bytes]:
        """Attributes that tell of the sequence, and cannot be set."""
        model = self.sequence.model
        values = {"num_tokens": self.sequence.num_tokens, "dtype": model.geometry.dtype, "model": model.name}
        return {KVFS + name: str(value).encode() for name, value in values.items()}

    def xattrs(self) -> dict[str, bytes]:
        return self._given() | self._told()

    def set_xattr(self, name: str, value: bytes) -> None:
        self._check_xattr(name)
        self.sequence.set_attribute(name, value)

    def remove_xattr(self, name: str) -> None:
        self._check_xattr(name)
        if name not in self._given():
            raise FileError(errno.ENODATA)
        self.sequence.remove_attribute(name)

    def _check_xattr(self, name: str) -> None:
        self._check_alive()
        if not name.startswith("user."):
            raise FileError(errno.EOPNOTSUPP, f"{self.path} has attributes user.* only, not {name}")
        if name in self._told():
            raise FileError(errno.EPERM, f"{name} tells of {self.path} and cannot be set")


class LayerFolder(_SequencePart):
    def __init__(self, mounted: Mounted, parent: SequenceFolder, sequence: Sequence, layer: int):
        super().__init__(mounted, parent, sequence)
        self._layer = layer
        self.key = (*parent.key, layer)

    @property
    def path(self) -> str:
        return f"{self.parent.path}/{layer_name(self._layer)}"

    def attributes(self) -> Attributes:
        changed_ns = self.sequence.changed_ns
        return folder_attributes(self._permissions, self.sequence.model.num_kv_heads, changed_ns)

    def names(self) -> list[str]:
        return ["attend", *map(head_name, range(self.sequence.model.num_kv_heads))]

    def child(self, name: str) -> Node:
        if name == "attend":
            return AttendFile(self, self._permissions, self._mounted, self.sequence, self._layer)
        head = _index(name, self.sequence.model.num_kv_heads, head_name)
        if head is None:
            raise FileError(errno.ENOENT)
        return HeadFolder(self._mounted, self, self.sequence, self._layer, head)


class HeadFolder(_SequencePart):
    def __init__(self, mounted: Mounted, parent: LayerFolder, sequence: Sequence, layer: int, head: int):
        super().__init__(mounted, parent, sequence)
        self._layer, self._head = layer, head
        self.key = (*parent.key, head)

    @property
    def path(self) -> str:
        return f"{self.parent.path}/{head_name(self._head)}"

    def attributes(self) -> Attributes:
        return folder_attributes(self._permissions, 0, self.sequence.changed_ns)

    def names(self) -> list[str]:
        return [f"{kind}.npy" for kind in KINDS]

    def child(self, name: str) -> Node:
        if name not in self.names():
            raise FileError(errno.ENOENT)
        kind = self.names().index(name)
        snapshot = Snapshot.of(self.sequence)
        return HeadFile(self, self._permissions, snapshot, self._layer, self._head, kind)


def head_name(head: int) -> str:
    return f"kv_head_{head:02}"


def _index(name: str, count: int, name_of) -> int | None:
    """Which of `count` numbered names this is, None for none of them."""
    digits = name.rpartition("_")[2]
    if not (digits.isascii() and digits.isdigit() and len(digits) < 6):
        return None
    index = int(digits)
    return index if index < count and name_of(index) == name else None
