"""SQLite's connection, telling of damage as kvfs does, wherever the catalogue is read."""

from typing import NoReturn

import apsw

from kvfs.errors import CatalogueDamaged
from spdk_glue.status import NvmeError


class Rows(list):
    """All rows of a statement, as tuples: none is left to be read when others change them."""

    def fetchone(self) -> tuple | None:
        """The first row."""
        return self[0] if self else None

    @property
    def get(self):
        """What a statement of one row says: a value, or a tuple of several; None without a row."""
        row = self.fetchone()
        return row[0] if row is not None and len(row) == 1 else row


class CatalogueConnection(apsw.Connection):
    """Raises CatalogueDamaged, and what the drive raised, where apsw has errors of its own for them."""

    def execute(self, statements: str, bindings=None) -> Rows:
        try:
            return Rows(super().execute(statements, bindings))
        except apsw.Error as error:
            _tell(error)

    def executemany(self, statements: str, bindings) -> None:
        try:
            super().executemany(statements, bindings)
        except apsw.Error as error:
            _tell(error)


def _tell(error: apsw.Error) -> NoReturn:
    if isinstance(error, (apsw.CorruptError, apsw.NotADBError)):
        raise CatalogueDamaged(str(error)) from error
    if isinstance(error, apsw.IOError) and isinstance(error.__cause__, NvmeError):
        raise error.__cause__ from None  # what SQLite was told is for SQLite
    raise error
