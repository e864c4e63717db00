"""Calls of an ordinary store from coroutines, in threads.

- A call takes the turn of every sequence that it is about, first come, first served: appends to a sequence are
  done in the order in which they were begun, and attention sees those begun before it.
- At most `num_threads` calls are under way. Others wait as coroutines, so nothing piles up but what the caller
  has begun and not awaited.
- A call that is cancelled before its turn is not done at all. One that is under way cannot be taken back:
  whoever cancels it waits until it has ended, so that arrays which it reads or writes are the caller's again;
  then the CancelledError goes on. Should the call fail meanwhile, that is its cause.
"""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from itertools import count
from typing import ParamSpec, TypeVar

from kvfs.errors import StoreClosed

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_numbers = count()


class Turn:
    """Of one sequence: held by the call that is about it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.number = next(_numbers)


class Threads:
    """The threads of one store."""

    def __init__(self, num_threads: int):
        self._free = asyncio.Semaphore(num_threads)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kvfs-aio")
        self.is_closed = False

    async def call(
        self,
        turns: Iterable[Turn],
        function: Callable[Parameters, Result],
        /,
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> Result:
        """What the function returns, or raises, in these sequences' turn. Raises StoreClosed."""
        async with AsyncExitStack() as stack:
            # in the order of their numbers: two calls about the same sequences never wait for each other
            for turn in sorted(set(turns), key=lambda turn: turn.number):
                await stack.enter_async_context(turn.lock)
            await stack.enter_async_context(self._free)
            if self.is_closed:
                raise StoreClosed
            return await _end_of(self._submit(function, *arguments, **options))

    async def close(self, function: Callable[[], None]) -> None:
        """The last call: done even if cancelled. Others that have no thread yet raise StoreClosed."""
        self.is_closed = True
        try:
            await _end_of(self._submit(function))
        finally:
            self._pool.shutdown(wait=False)

    def _submit(
        self, function: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> "asyncio.Future[Result]":
        return asyncio.wrap_future(self._pool.submit(function, *arguments, **options))


async def _end_of(job: "asyncio.Future[Result]") -> Result:
    """The result of what runs in a thread; a cancellation goes on once it has ended."""
    cancelled: asyncio.CancelledError | None = None
    while not job.done():
        try:
            await asyncio.wait([job])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from job.exception()
    return job.result()
