"""The status page in a real browser: that its script runs, and shows what the store says."""

import re
import shutil
import subprocess

import pytest

import kvfs.telemetry

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
BROWSER_SECONDS = 60


def seen(url, folder, *options):
    """(the document after its scripts ran, what the console said)"""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions"]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=5000", "--enable-logging=stderr", "--v=0"]
    result = subprocess.run(
        [*command, *options, "--dump-dom", url], capture_output=True, text=True, timeout=BROWSER_SECONDS
    )
    said = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return result.stdout, said


def test_in_a_browser(store, sequence, tmp_path):
    """Everything the page promises is there, and neither script nor policy complains. A name stays a name."""
    store.rename_sequence("a", "<img src=x onerror=console.log(1)>")
    with kvfs.telemetry.serve(store, 0) as server:
        page, complaints = seen(server.url, tmp_path)
    assert complaints == []
    text = re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    assert store.path in text and "as of" in text
    num_superblocks = len(store.drive_map()[0]["state"])
    assert text.count("superblock ") >= num_superblocks and "open, sequences" in text
    assert "least 0, mean" in text and "garbage collection" in text
    assert ">&lt;img src=x" in page and "700" in text
    assert "attend" in text and "program" in text
