"""Run kvfsctl with the streams of a process of its own, but in this one: its imports are paid once."""

import gc
import io
import logging
import signal
import subprocess
import sys
import traceback
from contextlib import contextmanager

from kvfsctl.main import run


def kvfsctl(*arguments, stdin: str = "", terminal: bool = False) -> subprocess.CompletedProcess:
    """What `subprocess.run(["kvfsctl", ...], text=True)` would give. terminal: stdin says it is one."""
    result = kvfsctl_binary(*arguments, stdin=stdin.encode(), terminal=terminal)
    result.stdout = result.stdout.decode(errors="backslashreplace")  # blocks may be what a verb prints
    result.stderr = result.stderr.decode()
    return result


def assert_asks(*arguments) -> None:
    """A verb without --yes does nothing: nobody can be asked, the answer is no, or there is none."""
    script = kvfsctl(*arguments)
    assert script.returncode == 2 and "without --yes" in script.stderr
    for answer in ("n\n", "\n", ""):
        asked = kvfsctl(*arguments, stdin=answer, terminal=True)
        assert asked.returncode == 1 and "[y/N]" in asked.stdout and "Aborted" in asked.stderr


def kvfsctl_binary(*arguments, stdin: bytes = b"", terminal: bool = False) -> subprocess.CompletedProcess:
    """As kvfsctl, with bytes."""
    command = ["kvfsctl", *map(str, arguments)]
    streams = {name: io.TextIOWrapper(io.BytesIO(), write_through=True) for name in ("stdout", "stderr")}
    streams["stderr"].reconfigure(errors="backslashreplace")  # as a process's own
    streams["stdin"] = io.TextIOWrapper(_Input(stdin, terminal))
    root = logging.getLogger()
    with (
        _in_place(sys, argv=command, **streams),
        _in_place(root, handlers=[], level=root.level),
        _collected(),
        _own_signals(),
    ):
        code = _exit_code()
    output = {name: streams[name].buffer.getvalue() for name in ("stdout", "stderr")}
    return subprocess.CompletedProcess(command, code, **output)


class _Input(io.BytesIO):
    """Never this process's own stdin: on a terminal a verb that asks would wait for somebody to answer."""

    def __init__(self, content: bytes, terminal: bool):
        super().__init__(content)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def _exit_code() -> int:
    try:
        run()
    except SystemExit as end:
        return end.code or 0
    except Exception:
        traceback.print_exc()  # the interpreter would; tests look for it
        return 1
    return 0


@contextmanager
def _collected():
    """As at a process's end: a command that failed leaves its store to the collector.

    Only what is made meanwhile is looked at: all else is many times as much once torch is imported.
    """
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()


@contextmanager
def _own_signals():
    """What a server asks for ends with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _in_place(owner, **values):
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
