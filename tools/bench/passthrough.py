"""The rival of the mount: a folder of the disk through pyfuse3 and nothing else.

Every request becomes one system call on the folder; attributes and names may be cached by the kernel as long as
the mount's, the write-back cache is on as the mount's is. As lean as pyfuse3 lets a file system be, so what
kvfs's mount loses against it is kvfs's own.

    python -m kvfs_bench.passthrough FOLDER MOUNTPOINT
"""

import functools
import os
import sys

import pyfuse3
import trio

TIMEOUT_S = 60
COPIED = (
    "st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_atime_ns", "st_mtime_ns",
    "st_ctime_ns", "st_blksize", "st_blocks",
)  # fmt: skip
SPACE = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail")


def _attributes(status: os.stat_result) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    for name in COPIED:
        setattr(entry, name, getattr(status, name))
    entry.entry_timeout = entry.attr_timeout = TIMEOUT_S
    return entry


def _errno(handler):
    """What the folder refuses, the mount refuses."""

    @functools.wraps(handler)
    async def answer(*arguments):
        try:
            return await handler(*arguments)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    return answer


class Passthrough(pyfuse3.Operations):
    """What the benchmark's workloads need: files and folders, no links. Inodes are the folder's own."""

    enable_writeback_cache = True

    def __init__(self, folder: str):
        super().__init__()
        self._paths: dict[int, bytes] = {pyfuse3.ROOT_INODE: os.fsencode(folder)}

    def _child(self, parent: int, name: bytes) -> bytes:
        return self._paths[parent] + b"/" + name

    def _found(self, path: bytes) -> pyfuse3.EntryAttributes:
        status = os.lstat(path)
        self._paths[status.st_ino] = path
        return _attributes(status)

    @_errno
    async def lookup(self, parent_inode, name, ctx):
        return self._found(self._child(parent_inode, name))

    @_errno
    async def getattr(self, inode, ctx=None):
        return _attributes(os.lstat(self._paths[inode]))

    @_errno
    async def setattr(self, inode, attr, fields, fh, ctx):
        path = self._paths[inode]
        if fields.update_size:
            os.truncate(path, attr.st_size)
        if fields.update_mtime or fields.update_atime:
            os.utime(path, ns=(attr.st_atime_ns, attr.st_mtime_ns))
        return _attributes(os.lstat(path))

    @_errno
    async def mkdir(self, parent_inode, name, mode, ctx):
        path = self._child(parent_inode, name)
        os.mkdir(path, mode)
        return self._found(path)

    @_errno
    async def unlink(self, parent_inode, name, ctx):
        os.unlink(self._child(parent_inode, name))

    @_errno
    async def rmdir(self, parent_inode, name, ctx):
        os.rmdir(self._child(parent_inode, name))

    @_errno
    async def open(self, inode, flags, ctx):
        # the write-back cache reads what it overwrites in part
        access = os.O_RDWR if flags & os.O_ACCMODE == os.O_WRONLY else flags & os.O_ACCMODE
        return pyfuse3.FileInfo(fh=os.open(self._paths[inode], access), keep_cache=True)

    @_errno
    async def create(self, parent_inode, name, mode, flags, ctx):
        path = self._child(parent_inode, name)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags & (os.O_EXCL | os.O_TRUNC), mode)
        return pyfuse3.FileInfo(fh=descriptor), self._found(path)

    @_errno
    async def read(self, fh, off, size):
        return os.pread(fh, size, off)

    @_errno
    async def write(self, fh, off, buf):
        return os.pwrite(fh, buf, off)

    @_errno
    async def fsync(self, fh, datasync):
        os.fsync(fh)

    @_errno
    async def flush(self, fh):
        pass

    @_errno
    async def release(self, fh):
        os.close(fh)

    @_errno
    async def opendir(self, inode, ctx):
        return inode

    @_errno
    async def readdir(self, fh, start_id, token):
        for number, name in enumerate(sorted(os.listdir(self._paths[fh]))[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._found(self._child(fh, name)), number):
                break

    @_errno
    async def statfs(self, ctx):
        status, reply = os.statvfs(self._paths[pyfuse3.ROOT_INODE]), pyfuse3.StatvfsData()
        for name in SPACE:
            setattr(reply, name, getattr(status, name))
        reply.f_namemax = status.f_namemax
        return reply


def main() -> None:
    folder, mountpoint = sys.argv[1:]
    options = {*pyfuse3.default_options, "fsname=passthrough"}
    pyfuse3.init(Passthrough(folder), mountpoint, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
