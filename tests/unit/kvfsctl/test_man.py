"""Manual pages and completion: made from --help, so that they cannot say anything else."""

import shutil
import subprocess

import pytest
import typer

from kvfsctl.main import app
from kvfsctl.man import pages
from kvfsctl.output import EXIT_CODES
from tests.unit.kvfsctl.command_line import kvfsctl


def test_a_page_for_every_verb():
    """Each verb has a page with its options, and the exit codes of the one table."""
    commands = typer.main.get_command(app).commands
    found = pages()
    assert set(found) == {"kvfsctl.1", *(f"kvfsctl-{verb}.1" for verb in commands)}
    assert "\\-\\-superblocks" in found["kvfsctl-gc.1"]
    assert ".SS drain" in found["kvfsctl-drive.1"]
    for text in found.values():
        assert all(f".B {code}\n" in text for code in EXIT_CODES)
    assert "KVFS_OPEN_CACHE_BYTES" in found["kvfsctl.1"]


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not there")
def test_groff_reads_them():
    """No line of help is taken for a request: groff warns of nothing."""
    text = "".join(pages().values())
    command = ["groff", "-man", "-z", "-Tutf8", "-Kutf8", "-wmac", "-wescape", "-wsyntax", "-wmissing"]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_writing_them(tmp_path):
    assert kvfsctl("man", tmp_path / "man1").returncode == 0
    assert (tmp_path / "man1" / "kvfsctl-status.1").read_text().startswith(".TH")
    (tmp_path / "file").touch()
    refused = kvfsctl("man", tmp_path / "file")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    done = kvfsctl("completion", shell)
    assert done.returncode == 0 and "_KVFSCTL_COMPLETE" in done.stdout
