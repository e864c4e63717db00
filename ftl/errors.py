"""What can go wrong in a drive's flash and its translation layer. Every error carries its facts."""

import os
from errno import EDQUOT, ENOSPC


class FlashError(Exception):
    """Base of all errors of this package."""


class NotADrive(FlashError):
    """A file that does not hold a drive, or whose header is damaged."""

    def __init__(self, path, why: str):
        self.path, self.why = path, why
        super().__init__(f"{path} is not a kvfs drive: {why}")


class FormatVersionTooNew(FlashError):
    """A drive written by a newer version of this software."""

    def __init__(self, found: int, supported: int):
        self.found, self.supported = found, supported
        super().__init__(f"the drive has format version {found}, this software knows up to {supported}")


class TruncatedDrive(FlashError):
    """A drive's file is shorter than its header says; sizes in bytes."""

    def __init__(self, path, expected: int, found: int):
        self.path, self.expected, self.found = path, expected, found
        super().__init__(f"{path} is truncated: {found} bytes of {expected}")


class DriveBusy(FlashError):
    """Another process (or this one) has the drive open; pid is None if it cannot be told."""

    def __init__(self, path, pid: int | None):
        self.path, self.pid = path, pid
        who = "another process" if pid is None else f"process {pid}"
        super().__init__(f"{path} is in use by {who}")


class NamespaceHoldsData(FlashError):
    """A namespace that is to become a drive is not empty."""

    def __init__(self, location):
        self.location = location
        super().__init__(f"{location} holds data: to overwrite it, ask for that")


class ReadOnlyMedia(FlashError):
    """A change was asked of a drive that was opened for reading."""

    def __init__(self, operation: str):
        self.operation = operation
        super().__init__(f"cannot {operation}: the drive is open read-only")


class MediaClosed(FlashError):
    """A drive was used after it was closed."""

    def __init__(self):
        super().__init__("the drive is closed")


class MediaIoError(FlashError):
    """The backing store failed; errno and byte offset are those of the failed transfer."""

    def __init__(self, errno: int, path, offset: int):
        self.errno, self.path, self.offset = errno, path, offset
        super().__init__(f"{path}: {os.strerror(errno)} at offset {offset}")


class BackingFull(MediaIoError):
    """The store behind the flash has no room for what was programmed or erased: a full disk.

    As after any failed program, pages of the batch may be missing; the same can be written again, elsewhere,
    once there is room.
    """


def backing_error(errno: int, path, offset: int) -> MediaIoError:
    """The error for a failed transfer, by its errno."""
    return (BackingFull if errno in (ENOSPC, EDQUOT) else MediaIoError)(errno, path, offset)


class NandRuleViolation(FlashError):
    """A program or erase that flash does not allow: a bug above, or a damaged table."""

    def __init__(self, rule: str, page: int):
        self.rule, self.page = rule, page
        super().__init__(f"{rule}: physical page {page}")


class ProgramFailed(FlashError):
    """The flash could not program pages of these erase blocks; planes: int64 array.

    What the failed pages hold is undefined. Of the batch's other pages any may have been programmed.
    """

    def __init__(self, superblock: int, planes):
        self.superblock, self.planes = superblock, planes
        super().__init__(f"program failed in superblock {superblock} on planes {planes.tolist()}")


class EraseFailed(FlashError):
    """The flash could not erase these erase blocks, whose content is undefined; planes: int64 array.

    The superblock's other good blocks are erased.
    """

    def __init__(self, superblock: int, planes):
        self.superblock, self.planes = superblock, planes
        super().__init__(f"erase failed in superblock {superblock} on planes {planes.tolist()}")


class CorruptPage(FlashError):
    """A page whose payload does not have the checksum it was programmed with.

    lba is None for a page of the translation layer itself.
    """

    def __init__(self, lba: int | None, physical_page: int, expected_crc32c: int, found_crc32c: int):
        self.lba, self.physical_page = lba, physical_page
        self.expected_crc32c, self.found_crc32c = expected_crc32c, found_crc32c
        super().__init__(
            f"LBA {lba} at physical page {physical_page} is corrupt: "
            f"crc32c expected {expected_crc32c:#010x}, found {found_crc32c:#010x}"
        )


class OutOfFlash(FlashError):
    """No superblock can be freed for new data; counts in superblocks."""

    def __init__(self, num_free: int, waiting_for_readers: int):
        self.num_free, self.waiting_for_readers = num_free, waiting_for_readers
        super().__init__(f"out of flash: {num_free} superblocks free, {waiting_for_readers} held by readers")


class LbaOutOfRange(FlashError):
    """A logical block the drive does not have."""

    def __init__(self, lba: int, num_lbas: int):
        self.lba, self.num_lbas = lba, num_lbas
        super().__init__(f"LBA {lba} is outside 0..{num_lbas - 1}")
