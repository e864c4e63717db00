"""Every verb that takes a drive, given what is none: one line, the right code, nothing done.

The verbs are found in the table, so that a new one is among them.
"""

import errno
import os
import socket

import pytest

import kvfs
from tests.unit.kvfsctl.capabilities import without_override
from tests.unit.kvfsctl.command_line import kvfsctl
from tests.unit.kvfsctl.drive_verbs import DRIVE_VERBS, command_line

OTHERS_FIRST = {("top",), ("trace",), ("import",)}  # complain of something else before they open the drive
MAKES = {("format",)}  # what others complain of is what it wants


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("places")
    (found / "mountpoint").mkdir()
    (found / "text").write_text("no drive\n")
    kvfs.format(found / "cut", "48MiB")
    os.truncate(found / "cut", 5000)
    kvfs.format(found / "forbidden", "48MiB")
    (found / "forbidden").chmod(0)
    kvfs.format(found / "busy", "48MiB")
    with kvfs.open(found / "busy", cache_bytes="8MiB", worker="reference"):
        yield found


def test_there_are_such_verbs():
    """The table is looked through, not a list that somebody has to keep."""
    assert len(DRIVE_VERBS) > 35 and {("ls",), ("mount",), ("serve",), ("nvme", "identify")} <= set(DRIVE_VERBS)


def assert_one_line(done) -> None:
    assert "Traceback" not in done.stderr, done
    assert done.returncode in (1, 2, 3), done
    if done.returncode == 1:
        assert done.stderr.startswith("kvfsctl: ") and done.stderr.count("\n") == 1, done


all_verbs = pytest.mark.parametrize(
    "words", [words for words in DRIVE_VERBS if words not in MAKES], ids=" ".join
)


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "busy"])
@all_verbs
def test_one_line(words, kind, folder):
    assert_one_line(kvfsctl(*command_line(words, DRIVE_VERBS[words], folder / kind, folder)))


@all_verbs
def test_no_permission(words, folder):
    """Who may not open the drive is told so, and not that there is none."""
    before = (folder / "forbidden").stat()
    with without_override():
        done = kvfsctl(*command_line(words, DRIVE_VERBS[words], folder / "forbidden", folder))
    assert_one_line(done)
    if done.returncode == 1 and words not in OTHERS_FIRST:
        assert "Permission denied" in done.stderr, done
    assert (folder / "forbidden").stat() == before


@pytest.mark.parametrize("words", [("mount",), ("serve",), ("config", "show"), ("config", "check")])
def test_a_broken_configuration(words, folder, monkeypatch):
    """Whoever reads it names the file and the field, and does nothing."""
    broken = folder / "broken.toml"
    broken.write_text("[open]\ncache_bytes = 'much'\n")
    monkeypatch.setenv("KVFS_CONFIG", str(broken))
    command = DRIVE_VERBS.get(words)
    done = kvfsctl(*(command_line(words, command, folder / "busy", folder) if command else words))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert "broken.toml" in done.stderr and "open.cache_bytes" in done.stderr


@pytest.mark.parametrize("host", ["x" * 300, "a..b", "\0"])
def test_a_host_that_is_no_name(host, tmp_path):
    """serve: what cannot even be looked up."""
    kvfs.format(tmp_path / "drive", "48MiB")
    done = kvfsctl("serve", tmp_path / "drive", "--listen", f"{host}:0", "--worker", "reference")
    assert done.returncode == 1 and done.stderr.startswith("kvfsctl: cannot listen"), done
    assert done.stderr.count("\n") == 1
    done = kvfsctl("nvme", "discover", f"{host}:1")
    assert done.returncode == 1 and done.stderr.startswith("kvfsctl: ") and done.stderr.count("\n") == 1, done


@pytest.mark.parametrize("verb", ["mount", "serve"])
@pytest.mark.parametrize("obstacle", ["taken", "privileged", "no number"])
def test_metrics_that_cannot_listen(verb, obstacle, tmp_path, monkeypatch):
    """Said before anybody is served; and the drive is closed again."""
    drive = tmp_path / "drive"
    kvfs.format(drive, "48MiB")
    (tmp_path / "mountpoint").mkdir()
    wanted = ["mount", "--foreground", drive, tmp_path / "mountpoint"]
    if verb == "serve":
        wanted = ["serve", drive, "--listen", "127.0.0.1:0", "--worker", "reference"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = {"taken": taken.getsockname()[1], "privileged": 80, "no number": "http"}[obstacle]
        if obstacle == "privileged":
            monkeypatch.setattr(socket.socket, "bind", _bind_without_rights)  # root may, elsewhere anybody
        done = kvfsctl(*wanted, "--metrics", port)
    assert done.returncode in (1, 2) and str(port) in done.stderr, done
    assert "Traceback" not in done.stderr and "serving" not in done.stderr, done
    assert done.returncode == 2 or done.stderr.count("\n") == 1, done
    monkeypatch.undo()
    assert not os.path.ismount(tmp_path / "mountpoint")
    kvfs.open(drive, cache_bytes="8MiB", worker="reference").close()


def _bind_without_rights(self, address, bind=socket.socket.bind):
    if self.family == socket.AF_INET and 0 < address[1] < 1024:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    bind(self, address)
