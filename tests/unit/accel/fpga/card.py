"""A simulated card: accel.fpga.card's kernel with a memory that takes its time. See card.cc."""

import hashlib
from importlib import resources
from pathlib import Path

import cffi
import numpy as np

from accel.fpga import simulation
from accel.fpga.arithmetic import Shape

HARNESS = Path(__file__).with_name("card.cc")
SOURCES = (*simulation.DESIGN, "data_mover.py", "card.py")
_ffi = cffi.FFI()
_ffi.cdef("""
void *kvfs_card_open(uint8_t *bytes, uint64_t size);
void kvfs_card_close(void *);
void kvfs_card_memory(void *, uint64_t seed, int latency, int stall, int is_dead);
uint64_t kvfs_card_broken_rules(void *);
uint64_t kvfs_card_cycles(void *);
void kvfs_card_tick(void *, uint64_t cycles);
int kvfs_card_read(void *, uint16_t address, uint32_t *value);
int kvfs_card_write(void *, uint16_t address, uint32_t value, uint8_t strobes);
""")


def library(shape: Shape) -> Path:
    digest = hashlib.sha256(repr(shape).encode() + HARNESS.read_bytes())
    for name in SOURCES:
        digest.update((resources.files("accel.fpga") / name).read_bytes())

    def build(work: Path, verilator: Path) -> Path:
        from accel.fpga.card import to_verilog
        from accel.fpga.card_format import NAME

        defines = {"KVFS_BEAT_BITS": shape.beat_bits}
        return simulation.compiled(to_verilog(shape), NAME, "Vcard", HARNESS, defines, work, verilator)

    return simulation.kept(f"card-{digest.hexdigest()[:16]}", build)


class SimulatedCard:
    """memory: uint8, what the kernel's masters reach; an address is a place in it."""

    def __init__(self, shape: Shape, memory_bytes: int):
        self.shape = shape
        self.memory = np.zeros(memory_bytes, np.uint8)
        self._library = _ffi.dlopen(str(library(shape)))
        bytes_of_memory = _ffi.from_buffer("uint8_t[]", self.memory)
        self._card = _ffi.gc(
            self._library.kvfs_card_open(bytes_of_memory, memory_bytes), self._library.kvfs_card_close
        )

    def set_memory(self, *, seed: int = 1, latency: int = 0, stall: int = 0, is_dead: bool = False) -> None:
        """latency: of a burst, up to so many cycles; stall: of 256 cycles, for each channel"""
        self._library.kvfs_card_memory(self._card, seed, latency, stall, is_dead)

    @property
    def broken_rules(self) -> int:
        """Of AXI4, by the kernel."""
        return self._library.kvfs_card_broken_rules(self._card)

    @property
    def cycles(self) -> int:
        return self._library.kvfs_card_cycles(self._card)

    def tick(self, cycles: int) -> None:
        self._library.kvfs_card_tick(self._card, cycles)

    def read(self, address: int) -> int:
        """A register; raises KeyError where the kernel answers with an error."""
        value = _ffi.new("uint32_t *")
        if self._library.kvfs_card_read(self._card, address, value):
            raise KeyError(address)
        return value[0]

    def write(self, address: int, value: int, strobes: int = 15) -> None:
        if self._library.kvfs_card_write(self._card, address, value, strobes):
            raise KeyError(address)
