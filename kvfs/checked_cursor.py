"""SQLite's cursor, telling of damage as kvfs does, wherever the catalogue is read."""

from functools import wraps

import apsw

from kvfs.errors import CatalogueDamaged
from spdk_glue.status import NvmeError


def _telling(method):
    @wraps(method)
    def call(*arguments, **options):
        try:
            return method(*arguments, **options)
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise CatalogueDamaged(str(error)) from error
        except apsw.IOError as error:
            if isinstance(error.__cause__, NvmeError):  # what SQLite was told is for SQLite
                raise error.__cause__ from None
            raise

    return call


class CheckedCursor(apsw.Cursor):
    """Raises CatalogueDamaged, and what the drive raised, where apsw.Cursor has errors of its own for them."""

    execute = _telling(apsw.Cursor.execute)
    executemany = _telling(apsw.Cursor.executemany)
    fetchone = _telling(apsw.Cursor.fetchone)
    fetchall = _telling(apsw.Cursor.fetchall)
    __next__ = _telling(apsw.Cursor.__next__)
    get = property(_telling(apsw.Cursor.get.__get__))
