"""Keys with which hosts and drives prove over a network who they are."""

import os

from kvfs.errors import InvalidArgument
from spdk_glue.fabrics.authentication import BadKey, Hash, Key, write_key_file

NO_TRANSFORM = 0


def make_key_file(path: str | os.PathLike, hmac: int, key_bytes: int | None) -> Key:
    """Put a new random key into a new file that its owner alone can read; the key.

    hmac: 0, or the hash (1 to 3: SHA-256, 384, 512) that binds the key to the name it is used under;
    key_bytes: 32, 48 or 64; None: what goes with the hash. Raises InvalidArgument, KeyFileError.
    """
    if hmac != NO_TRANSFORM and hmac not in list(Hash):
        raise InvalidArgument(f"hmac {hmac}: 0 for a key used as it is, 1 SHA-256, 2 SHA-384, 3 SHA-512")
    try:
        key = Key.generate(Hash(hmac) if hmac else None, key_bytes)
    except BadKey as error:
        raise InvalidArgument(str(error)) from None
    write_key_file(path, key)
    return key
