"""Everything that kvfs raises for a user, and the errno of each: the only place errno is chosen.

Every error carries its facts as attributes and prints as one line that says what to do.
"""

import errno

from spdk_glue.status import (
    NamespaceInUse,
    NotAKvfsDrive,
    NvmeError,
    NvmeStatusError,
    OtherAttentionVersion,
    Status,
)
from spdk_glue.transports.url import BadLocation


class KvfsError(Exception):
    """Base of kvfs's errors."""


class NotADrive(KvfsError):
    """The file, or what it holds, is not a kvfs drive that this version can read."""

    def __init__(self, path, why: str):
        self.path, self.why = path, why
        super().__init__(f"{path}: {why}")


class DriveBusy(KvfsError):
    """pid: of a process here; host: the identifier of another host, for a drive on the wire."""

    def __init__(self, path, pid: int | None, host: str | None = None):
        self.path, self.pid, self.host = path, pid, host
        holder = f"host {host}" if host else f"process {pid}" if pid else "another process"
        super().__init__(f"{path} is open in {holder}: close it there, or use the drive through its mount")


class MediaFailure(KvfsError):
    """The file behind the drive could not be read or written."""


class DriveOfSet(KvfsError):
    """A drive that is one of a set, opened alone."""

    def __init__(self, path):
        self.path = path
        super().__init__(f"{path} is one drive of a set: open the set, by its file or by naming all its drives")


class NotInSet(KvfsError):
    """A drive that does not belong to the others: of no set, of another one, named twice, taken out."""

    def __init__(self, path, why: str):
        self.path, self.why = path, why
        super().__init__(f"{path}: {why}")


class DriveMissing(KvfsError):
    """A set without all its drives. missing: their last known locations."""

    def __init__(self, path, missing: list[str], why: str):
        self.path, self.missing, self.why = path, missing, why
        names = ", ".join(missing)
        super().__init__(
            f"{path}: of its drives {names} cannot be used ({why}): bring it back, or open the set degraded,"
            " without what is there"
        )


class DriveLost(KvfsError):
    """A drive of an open set that cannot be used any more, and what was wanted of it."""

    def __init__(self, location: str, what: str, why: str):
        self.location, self.what, self.why = location, what, why
        super().__init__(f"drive {location} is lost ({why}): it holds {what}; the set's other sequences go on")


class DriveExists(KvfsError):
    def __init__(self, path):
        self.path = path
        super().__init__(f"{path} exists already: remove it, or choose another name")


class NamespaceHoldsData(KvfsError):
    def __init__(self, location):
        self.location = location
        super().__init__(
            f"{location} holds data, which formatting would destroy: to do that,"
            " kvfsctl format --force, kvfs.format(overwrite=True)"
        )


class OutOfSpace(KvfsError):
    def __init__(self, wanted_bytes: int, largest_free_bytes: int):
        self.wanted_bytes, self.largest_free_bytes = wanted_bytes, largest_free_bytes
        super().__init__(
            f"the drive is full: {wanted_bytes} bytes wanted, {largest_free_bytes} free in one piece;"
            " delete sequences or use a larger drive"
        )


class CatalogueFull(OutOfSpace):
    """The area for names and groups is full, though blocks for data may be free."""

    def __init__(self, capacity_bytes: int):
        self.capacity_bytes = capacity_bytes
        KvfsError.__init__(
            self,
            f"the drive's catalogue of {capacity_bytes} bytes is full: delete sequences, or use a larger drive",
        )


class QuotaExceeded(OutOfSpace):
    """A cap, and nothing left that may be evicted for what is new. model, tenant: empty: all of them."""

    def __init__(self, model: str, tenant: str, wanted_bytes: int, capacity_bytes: int, needed_bytes: int):
        self.model, self.tenant = model, tenant
        self.wanted_bytes, self.capacity_bytes, self.needed_bytes = wanted_bytes, capacity_bytes, needed_bytes
        KvfsError.__init__(
            self,
            f"the cap of {quota_name(model, tenant)} is {capacity_bytes} bytes, but with {wanted_bytes} more"
            f" {needed_bytes} would be in use: unpin or delete sequences, or raise it with kvfsctl quota set",
        )


class NoSuchQuota(KvfsError):
    def __init__(self, model: str, tenant: str):
        self.model, self.tenant = model, tenant
        super().__init__(f"there is no cap of {quota_name(model, tenant)}: kvfsctl quota ls shows them")


def quota_name(model: str, tenant: str) -> str:
    whose = [f"model {model!r}"] * bool(model) + [f"tenant {tenant!r}"] * bool(tenant)
    return " and ".join(whose) or "all models"


class CatalogueDamaged(KvfsError):
    """Names and places that cannot be read, or contradict themselves."""

    def __init__(self, why: str):
        self.why = why
        super().__init__(f"the catalogue is damaged: {why}: look with kvfsctl check, mend with --repair")


class StoreClosed(KvfsError):
    def __init__(self):
        super().__init__("the store is closed: open it again with kvfs.open")


class ServerGone(KvfsError):
    """The process that owns the drive ended, or ended the connection."""

    def __init__(self, path):
        self.path = path
        super().__init__(
            f"{path}: the process that owns the drive is gone: mount the drive again (kvfsctl umount takes away"
            " what is left of the mount), then kvfs.open; what was not flushed is lost"
        )


class TooManyClients(KvfsError):
    def __init__(self, limit: int):
        self.limit = limit
        super().__init__(f"the drive's owner serves {limit} clients already: close one, or raise its limit")


class NotPermitted(KvfsError):
    """What the permissions of the mount, or of something in it, do not allow."""


class ReadOnly(KvfsError):
    def __init__(self, path):
        self.path = path
        super().__init__(f"{path} is mounted read-only: nothing in it can be changed")


class OtherProcess(KvfsError):
    """A store that this process has inherited by fork: the connection is its parent's."""

    def __init__(self, path, pid: int):
        self.path, self.pid = path, pid
        super().__init__(f"{path} was opened by process {pid}: open it in this one with kvfs.open")


class NoSuchModel(KvfsError):
    def __init__(self, name: str):
        self.name = name
        super().__init__(f"no model named {name!r}: add it with store.add_model")


class ModelInUse(KvfsError):
    """A model with sequences is not deleted."""

    def __init__(self, name: str, num_sequences: int):
        self.name, self.num_sequences = name, num_sequences
        super().__init__(f"model {name!r} has {num_sequences} sequences: delete them first")


class ModelMismatch(KvfsError):
    """A model of this name exists with another geometry."""

    def __init__(self, name: str, differences: dict):
        self.name, self.differences = name, differences
        facts = ", ".join(f"{key} is {have}, not {want}" for key, (have, want) in differences.items())
        super().__init__(f"model {name!r} exists with another geometry: {facts}")


class NoSuchSequence(KvfsError):
    def __init__(self, name: str):
        self.name = name
        super().__init__(f"no sequence named {name!r}")


class SequenceExists(KvfsError):
    def __init__(self, name: str):
        self.name = name
        super().__init__(f"a sequence named {name!r} exists already")


class EmptySequence(KvfsError):
    """Attention over a sequence that has no token in the layer."""

    def __init__(self, name: str, layer: int):
        self.name, self.layer = name, layer
        super().__init__(f"sequence {name!r} has no tokens in layer {layer}: append before attending")


class CannotMount(KvfsError):
    """Mounting is not possible. path: the mountpoint, or what mounting lacks."""

    def __init__(self, path, why: str):
        self.path, self.why = path, why
        super().__init__(f"cannot mount: {path}: {why}")


class AlreadyMounted(CannotMount):
    def __init__(self, path, mountpoint: str):
        self.mountpoint = mountpoint
        super().__init__(path, f"is mounted at {mountpoint} already")


class CannotServe(KvfsError):
    """An address at which nothing can be served."""

    def __init__(self, address: str, why: str):
        self.address, self.why = address, why
        super().__init__(f"cannot serve at {address}: {why}")


class CannotUnmount(KvfsError):
    def __init__(self, path, why: str):
        self.path, self.why = path, why
        super().__init__(f"cannot unmount {path}: {why}")


class InUse(KvfsError):
    """A device that holds something, or that something else uses, was not to be overwritten."""

    def __init__(self, location, why: str):
        self.location, self.why = location, why
        super().__init__(f"{location} {why}: --force overwrites it all the same")


class DriveLacks(KvfsError):
    """What was asked for is not among the things that this drive can do."""

    def __init__(self, what: str):
        self.what = what
        super().__init__(f"the drive cannot do {what}: use one that can, or do without")


class InvalidArgument(KvfsError, ValueError):
    """A shape, dtype, layer or option that does not fit; says what was given and what is wanted."""


class BadConfiguration(KvfsError):
    """source: a file or a variable; field: such as open.cache_bytes, None where it is the file itself."""

    def __init__(self, source, field: str | None, why: str):
        self.source, self.field, self.why = source, field, why
        super().__init__(f"{source}: {why}" if field is None else f"{source}: {field}: {why}")


ERRNO = {
    KvfsError: errno.EIO,
    NotADrive: errno.EMEDIUMTYPE,
    DriveBusy: errno.EBUSY,
    MediaFailure: errno.EIO,
    DriveOfSet: errno.EBUSY,
    NotInSet: errno.EINVAL,
    DriveMissing: errno.ENODEV,
    DriveLost: errno.EIO,
    DriveExists: errno.EEXIST,
    NamespaceHoldsData: errno.EEXIST,
    OutOfSpace: errno.ENOSPC,
    CatalogueFull: errno.ENOSPC,
    QuotaExceeded: errno.EDQUOT,
    NoSuchQuota: errno.ENOENT,
    CatalogueDamaged: errno.EIO,
    StoreClosed: errno.EBADF,
    ServerGone: errno.ENOTCONN,
    TooManyClients: errno.EUSERS,
    NotPermitted: errno.EACCES,
    ReadOnly: errno.EROFS,
    OtherProcess: errno.EBADF,
    NoSuchModel: errno.ENOENT,
    ModelMismatch: errno.EEXIST,
    NoSuchSequence: errno.ENOENT,
    SequenceExists: errno.EEXIST,
    ModelInUse: errno.ENOTEMPTY,
    EmptySequence: errno.ENODATA,
    CannotMount: errno.EINVAL,
    AlreadyMounted: errno.EBUSY,
    CannotServe: errno.EADDRNOTAVAIL,
    CannotUnmount: errno.EBUSY,
    InUse: errno.EBUSY,
    DriveLacks: errno.EOPNOTSUPP,
    InvalidArgument: errno.EINVAL,
    BadConfiguration: errno.EINVAL,
    NvmeError: errno.EIO,
    NvmeStatusError: errno.EIO,
    NamespaceInUse: errno.EBUSY,
    BadLocation: errno.EINVAL,
    NotAKvfsDrive: errno.ENODEV,
    OtherAttentionVersion: errno.EMEDIUMTYPE,
}


def errno_of(error: Exception) -> int:
    """The errno of an error, by its class or the nearest base that has one."""
    if isinstance(error, NvmeStatusError) and error.status == Status.CAPACITY_EXCEEDED:
        return errno.ENOSPC
    for base in type(error).__mro__:
        if base in ERRNO:
            return ERRNO[base]
    raise KeyError(f"{type(error).__name__} has no errno")
