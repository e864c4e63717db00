"""XRT's Python interface as its documentation has it, over a simulated card: what accel.fpga.xrt uses of it.

Strict where XRT is: buffers are seen by the other side only after a sync, arguments are of known places, groups
are the kernel's, errors are RuntimeError.
"""

from enum import Enum
from types import SimpleNamespace

import numpy as np

from accel.fpga.card import CONTROL, DONE, FIRST_ARGUMENT, START
from accel.fpga.card_format import ARGUMENTS, NAME
from tests.unit.accel.fpga.card import SimulatedCard

CYCLES_A_MS = 2000  # of the simulated card's time: far less than a real one's
GROUPS = {"job": 1, "keys": 0, "values": 2, "answer": 1}
ALIGNMENT = 4096


class State(Enum):
    ERT_CMD_STATE_NEW = 1
    ERT_CMD_STATE_COMPLETED = 4
    ERT_CMD_STATE_TIMEOUT = 8


class Direction(Enum):
    XCL_BO_SYNC_BO_TO_DEVICE = 0
    XCL_BO_SYNC_BO_FROM_DEVICE = 1


def make(card: SimulatedCard, kernels=(NAME,), num_devices: int = 1):
    """The module, with one card. room: bytes of its memory that buffers may take; starts: of runs so far"""
    xrt = SimpleNamespace(
        ert_cmd_state=State, xclBOSyncDirection=Direction, card=card, starts=0, room=len(card.memory)
    )
    next_place = [0]

    class Xclbin:
        def __init__(self, path: str):
            if not path.endswith(".xclbin"):
                raise RuntimeError(f"failed to open '{path}'\n")

        def get_kernels(self):
            return [SimpleNamespace(get_name=lambda name=name: name) for name in kernels]

    class Device:
        def __init__(self, index: int):
            if index >= num_devices:
                raise RuntimeError(f"Could not open device with index '{index}'")

        def load_xclbin(self, image: Xclbin) -> str:
            assert isinstance(image, Xclbin)
            return "uuid"

    class Kernel:
        def __init__(self, device: Device, uuid: str, name: str):
            assert isinstance(device, Device) and uuid == "uuid"
            if name not in kernels:
                raise RuntimeError(f"No such kernel '{name}'")

        def group_id(self, argument: int) -> int:
            return GROUPS[ARGUMENTS[argument]]

    class Bo:
        normal = 0

        def __init__(self, device: Device, size: int, flags: int, group: int):
            assert isinstance(device, Device) and flags == Bo.normal and group in GROUPS.values()
            if next_place[0] + size > xrt.room:
                raise RuntimeError("unable to allocate: Cannot allocate memory")
            self.place, self._size = next_place[0], size
            next_place[0] += -(-size // ALIGNMENT) * ALIGNMENT
            self.host = np.full(size, 0xAA, np.uint8)
            self.group = group

        def size(self) -> int:
            return self._size

        def map(self) -> memoryview:
            return memoryview(self.host)

        def sync(self, direction: Direction, size: int, offset: int) -> None:
            if size + offset > self._size:
                raise RuntimeError("sync beyond the buffer's end")
            here, there = slice(offset, offset + size), slice(self.place + offset, self.place + offset + size)
            if direction is Direction.XCL_BO_SYNC_BO_TO_DEVICE:
                card.memory[there] = self.host[here]
            else:
                self.host[here] = card.memory[there]

    class Run:
        def __init__(self, kernel: Kernel):
            assert isinstance(kernel, Kernel)
            self._arguments = {}

        def set_arg(self, argument: int, bo: Bo) -> None:
            assert bo.group == GROUPS[ARGUMENTS[argument]]
            self._arguments[argument] = bo

        def start(self) -> None:
            if len(self._arguments) < len(ARGUMENTS):
                raise RuntimeError("arguments are missing")
            for argument, bo in self._arguments.items():
                card.write(FIRST_ARGUMENT + 8 * argument, bo.place)
                card.write(FIRST_ARGUMENT + 8 * argument + 4, bo.place >> 32)
            xrt.starts += 1
            card.write(CONTROL, START)

        def wait(self, timeout_ms: int) -> State:
            before = card.cycles
            while card.cycles - before < timeout_ms * CYCLES_A_MS:
                if card.read(CONTROL) & DONE:
                    return State.ERT_CMD_STATE_COMPLETED
                card.tick(50)
            return State.ERT_CMD_STATE_TIMEOUT

    xrt.xclbin, xrt.device, xrt.kernel, xrt.bo, xrt.run = Xclbin, Device, Kernel, Bo, Run
    return xrt
