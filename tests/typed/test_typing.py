"""The public interface has types; a checker that reads them accepts what is right and nothing else."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvfs
import kvfs.aio
from kvfs.drive_set.set_sequence import SetSequence
from kvfs.remote.remote_sequence import RemoteSequence
from kvfs.remote.remote_store import RemoteStore

ROOT = Path(__file__).resolve().parents[2]
ALSO_RETURNED = [RemoteStore, RemoteSequence, SetSequence]


def public_functions():
    """(name, function) of all that kvfs and kvfs.aio export, and of the kinds that their functions return."""
    exported = [getattr(module, name) for module in (kvfs, kvfs.aio) for name in module.__all__]
    for thing in exported + ALSO_RETURNED:
        if inspect.isfunction(thing):
            yield thing.__qualname__, thing
        elif inspect.isclass(thing):
            for name, member in inspect.getmembers(thing):
                function = member.fget if isinstance(member, property) else member
                if inspect.isfunction(function) and (not name.startswith("_") or name == "__init__"):
                    yield f"{thing.__name__}.{name}", function


def test_everything_is_annotated():
    """What has no type is of any type: a checker accepts every mistake with it."""
    assert (ROOT / "kvfs" / "py.typed").exists()
    for name, function in public_functions():
        signature = inspect.signature(function)
        untyped = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"
        ]
        assert not untyped, f"{name}: {untyped}"
        assert name.endswith("__init__") or signature.return_annotation is not signature.empty, name


@pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed: pip install kvfs[test]"
)
@pytest.mark.slow
def test_checked_by_mypy():
    """A typed program of a user's checks: the types say what the functions take and give."""
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            "tests/typed/public_interface.py",
        ],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
