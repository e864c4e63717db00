"""What SQLite says of damage and of the drive, however a row is asked for."""

import apsw
import pytest

from kvfs.catalogue_connection import CatalogueConnection
from kvfs.errors import CatalogueDamaged

ROWS = 2000


@pytest.fixture
def damaged(tmp_path):
    """A database whose first page is whole and whose others are not."""
    path = tmp_path / "database"
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE row (id INTEGER PRIMARY KEY, text)")
    connection.executemany("INSERT INTO row VALUES (?, ?)", [(number, "x" * 50) for number in range(ROWS)])
    connection.close()
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = b"\xff" * (len(content) - 4096 * 2)
    path.write_bytes(content)
    connection = CatalogueConnection(str(path))
    yield connection
    connection.close()


@pytest.mark.parametrize(
    "ask",
    [
        lambda rows: rows("SELECT * FROM row"),
        lambda rows: rows("SELECT * FROM row WHERE id = ?", (ROWS // 2,)),
        lambda rows: rows("SELECT max(id) FROM row"),
    ],
)
def test_damage_is_told(damaged, ask):
    """An error of SQLite's, which no caller expects, or rows left out."""
    with pytest.raises(CatalogueDamaged, match="malformed: look with kvfsctl check"):
        ask(damaged.execute)


def test_damage_is_told_of_changes(damaged):
    with pytest.raises(CatalogueDamaged):
        damaged.executemany("DELETE FROM row WHERE id = ?", [(number,) for number in range(ROWS)])


def test_other_errors_stay():
    """A mistake of ours must not pass for damage."""
    connection = CatalogueConnection("")
    with pytest.raises(apsw.SQLError):
        connection.execute("SELECT nothing FROM nowhere")


def test_rows():
    """One value, one row, or none, however they are asked for."""
    rows = CatalogueConnection("").execute
    assert rows("SELECT 1 UNION SELECT 2") == [(1,), (2,)]
    assert rows("SELECT 7").get == 7
    assert rows("SELECT 7, 8").get == rows("SELECT 7, 8").fetchone() == (7, 8)
    assert rows("SELECT 1 WHERE 0").get is None
