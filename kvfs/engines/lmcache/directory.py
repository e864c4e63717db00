"""Texts that keys abbreviate, kept as objects beside the chunks: identities, and tenants' salts.

With them chunks of earlier processes can be listed. An entry lost to eviction hides its chunks from listings
until they are stored or looked up again, and nothing else.
"""

import json

from kvfs.engines.lmcache.object_keys import salt_text, text_digest

DIRECTORY = {"of": "kvfs directory", "format": 1}


class Directory:
    def __init__(self, store, cache_name: str):
        self._cache = store.object_cache(cache_name, DIRECTORY)
        self._known: dict[bytes, str] = {}
        self._read()

    def _read(self) -> None:
        """What others may have added, too."""
        keys = [key for key in self._cache.keys() if key not in self._known]  # noqa: SIM118
        sizes = self._cache.sizes(keys)
        found = [(key, bytearray(size)) for key, size in zip(keys, sizes, strict=True) if size is not None]
        is_read = self._cache.get([key for key, _ in found], [text for _, text in found])
        good = [(key, text.decode()) for (key, text), read in zip(found, is_read, strict=True) if read]
        self._cache.pin([key for key, _ in good])
        self._known.update(good)

    def _remember(self, text: str) -> None:
        """From here on, also for later processes."""
        digest = text_digest(text)
        if digest not in self._known:
            if all(self._cache.put([digest], [text.encode()])):  # else for this process alone
                self._cache.pin([digest])
            self._known[digest] = text

    def remember_salt(self, salt: str) -> None:
        self._remember(salt_text(salt))

    def remember_identity(self, identity: dict) -> None:
        self._remember(json.dumps({"identity": identity}, sort_keys=True))

    def salt(self, digest: bytes) -> str | None:
        if digest not in self._known:
            self._read()
        text = self._known.get(digest)
        return None if text is None else json.loads(text)["salt"]

    def identities(self) -> list[dict]:
        """Under which chunks were stored, by any process."""
        self._read()
        entries = [json.loads(self._known[digest]) for digest in sorted(self._known)]
        return [entry["identity"] for entry in entries if "identity" in entry]
