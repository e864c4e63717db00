"""An object cache in memory: what the connector's halves need of one, without a drive."""

import threading

from kvfs.objects.counters import Miss


class MemoryCache:
    admission = "all"

    def __init__(self):
        self.objects: dict[bytes, bytes] = {}
        self.has_room = True
        self.gate = threading.Event()  # a put waits for it: a slow drive
        self.gate.set()
        self.num_puts = 0
        self.of_others: set[bytes] = set()  # keys under another identity
        self.requests: list[tuple] = []

    def put(self, keys, objects):
        self.gate.wait(10)
        self.num_puts += 1
        if not self.has_room:
            return [key in self.objects for key in keys]
        for key, data in zip(keys, objects, strict=True):
            self.objects.setdefault(key, bytes(data))
        return [True] * len(keys)

    def get(self, keys, buffers):
        found = []
        for key, buffer in zip(keys, buffers, strict=True):
            data = self.objects.get(key)
            found.append(data is not None and len(data) == buffer.nbytes)
            if found[-1]:
                memoryview(buffer).cast("B")[:] = data
        return found

    def contains(self, keys):
        return [key in self.objects for key in keys]

    def look_up(self, keys):
        misses = [Miss.IDENTITY if key in self.of_others else Miss.ABSENT for key in keys]
        return [None if key in self.objects else miss for key, miss in zip(keys, misses, strict=True)]

    def count_request(self, *counted):
        self.requests.append(counted)
