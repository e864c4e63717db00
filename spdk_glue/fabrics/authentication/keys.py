"""Shared secrets of DH-HMAC-CHAP: their standard form, and the files that hold them.

A key in its standard form is `DHHC-1:hh:BASE64:`. BASE64 holds 32, 48 or 64 random bytes and their CRC32
(little endian); hh says with which hash the bytes are bound to an NQN before use (00: not at all). Whoever
has such a text can pose as its owner, so a key lives in a file that its owner alone can read, and never in an
argument, an environment variable, a log line, an exception or the repr of an object.

Source: NVM Express Base Specification 2.0, section 8.13.5.8 and 8.13.5.7 (representation, transformation).
"""

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
import zlib
from enum import IntEnum

from spdk_glue.fabrics.trusted_file import READABLE_BY_OWNER_ALONE, read_trusted_file
from spdk_glue.status import NvmeError

KEY_BYTES = (32, 48, 64)
_STANDARD_FORM = re.compile(r"DHHC-1:([0-9a-fA-F]{2}):([A-Za-z0-9+/]+={0,2}):")
_TRANSFORM_CONTEXT = b"NVMe-over-Fabrics"
_FILE_BYTES_MAX = 1024  # the longest key takes 104


class Hash(IntEnum):
    """Hash functions by their identifiers in messages and keys."""

    SHA256 = 1
    SHA384 = 2
    SHA512 = 3

    @property
    def algorithm(self) -> str:
        return self.name.lower()

    @property
    def num_bytes(self) -> int:
        return hashlib.new(self.algorithm).digest_size


class BadKey(NvmeError):
    """A text that is no key; says why, never what it was."""


class KeyFileError(NvmeError):
    """A key file that cannot be used: path, and why."""

    def __init__(self, path: str | os.PathLike, why: str):
        self.path = os.fspath(path)
        self.why = why
        super().__init__(self.path, why)

    def __str__(self) -> str:
        return f"key file {self.path}: {self.why}"


class Key:
    """A secret of 32, 48 or 64 bytes, and the hash that binds it to an NQN (None: used as it is)."""

    __slots__ = ("_secret", "transform")

    def __init__(self, secret: bytes, transform: Hash | None = None):
        if len(secret) not in KEY_BYTES:
            raise BadKey(f"a key has 32, 48 or 64 bytes, this one has {len(secret)}")
        self._secret = bytes(secret)
        self.transform = transform

    @classmethod
    def generate(cls, transform: Hash | None = None, num_bytes: int | None = None) -> "Key":
        """A new random key; by default as long as its hash, or 32 bytes. Raises BadKey on another length."""
        num_bytes = num_bytes or (transform.num_bytes if transform else KEY_BYTES[0])
        if num_bytes not in KEY_BYTES:
            raise BadKey(f"a key has 32, 48 or 64 bytes, not {num_bytes}")
        return cls(secrets.token_bytes(num_bytes), transform)

    @classmethod
    def parse(cls, text: str) -> "Key":
        """From the standard form. Raises BadKey."""
        match = _STANDARD_FORM.fullmatch(text)
        if match is None:
            raise BadKey("not a key in the form DHHC-1:hh:BASE64:")
        identifier = int(match[1], 16)
        if identifier > max(Hash):
            raise BadKey(f"hash {identifier:02x} of the key is unknown, it may be 00 to 03")
        try:
            decoded = base64.b64decode(match[2], validate=True)
        except binascii.Error:
            raise BadKey("the key's base64 is damaged") from None
        secret, checksum = decoded[:-4], decoded[-4:]
        if len(secret) not in KEY_BYTES:
            raise BadKey(f"a key has 32, 48 or 64 bytes, this one has {max(len(decoded) - 4, 0)}")
        if zlib.crc32(secret) != int.from_bytes(checksum, "little"):
            raise BadKey("the key's checksum is wrong: a character of it was lost or changed")
        return cls(secret, Hash(identifier) if identifier else None)

    def standard_form(self) -> str:
        """The text for a key file: secret, not for people to see."""
        checksum = zlib.crc32(self._secret).to_bytes(4, "little")
        return f"DHHC-1:{self.transform or 0:02x}:{base64.b64encode(self._secret + checksum).decode()}:"

    def bound_to(self, nqn: str) -> bytes:
        """The bytes that authenticate the owner of this NQN: a key stolen from one host is of no use under
        another's name, if it has a transform."""
        if self.transform is None:
            return self._secret
        return hmac.digest(self._secret, nqn.encode() + _TRANSFORM_CONTEXT, self.transform.algorithm)

    @property
    def num_bytes(self) -> int:
        return len(self._secret)

    def has_secret_of(self, other: "Key") -> bool:
        return hmac.compare_digest(self._secret, other._secret)

    def __repr__(self) -> str:
        bound = f"bound by {self.transform.algorithm}" if self.transform else "not bound"
        return f"<DHHC-1 key of {len(self._secret)} bytes, {bound}>"

    def __reduce__(self):
        raise TypeError("a key is not pickled: its secret would go where the pickle goes")


def read_key_file(path: str | os.PathLike) -> Key:
    """The key in a file that this user, or root, has for itself alone. Raises KeyFileError."""
    content = read_trusted_file(path, READABLE_BY_OWNER_ALONE, _FILE_BYTES_MAX, KeyFileError)
    try:
        return Key.parse(content.decode("ascii").removesuffix("\n").removesuffix("\r"))
    except UnicodeDecodeError:
        raise KeyFileError(path, "not a key in the form DHHC-1:hh:BASE64:") from None
    except BadKey as error:
        raise KeyFileError(path, str(error)) from None


def write_key_file(path: str | os.PathLike, key: Key) -> None:
    """Put a key into a new file with mode 0600. Raises KeyFileError, also where there is a file already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KeyFileError(path, "there is a file already; a key in use is never overwritten") from None
    except OSError as error:
        raise KeyFileError(path, f"cannot be made: {error.strerror}") from None
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask took away
            file.write(key.standard_form() + "\n")
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        os.unlink(path)
        raise KeyFileError(path, f"cannot be written: {error.strerror}") from None
