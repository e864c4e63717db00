"""A bench around a simulated core: five streams and the registers, each at its own random pace."""

from dataclasses import dataclass, field

import numpy as np

from accel.fpga import kernel
from accel.fpga.arithmetic import ANSWER_BITS, CHANNEL_SCORE_BITS
from accel.fpga.simulation import (
    answer_beats,
    block_words,
    channel_command_beats,
    command_beats,
    read_answer,
)

STREAMS = ("command", "blocks", "keys", "values")


@dataclass
class Unit:
    """beats: for each stream a list of (uint8 array, is last)"""

    num_beats: int
    lane_bits: int
    beats: dict = field(default_factory=dict)


def _cut(rows: np.ndarray, beat_bytes: int) -> list:
    """Beats of one transfer, the last one marked."""
    beats = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).reshape(-1, beat_bytes)
    return [(beat, number == len(beats) - 1) for number, beat in enumerate(beats)]


def _blocks(position, tokens, masks, shape) -> list:
    every = np.array([2**64 - 1 if mask is None else mask for mask in masks], np.uint64)
    words = block_words(position, tokens, every, shape)
    return [(np.ascontiguousarray(block).view(np.uint8), False) for block in words]


def attention(command, blocks, shape) -> Unit:
    """blocks: as model.attend takes them"""
    size = shape.beat_bits // 8
    unit = Unit(command.queries.shape[1] // shape.lanes, ANSWER_BITS)
    unit.beats["command"] = _cut(command_beats(command, shape), size)
    position, tokens = [block[0] for block in blocks], [len(block[2]) for block in blocks]
    unit.beats["blocks"] = _blocks(position, tokens, [block[1] for block in blocks], shape)
    unit.beats["keys"] = [beat for block in blocks for beat in _cut(block[2], size)]
    unit.beats["values"] = [beat for block in blocks for beat in _cut(block[3], size)]
    return unit


def channels(dtype, blocks, shape) -> Unit:
    """blocks: as model.weigh_channels takes them"""
    size = shape.beat_bits // 8
    num_beats = blocks[0][2].shape[1] // shape.lanes
    unit = Unit(num_beats, CHANNEL_SCORE_BITS)
    unit.beats["command"] = _cut(channel_command_beats(dtype, num_beats, shape), size)
    counts = [len(block[2]) for block in blocks]
    unit.beats["blocks"] = _blocks(
        np.zeros(len(blocks), np.uint32), counts, [block[0] for block in blocks], shape
    )
    for _, weights, elements in blocks:
        padded = np.zeros((len(weights), shape.lanes // 2), np.int32)
        padded[:, : weights.shape[1]] = weights
        unit.beats.setdefault("keys", []).extend(_cut(padded, size))
        unit.beats.setdefault("values", []).extend(_cut(elements, size))
    return unit


class Bench:
    """paces: for each stream, the answer and the registers, the chance that a cycle holds it up.
    taken: beats of each stream in the last run."""

    def __init__(self, core, seed: int, paces: dict[str, float]):
        self.shape, self.pins = core.shape, core.pins()
        self.random, self.paces = np.random.default_rng(seed), paces
        self.registers_read: list[tuple[int, int, int]] = []  # address, response, value
        self.cycles = 0
        self.taken: dict[str, int] = {}

    def _holds(self, name: str) -> bool:
        return self.random.random() < self.paces.get(name, 0)

    def run(self, units: list[Unit], stop_after: int | None = None) -> list:
        """What the core answers, unit after unit, all of them offered from the first cycle on. stop_after:
        cycles, after which the streams are dropped where they are."""
        queues = [[beat for unit in units for beat in unit.beats[name]] for name in STREAMS]
        next_of, offered = [0] * 4, [False] * 4
        pins, inputs, outputs = self.pins, self.pins.inputs, self.pins.outputs
        results, answer, held = [], [], None
        limit = 200 + 60 * sum(len(queue) for queue in queues) if stop_after is None else stop_after
        for _ in range(limit):
            for n, name in enumerate(STREAMS):
                if not offered[n] and next_of[n] < len(queues[n]) and not self._holds(name):
                    pins.offer(n, *queues[n][next_of[n]])
                    offered[n] = True
            inputs.answer_ready = not self._holds("answer")
            self._drive_registers()
            pins.cycle()
            self.cycles += 1
            self._watch_registers()
            for n in range(4):
                if offered[n] and outputs.ready[n]:
                    pins.withdraw(n)
                    offered[n], next_of[n] = False, next_of[n] + 1
            beat = (pins.answer.tobytes(), outputs.answer_last) if outputs.answer_valid else None
            assert held is None or beat == held, "what is offered stays as it is until it is taken"
            held = None if inputs.answer_ready else beat
            if beat and inputs.answer_ready:
                answer.append(np.frombuffer(beat[0], np.uint8))
                if outputs.answer_last:
                    unit = units[len(results)]
                    assert len(answer) == answer_beats(unit.num_beats, unit.lane_bits, self.shape)
                    words = np.stack(answer)
                    results.append(
                        read_answer(words, unit.num_beats, outputs.status, unit.lane_bits, self.shape)
                    )
                    answer = []
                    if len(results) == len(units):
                        break
        self.taken = dict(zip(STREAMS, next_of, strict=True))
        for n in range(4):
            pins.withdraw(n)
        assert stop_after is not None or len(results) == len(units), "the core has stopped"
        return results

    def _drive_registers(self) -> None:
        """Reads of any address; what waits stays as it is."""
        inputs = self.pins.inputs
        if not inputs.read_valid and "registers" in self.paces and not self._holds("registers"):
            inputs.read_valid, inputs.read_address = 1, int(self.random.integers(64)) * 4
            self._address = inputs.read_address
        inputs.read_ready = not self._holds("registers")

    def _watch_registers(self) -> None:
        inputs, outputs = self.pins.inputs, self.pins.outputs
        if inputs.read_valid and outputs.read_address_ready:
            inputs.read_valid = 0
            self._pending = self._address
        if outputs.read_data_valid and inputs.read_ready:
            self.registers_read.append((self._pending, outputs.read_response, outputs.read_data))

    def reset(self) -> None:
        """By the control register, address before data, and nothing else waits."""
        inputs, outputs = self.pins.inputs, self.pins.outputs
        inputs.read_valid, inputs.read_ready, inputs.answer_ready = 0, 1, 0
        inputs.write_address, inputs.write_data, inputs.strobes = kernel.CONTROL, 1, 15
        inputs.write_address_valid = 1
        self.pins.cycle()
        assert not outputs.write_address_ready
        inputs.write_valid = inputs.response_ready = 1
        self.pins.cycle()
        assert outputs.write_address_ready and outputs.write_ready
        inputs.write_address_valid = inputs.write_valid = 0
        self.pins.cycle()
        assert outputs.response_valid and outputs.response == kernel.OKAY
        self.pins.cycle()
        inputs.response_ready = inputs.read_ready = 0
