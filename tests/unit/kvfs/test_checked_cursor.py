"""What SQLite says of damage and of the drive, however a row is asked for."""

import apsw
import pytest

from kvfs.checked_cursor import CheckedCursor
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
    connection = apsw.Connection(str(path))
    connection.cursor_factory = CheckedCursor
    yield connection
    connection.close()


@pytest.mark.parametrize(
    "ask",
    [
        lambda rows: list(rows("SELECT * FROM row")),
        lambda rows: rows("SELECT * FROM row").fetchall(),
        lambda rows: rows("SELECT * FROM row WHERE id = ?", (ROWS // 2,)).fetchone(),
        lambda rows: rows("SELECT max(id) FROM row").get,
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
    connection = apsw.Connection("")
    connection.cursor_factory = CheckedCursor
    with pytest.raises(apsw.SQLError):
        connection.execute("SELECT nothing FROM nowhere")
    assert connection.execute("SELECT 1 UNION SELECT 2").get == [1, 2]
