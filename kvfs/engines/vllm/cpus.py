"""The CPUs of this process, before vLLM bound the engine's thread to one of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_OURS = os.sched_getaffinity(0)  # this package is imported with the configuration, long before a worker starts


def unbind_thread() -> None:
    """The calling thread may run on any of them: beside the engine, not in turns with it."""
    os.sched_setaffinity(0, _OURS)


@contextmanager
def unbound() -> Iterator[None]:
    """For making threads, which inherit it."""
    bound = os.sched_getaffinity(0)
    unbind_thread()
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)
