"""What one drive is asked for by those who look after it; alike whether somebody has it open or not.

Every answer is plain JSON, so that the process that owns a mounted drive answers in the same words
(remote_care.py).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Protocol

import apsw

from kvfs.block_owners import Owner
from kvfs.check import Report, check_parity
from kvfs.errors import CatalogueDamaged, InvalidArgument
from kvfs.store import Store
from spdk_glue.flash_admin import FlashAdmin
from spdk_glue.namespace import Namespace


class Subject(Protocol):
    """A drive that is open, such as an Inspection."""

    namespace: Namespace
    flash: FlashAdmin

    def owner(self, lba: int) -> Owner: ...


class DriveCare:
    """turn: held while the drive is asked something. Raises NvmeStatusError where it refuses or fails."""

    def __init__(self, subject: Subject, turn: AbstractContextManager | None = None):
        self._subject = subject
        self._turn = nullcontext() if turn is None else turn

    def health(self) -> dict:
        """Counters since the drive was opened, superblocks by state, wear; of SMART life used and spare."""
        with self._turn:
            health, smart = self._subject.flash.health(), self._subject.flash.smart()
        return {
            **{name: health[name].tolist() for name in health.dtype.names},
            "percentage_used": int(smart["percentage_used"]),
            "available_spare_percent": int(smart["available_spare"]),
        }

    def superblocks(self) -> list[dict]:
        with self._turn:
            records = self._subject.flash.superblocks()
        names = ("erase_count", "valid_pages", "capacity_pages", "bad_erase_blocks")
        return [
            {"state": record["state"].decode(), **{name: int(record[name]) for name in names}}
            for record in records
        ]

    def collect(self, max_superblocks: int = 0) -> int:
        """Garbage, 0 for as long as that gains something; how many superblocks were."""
        _check_number("max_superblocks", max_superblocks)
        with self._turn:
            count = self._subject.flash.collect(max_superblocks)
            self._subject.namespace.flush()
        return count

    def renew(self) -> int:
        """Write anew what only parity could give back; how many superblocks held such pages."""
        with self._turn:
            return self._subject.flash.renew()

    def drop_cache(self) -> int:
        """Let the drive's read cache forget what nobody reads just now; how many lines of it held something."""
        with self._turn:
            return self._subject.flash.drop_cache()

    def allocated(self) -> list[list[int]]:
        """[first LBA, number of LBAs] of what is on flash."""
        with self._turn:
            return [[first, count] for first, count in self._subject.namespace.allocated()]

    def lost(self, first_lba: int, num_lbas: int) -> list[dict]:
        """Have the drive read these blocks and repair what parity can. Of each that is lost, whose it was (see
        block_owners.Owner) and its `lba`."""
        _check_number("first_lba", first_lba)
        _check_number("num_lbas", num_lbas)
        with self._turn:
            lost = self._subject.namespace.lost(first_lba, num_lbas)
            return [{"lba": lba, **self._subject.owner(lba).as_dict()} for lba in lost]

    def owner(self, lba: int) -> dict:
        """Whose a block is. Raises InvalidArgument where the drive has no such block."""
        _check_number("lba", lba)
        num_lbas = self._subject.namespace.num_lbas
        if lba >= num_lbas:
            raise InvalidArgument(f"no LBA {lba}: the drive has {num_lbas}, from 0 on")
        with self._turn:
            return self._subject.owner(lba).as_dict()


def _check_number(name: str, value) -> None:
    if type(value) is not int or value < 0:
        raise InvalidArgument(f"{name} is a whole number from 0 on, not {value!r}")


class LiveDriveCare(DriveCare):
    """Of a drive that a store has open: it stays in use, and waits for one question at a time."""

    def __init__(self, store: Store):
        super().__init__(_Live(store), _Turn(store))
        self._store = store

    def check_rows(self) -> list[dict]:
        """What contradicts itself (check.Problem): all but the pages' payloads, which `lost` reads."""
        report = Report()
        with self._turn:
            self._store.flush()
            try:
                self._store._check_rows(report)
            except (apsw.Error, CatalogueDamaged) as error:  # too damaged to be looked into further
                report.add("catalogue", f"catalogue: {error}")
            check_parity(self._subject.flash, report)
        return [asdict(problem) for problem in report.problems]


class _Live:
    """A store's drive as a Subject."""

    def __init__(self, store: Store):
        self._store = store
        self.namespace = store._namespace
        self.flash = FlashAdmin(store._namespace)

    def owner(self, lba: int) -> Owner:
        return self._store._owners().owner(lba)


class _Turn(AbstractContextManager):
    """The lock of a store, which is open. Raises StoreClosed."""

    def __init__(self, store: Store):
        self._store = store

    def __enter__(self) -> None:
        self._store._lock.acquire()
        try:
            self._store._check_open()
        except BaseException:
            self._store._lock.release()
            raise

    def __exit__(self, *exception: object) -> None:
        self._store._lock.release()


def cares_of(store) -> dict[str, LiveDriveCare]:
    """By location, each drive of a store or of a set; of a set those that are not lost."""
    drives = getattr(store, "drives", None)
    if drives is None:
        return {store.path: LiveDriveCare(store)}
    return {member.location: LiveDriveCare(member.store) for member in store._live}
