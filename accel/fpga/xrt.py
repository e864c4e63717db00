"""Cores on a card, driven by XRT: AMD's runtime for SmartSSD and Alveo, through its Python interface pyxrt.

A unit's pages are copied into a buffer of the card, the kernel of accel/fpga/card.py runs over them, and its
answer comes back. XRT shares a card's kernels among the cores that ask for them. While pyxrt waits for a run it
holds the GIL: a run takes some hundred microseconds.
"""

import ctypes
import threading
from importlib import import_module
from types import ModuleType

import numpy as np

from accel.fpga.arithmetic import ANSWER_BITS, CHANNEL_SCORE_BITS, Shape
from accel.fpga.card_format import ARGUMENTS, BUS_ERROR, FACTS, ID, NAME, RECORD_BITS, VERSION
from accel.fpga.model import Command, Result
from accel.fpga.simulation import answer_beats, block_words, channel_command_beats, command_beats, read_answer

TIMEOUT_MS = 2000  # of one unit, which takes milliseconds at most
LEAST_BYTES = 1 << 20  # of a buffer
WHAT_IT_TAKES = "install XRT for this card and source its setup.sh"


class CannotUseCard(Exception):
    """No XRT, no such card, or nothing on it that is this kernel."""


class CardFailed(Exception):
    """A run did not end, or the card's memory answered with an error."""


class Card:
    """A card with the kernel on it. shape: what its core is built for, as the card itself says. Raises
    CannotUseCard."""

    def __init__(self, xclbin: str, index: int = 0, timeout_ms: int = TIMEOUT_MS):
        self.name = f"card {index}"
        self.timeout_ms = timeout_ms
        self.stuck = ""  # why nothing is started any more
        self.xrt = _pyxrt()
        try:
            image = self.xrt.xclbin(xclbin)
            kernels = [kernel.get_name() for kernel in image.get_kernels()]
        except RuntimeError as error:
            raise CannotUseCard(f"{xclbin}: no bitstream that XRT can read: {_line(error)}") from error
        if NAME not in kernels:
            there = ", ".join(kernels) or "none"
            raise CannotUseCard(f"{xclbin}: has no kernel {NAME}; its kernels: {there}")
        try:
            self.device = self.xrt.device(index)
        except RuntimeError as error:
            raise CannotUseCard(f"{self.name}: XRT finds no such card: {_line(error)}") from error
        try:
            self.kernel = self.xrt.kernel(self.device, self.device.load_xclbin(image), NAME)
        except RuntimeError as error:
            raise CannotUseCard(f"{self.name}: does not take {xclbin}: {_line(error)}") from error
        try:
            facts = CardCore(self, Shape(lanes=256)).facts()  # a beat that no core's is wider than
        except CardFailed as error:
            raise CannotUseCard(str(error)) from error
        if (facts["id"], facts["version"]) != (ID, VERSION):
            raise CannotUseCard(
                f"{xclbin}: a kernel {NAME} of version {facts['version']}, not {VERSION}: build it anew"
            )
        self.shape = Shape(*(facts[name] for name in ("lanes", "rows", "max_beats", "block_tokens")))

    def core(self) -> "CardCore":
        return CardCore(self, self.shape)


class _Buffer:
    """Memory of a card for one argument of the kernel, and its image on this side. It grows as it is used."""

    def __init__(self, card: Card, argument: int):
        self._card, self._argument = card, argument
        self.bo = None
        self.image = np.empty(0, np.uint8)

    def resize(self, num_bytes: int) -> bool:
        """Have room for so many; whether it is another buffer now. Raises CardFailed."""
        if num_bytes <= len(self.image):
            return False
        xrt, size = self._card.xrt, max(LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
        group = self._card.kernel.group_id(self._argument)
        self.bo, self.image = None, np.empty(0, np.uint8)  # the old one's room may be needed
        try:
            bo = xrt.bo(self._card.device, size, xrt.bo.normal, group)
        except RuntimeError as error:
            raise CardFailed(f"{self._card.name}: has no buffer of {size} bytes: {_line(error)}") from error
        if bo.size() < size:
            raise CardFailed(f"{self._card.name}: gave a buffer of {bo.size()} bytes instead of {size}")
        self.bo, self.image = bo, np.frombuffer(bo.map(), np.uint8)
        return True

    def send(self, num_bytes: int) -> None:
        self.bo.sync(self._card.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE, num_bytes, 0)

    def fetch(self, num_bytes: int) -> None:
        self.bo.sync(self._card.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_FROM_DEVICE, num_bytes, 0)


class CardCore:
    """As simulation.SimulatedCore, and one thread at a time as well; any number of them may share a card. All
    operations raise CardFailed."""

    def __init__(self, card: Card, shape: Shape):
        self.shape = shape
        self.cycles = 0
        self.beats = 0
        self._card = card
        self._buffers = {name: _Buffer(card, place) for place, name in enumerate(ARGUMENTS)}
        self._run_object = card.xrt.run(card.kernel)

    def run(self, command: Command, position, tokens, keys, values, masks=None) -> Result:
        num_beats = command.queries.shape[1] // self.shape.lanes
        blocks = block_words(position, tokens, masks, self.shape)
        words = command_beats(command, self.shape)
        return self._run(words, blocks, tokens, keys, num_beats, values, num_beats, ANSWER_BITS)

    def weigh_channels(self, dtype: int, num_beats: int, channels, weights, elements, masks=None) -> Result:
        words = channel_command_beats(dtype, num_beats, self.shape)
        blocks = block_words(np.zeros(len(channels), np.uint32), channels, masks, self.shape)
        return self._run(words, blocks, channels, weights, 1, elements, num_beats, CHANNEL_SCORE_BITS)

    def facts(self) -> dict[str, int]:
        """What the kernel says of itself, by names of card.FACTS: the answer to a job without blocks."""
        beat_bytes = self.shape.beat_bits // 8
        for name in ARGUMENTS:
            self._resize(name, beat_bytes)
        self._buffers["job"].image[:beat_bytes] = 0
        return self._execute(beat_bytes, beat_bytes)

    def _run(self, words, blocks, tokens, keys, key_beats: int, values, value_beats: int, lane_bits: int):
        beat_bytes = self.shape.beat_bits // 8
        tokens = np.asarray(tokens, np.int64)
        key_offsets = self._stage("keys", keys, tokens * key_beats * beat_bytes)
        value_offsets = self._stage("values", values, tokens * value_beats * beat_bytes)
        records = np.zeros((len(blocks), beat_bytes // 8), np.uint64)
        records[:, 0] = blocks[:, :2].copy().view(np.uint64)[:, 0] & 0xFFFFFFFFFFFF
        records[:, 0] |= (tokens * key_beats).astype(np.uint64) << 48
        records[:, 1] = key_offsets | (tokens * value_beats).astype(np.uint64) << 48
        records[:, 2] = value_offsets
        masks = blocks[:, 2:].copy().view(np.uint64)
        records[:, RECORD_BITS // 64 : RECORD_BITS // 64 + masks.shape[1]] = masks
        head = np.zeros(beat_bytes // 4, np.uint32)
        head[:2] = words.nbytes // beat_bytes, len(blocks)
        job = np.concatenate([each.reshape(-1).view(np.uint8) for each in (head, words, records)])
        num_answers = answer_beats(value_beats, lane_bits, self.shape)
        self._resize("job", len(job))
        self._resize("answer", (1 + num_answers) * beat_bytes)
        self._buffers["job"].image[: len(job)] = job
        facts = self._execute(len(job), (1 + num_answers) * beat_bytes)
        self.cycles += facts["cycles"]
        self.beats += int(tokens.sum()) * (key_beats + value_beats)
        if facts["status"] & BUS_ERROR:
            raise CardFailed(f"{self._card.name}: its memory answered with an error")
        answer = self._buffers["answer"].image[beat_bytes : (1 + num_answers) * beat_bytes]
        answer = answer.reshape(num_answers, beat_bytes).copy()
        return read_answer(answer, value_beats, facts["status"], lane_bits, self.shape)

    def _resize(self, name: str, num_bytes: int) -> None:
        if self._buffers[name].resize(num_bytes):
            self._run_object.set_arg(ARGUMENTS.index(name), self._buffers[name].bo)

    def _stage(self, name: str, addresses, sizes: np.ndarray) -> np.ndarray:
        """Copy memory of this machine into a buffer of the card: uint64, the places there."""
        offsets = np.cumsum(sizes) - sizes
        total = int(sizes.sum())
        self._resize(name, max(1, total))
        buffer = self._buffers[name]
        target = buffer.image.ctypes.data
        for address, offset, size in zip(
            np.asarray(addresses).tolist(), offsets.tolist(), sizes.tolist(), strict=True
        ):
            ctypes.memmove(target + offset, address, size)
        buffer.send(total)
        return offsets.astype(np.uint64)

    def _execute(self, job_bytes: int, answer_bytes: int) -> dict[str, int]:
        xrt, card = self._card.xrt, self._card
        job, answer = self._buffers["job"], self._buffers["answer"]
        if card.stuck:
            raise CardFailed(card.stuck)
        facts = answer.image[: 4 * len(FACTS)]
        facts[:] = 0  # what is there afterwards is of this run
        job.send(job_bytes)
        answer.send(answer_bytes)
        try:
            self._run_object.start()
            state = self._run_object.wait(card.timeout_ms)
        except RuntimeError as error:
            raise CardFailed(f"{card.name}: cannot be started: {_line(error)}") from error
        if state != xrt.ert_cmd_state.ERT_CMD_STATE_COMPLETED:
            ended = state.name.removeprefix("ERT_CMD_STATE_").lower()
            card.stuck = (
                f"{card.name}: a unit did not end within {card.timeout_ms} ms ({ended}): reset the card"
            )
            raise CardFailed(card.stuck)
        answer.fetch(answer_bytes)
        return dict(zip(FACTS, facts.view(np.uint32).tolist(), strict=True))


def _pyxrt() -> ModuleType:
    try:
        return import_module("pyxrt")
    except ImportError as error:
        raise CannotUseCard(f"pyxrt is not there: {WHAT_IT_TAKES} ({_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


_cards: dict[tuple[str, int], Card] = {}
_lock = threading.Lock()


def open_card(xclbin: str, index: int) -> Card:
    """One for a bitstream and a card, for all of the process. Raises CannotUseCard."""
    with _lock:
        if (xclbin, index) not in _cards:
            _cards[xclbin, index] = Card(xclbin, index)
        return _cards[xclbin, index]
