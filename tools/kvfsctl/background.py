"""Running a server in the background, and knowing that it has started."""

import os
import sys
from collections.abc import Callable

_READY = b"R"


def in_background(serve: Callable[[Callable[[], None]], int], log_file: str | os.PathLike) -> int:
    """Run `serve(ready)` in a process of its own; return once it calls `ready`, or with its exit code.

    To be called before there are threads. Until it is ready the server's stderr is this process's, so that its
    errors are seen; from then on its log goes to log_file.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    server = os.fork()
    if server:
        os.close(writing)
        with os.fdopen(reading, "rb") as answers:
            if answers.read(1) == _READY:
                return 0
        return os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
    code = 1
    try:
        os.close(reading)
        os.setsid()

        def ready() -> None:
            _redirect(log_file)
            os.write(writing, _READY)
            os.close(writing)

        code = serve(ready)
    except SystemExit as exit_request:
        code = exit_request.code if isinstance(exit_request.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)  # nothing of the process that forked is to run here


def _redirect(log_file: str | os.PathLike) -> None:
    """Let go of the terminal and of the folder that this was started in."""
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, target in ((nothing, 0), (nothing, 1), (log, 2)):
        os.dup2(descriptor, target)
    os.close(nothing)
    os.close(log)
