"""The catalogue's database: SQLite on the drive's blocks, its transactions and its log, and what is durable."""

import itertools
from contextlib import contextmanager, suppress

import apsw

from kvfs.batch import Batch
from kvfs.catalogue_connection import CatalogueConnection
from kvfs.catalogue_schema import OLDEST_VERSION, SCHEMA, SCHEMA_VERSION, SET_VERSION, upgrade
from kvfs.errors import CatalogueDamaged, CatalogueFull, NotADrive
from kvfs.metadata_vfs import DATABASE_NAME, Volume, VolumeVfs
from spdk_glue.status import NvmeError

LONGEST_LOG_BYTES = 4 << 20  # of what opening after a crash has to read
_vfs_numbers = itertools.count()


class CatalogueDatabase:
    """The tables' database, open: transactions, the log, durability. Says nothing of what the tables hold."""

    def __init__(self, volume: Volume, page_size: int, path, create: bool = False):
        self._volume = volume
        self.is_durable = True  # whether every transaction so far survives a power cut
        self._is_log_own = False  # whether the log was begun by this process
        vfs_name = f"kvfs-{next(_vfs_numbers)}"
        self._vfs = VolumeVfs(vfs_name, volume)
        self._db: CatalogueConnection | None = None
        self.batch: Batch | None = None
        try:
            version = self._open(vfs_name, page_size, create)
        except BaseException as error:
            self.abandon()
            if isinstance(error, CatalogueDamaged):
                raise NotADrive(path, f"the catalogue is damaged: {error.why}") from error
            raise
        if not OLDEST_VERSION <= version <= SET_VERSION:
            self.abandon()
            known = f"{OLDEST_VERSION} to {SET_VERSION}"
            raise NotADrive(path, f"catalogue version {version}, but this kvfs reads {known}")
        try:
            if version < SCHEMA_VERSION:
                with self.transaction():
                    upgrade(self._db, version)
            pages = [file.capacity // page_size for file in (volume.database, volume.wal)]
            self.batch = Batch(self._db, page_size, *pages, self._renew_log)  # of small changes to files
        except BaseException:
            self.abandon()
            raise

    def _open(self, vfs_name: str, page_size: int, create: bool) -> int:
        """Connect; the version of the schema."""
        self._db = CatalogueConnection(DATABASE_NAME, vfs=vfs_name)
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA temp_store = MEMORY")
        if create:
            # no rollback journal file exists on a volume; the switch to WAL is the only use of one
            self._db.execute(f"PRAGMA page_size = {min(max(page_size, 4096), 65536)}")
            self._db.execute("PRAGMA journal_mode = MEMORY")
        mode = self._db.execute("PRAGMA journal_mode = WAL").get
        assert mode == "wal", mode
        self._db.execute("PRAGMA synchronous = NORMAL")  # durability is `sync`'s, in one batch
        # a commit that has come through must not fail because the log cannot be emptied: see _renew_log
        self._db.execute("PRAGMA wal_autocheckpoint = 0")
        self._db.execute("PRAGMA cache_size = -16384")
        if create:
            with self.transaction():
                self._db.execute(SCHEMA)
                upgrade(self._db, OLDEST_VERSION)
        return self._db.execute("PRAGMA user_version").get

    @contextmanager
    def transaction(self):
        """All of what is done inside or none of it; those inside others are part of them."""
        if self.is_in_transaction:
            yield
            return
        self._end_batch()
        self._renew_log()
        self._db.execute("BEGIN")
        try:
            yield
            self._db.execute("COMMIT")
            self.is_durable = False
        except BaseException as error:
            if self._db.in_transaction:  # a full database has ended it by itself
                self._db.execute("ROLLBACK")
            if isinstance(error, apsw.FullError):
                raise CatalogueFull(self._volume.database.capacity) from error
            raise

    @property
    def is_in_transaction(self) -> bool:
        """Whether what is done now may be taken back, with all of a transaction under way."""
        return self._db.in_transaction and not (self.batch and self.batch.is_open)

    def _end_batch(self) -> None:
        if self.batch is not None and self.batch.has_changes:
            self.is_durable = False
            self.batch.end()

    @property
    def was_changed(self) -> bool:
        """Whether this process has changed it: who only reads writes nothing in the end."""
        return self._is_log_own

    @property
    def has_changes(self) -> bool:
        """Whether something is not durable, or not even a transaction yet."""
        return not self.is_durable or self.batch.has_changes

    def _renew_log(self) -> None:
        """Begin the log anew, with another salt, before the first transaction and whenever it has grown long.

        A power cut may have left frames of lost transactions in it. They hold once more if, under the same
        salt, the ones before them are written again with the same bytes.
        """
        wal = self._volume.wal
        if self._is_log_own and wal.size <= min(LONGEST_LOG_BYTES, wal.capacity // 4):
            return
        # a drive that is full says so when the transaction is made durable
        with suppress(apsw.IOError, NvmeError):
            busy, _, _ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").get
            self._is_log_own = not busy

    def sync(self) -> None:
        """Make every transaction so far durable."""
        self._end_batch()
        self._volume.sync()
        self.is_durable = True

    def close(self) -> None:
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        self._volume.sync()
        self._vfs.unregister()

    def abandon(self) -> None:
        """Close without touching the drive, which has failed: what was not durable is gone."""
        self._volume.detached = True
        with suppress(apsw.Error, NvmeError):
            if self._db is not None:
                self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
                self._db.close()
        self._vfs.unregister()
