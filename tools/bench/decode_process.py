"""A contender in a process of its own: set up within the memory cap, then one decode step per request."""

import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from kvfs_bench.decode_shape import Shape, decoded
from kvfs_bench.memory_cap import MemoryCap

ANSWER_SECONDS = 600


class ContenderFailed(RuntimeError):
    """A contender's process ended with this traceback, or was killed."""


@dataclass(frozen=True)
class Step:
    """One token. disk_bytes: read from the disk, whoever asked; out: float32 [NUM_QUERY_HEADS, HEAD_DIM] of the
    checked layer."""

    seconds: float
    disk_bytes: int
    cpu_seconds: float
    out: np.ndarray


def _disk_bytes_read() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("the kernel does not count what a process reads")


def _decode(contender, shape: Shape, step: int) -> Step:
    tokens = [decoded(step, layer, shape) for layer in range(shape.num_layers)]
    disk_bytes, cpu, start = _disk_bytes_read(), time.process_time(), time.perf_counter()
    for layer, token in enumerate(tokens):
        out = contender.attend(layer, token)
        if layer == shape.checked_layer:
            checked = out
    seconds = time.perf_counter() - start
    return Step(
        seconds, _disk_bytes_read() - disk_bytes, time.process_time() - cpu, np.array(checked, np.float32)
    )


def _serve(contender_class, shape: Shape, path: Path, cap: MemoryCap | None, pipe) -> None:
    try:
        settings = contender_class.tune(shape, path)
        if cap is not None:
            cap.join()
        contender = contender_class(shape, path, settings)
        try:
            pipe.send(contender.setting)
            while (step := pipe.recv()) is not None:
                pipe.send(_decode(contender, shape, step))
        finally:
            contender.close()
    except Exception:
        pipe.send(ContenderFailed(traceback.format_exc()))


class ContenderProcess:
    """contender_class: made in the process after it joined the cap; see decode_rivals. `setting` is in words.

    Raises ContenderFailed, as `step` does.
    """

    def __init__(self, contender_class, shape: Shape, path: Path, cap: MemoryCap | None):
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(contender_class, shape, path, cap, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.setting: str = self._receive()
        except BaseException:
            self._process.kill()
            raise

    def _receive(self):
        if not self._pipe.poll(ANSWER_SECONDS):
            raise ContenderFailed(f"no answer in {ANSWER_SECONDS} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            why = f"ended with code {self._process.exitcode}: killed for memory?"
            raise ContenderFailed(why) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def step(self, number: int) -> Step:
        """Decode one token in all layers."""
        self._pipe.send(number)
        return self._receive()

    def close(self) -> None:
        if self._process.is_alive():
            try:
                self._pipe.send(None)
                self._process.join(ANSWER_SECONDS)
            except OSError:
                pass
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def drop_from_page_cache(path: Path) -> None:
    """Make a file's pages durable and forget them, so that nobody finds them in memory for free."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
