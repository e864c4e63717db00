"""`kvfsctl demo` as a user calls it."""

import json

import pytest
import typer
from typer.testing import CliRunner

from kvfsctl import demo as demo_module
from kvfsctl import demo_document, demo_processes
from kvfsctl.demo import demo


@pytest.fixture
def kvfsctl_demo():
    """Run the command with arguments; returns click's result."""
    app = typer.Typer()
    app.command()(demo)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("dtype", "context"),
    [("float16", 512), ("int8", 1100)],  # a group of int8 has 992 tokens
)
def test_short_run(kvfsctl_demo, tmp_path, dtype, context):
    """Without it: the project's main job is broken and nothing notices."""
    pytest.importorskip("torch", reason="the demo needs torch: pip install torch transformers")
    pytest.importorskip("transformers", reason="the demo needs transformers: pip install torch transformers")
    drive = tmp_path / "drive.kvfs"
    arguments = ("--context", context, "--tokens", 8, "--more-tokens", 4, "--dtype", dtype)
    result = kvfsctl_demo(*arguments, "--drive", drive, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["schema"] == 1 and report["bench"] == "demo"
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert figures["demo.tokens_identical"]["value"] == 8 and figures["demo.tokens_identical"]["met"]
    assert figures["demo.tokens_identical_after_reopening"]["value"] == 4
    assert figures["demo.link_bytes_ratio"]["goal"] == 0.5 * context / 5
    assert figures["demo.link_bytes_per_token"]["value"] < figures["demo.link_bytes_per_token"]["rival_value"]
    assert figures["demo.tokens_per_second"]["value"] > 0
    assert drive.exists(), "--drive keeps the drive"


def test_different_tokens_fail(kvfsctl_demo, monkeypatch):
    """Without it: wrong tokens go by as a success in scripts and CI."""

    class Wrong:
        all_identical = False
        comparison = "SDPA"

    monkeypatch.setattr(demo_module, "_run", lambda *args, **kwargs: (Wrong(), {}))
    monkeypatch.setattr(demo_module, "_print", lambda *args: None)
    result = kvfsctl_demo()
    assert result.exit_code == 1 and "tokens differ" in result.stderr


def test_missing_model_is_one_line(kvfsctl_demo, tmp_path):
    """Without it: a mistyped --model ends in a traceback of another library."""
    result = kvfsctl_demo("--model", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [f"kvfsctl: demo: no model in {tmp_path}: config.json is missing"]


def test_missing_libraries_say_how_to_install(kvfsctl_demo, monkeypatch):
    """Without it: someone without torch does not learn what to do."""
    monkeypatch.setattr(demo_document.importlib.util, "find_spec", lambda name: None)
    result = kvfsctl_demo()
    assert result.exit_code == 1
    assert "torch and transformers not installed: pip install" in result.stderr


def test_an_existing_file_is_not_formatted(kvfsctl_demo, tmp_path):
    """Without it: the demo destroys a drive, or any other file, that --drive names."""
    path = tmp_path / "precious"
    path.write_text("data")
    result = kvfsctl_demo("--drive", path)
    assert result.exit_code == 1 and "exists already" in result.stderr
    assert path.read_text() == "data"


def test_a_phase_that_fails_gives_its_reason(kvfsctl_demo):
    """Without it: a failure in a child process is a silent exit code."""
    pytest.importorskip("transformers", reason="the demo needs transformers: pip install torch transformers")
    result = kvfsctl_demo("--context", 10**6)
    assert result.exit_code == 1
    assert "--context 1000000: the document has" in result.stderr


def test_phases_are_lines_off_a_terminal(monkeypatch, capsys):
    """Without it: minutes pass in a log or a pipe, and nobody can tell a slow phase from a stuck one."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    printed_before = []

    def run_phase(task):
        printed_before.append(capsys.readouterr().err)
        return {"tokens": [1, 2]}

    monkeypatch.setattr(demo_processes, "run_phase", run_phase)
    task = demo_processes.Task("in_memory", "model", "float16", context_tokens=64, new_tokens=2, directory="")
    with demo_processes.phase_runner() as run:
        assert run("in-memory SDPA", task) == {"tokens": [1, 2]}
    assert printed_before == ["in-memory SDPA ...\n"]
    printed = capsys.readouterr()
    assert printed.err == "in-memory SDPA: 2 tokens, 0 s in all\n" and not printed.out
