"""What the parts of the translation layer share: the flash, the map and the counters, under one lock.

Media operations take milliseconds and run with the lock released (`unlocked`), so readers wait for none of
them; whoever releases it must look again at what it relied on.
"""

import threading
from dataclasses import asdict, dataclass

from ftl.checksums import ChecksumTable
from ftl.layout import OOB_MAGIC, PageKind
from ftl.mapping import Mapping
from ftl.media import FlashMedia
from ftl.open_superblock import OpenSuperblock
from ftl.parity import ParityPages
from ftl.provisioning import num_lbas
from ftl.read_guard import ReadGuards
from ftl.superblocks import Superblocks


@dataclass
class FtlCounters:
    """Since the drive was opened, in pages unless said otherwise."""

    host_pages_written: int = 0
    host_pages_read: int = 0
    gc_pages_written: int = 0
    wear_leveling_pages_written: int = 0  # of the gc pages
    metadata_pages_written: int = 0
    parity_pages_written: int = 0
    padding_pages: int = 0  # left unwritten to complete a parity row at a flush
    superblocks_erased: int = 0  # superblocks
    corrupt_pages: int = 0
    repaired_pages: int = 0
    program_failures: int = 0  # erase blocks that failed
    erase_failures: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Unlocked:
    """A context in which a lock is released."""

    def __init__(self, lock: threading.Lock):
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.release()

    def __exit__(self, *exception) -> None:
        self._lock.acquire()


class FlashState:
    """See the module. `changed` is notified whenever somebody may go on who waits."""

    def __init__(self, media: FlashMedia):
        self.media = media
        self.geometry = media.geometry
        self.page_size = media.geometry.page_size
        self.pages_per_superblock = media.geometry.pages_per_superblock
        self.num_lbas = num_lbas(media.geometry)
        self.lock = threading.Lock()
        self.guards = ReadGuards(self.lock)
        self.changed = self.guards.changed
        self.pressure = threading.Condition(self.lock)  # free superblocks are fewer, or what they hold is
        self.mapping = Mapping(self.num_lbas, media.geometry.num_superblocks, self.pages_per_superblock)
        self.superblocks = Superblocks(media.geometry, media.bad_blocks(), media.erase_counts())
        self.checksums = ChecksumTable(media)
        self.counters = FtlCounters()
        self.next_sequence_number = 1
        self.next_program_number = 1
        self.durable_program_number = 0
        self.session = 1
        self.earlier_sessions: dict[int, int] = {}  # the last program number that was durable in each
        self.has_changed = False
        self.closed = False
        # Superblocks with a row that has no parity on flash: it is being written, or could not be completed.
        self.begun: dict[int, OpenSuperblock] = {}
        self._unlocked = Unlocked(self.lock)

    def unlocked(self) -> "Unlocked":
        """Let others in meanwhile. The caller holds the lock, once, before and after."""
        return self._unlocked

    def unwritten_parity(self, superblock: int) -> ParityPages | None:
        """Parity of a superblock that is in memory only, in the form it has on flash. The lock is held."""
        found = self.begun.get(superblock)
        while found is not None and found.is_busy:  # its members are not all on flash yet
            self.changed.wait()
            found = self.begun.get(superblock)
        parity = found.parity.unwritten() if found is not None else None
        if parity is not None:
            parity.pages = parity.pages + superblock * self.pages_per_superblock
            parity.oob["kind"], parity.oob["magic"] = PageKind.PARITY, OOB_MAGIC
            parity.oob["program_number"] = self.next_program_number
        return parity

    def first_begun_number(self) -> int:
        """The lowest program number of a row without parity on flash; the next one if there is none."""
        rows = [found.parity.first_number for found in self.begun.values() if found.parity.is_begun]
        return min(rows, default=self.next_program_number)

    def new_sequence_numbers(self, count: int) -> int:
        """The first of `count` versions that no other data have."""
        first = self.next_sequence_number
        self.next_sequence_number += count
        return first
