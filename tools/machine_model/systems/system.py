"""What a system is to the simulation: where K and V lie, and the tasks of one layer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from machine_model.events import Simulation, Task
from machine_model.situation import Situation

GPU, GPU_LINK, DRIVES_LINK, ATTENTION = "gpu", "gpu_link", "drives_link", "host.attention"


def flash(drive: int) -> str:
    return f"drive{drive}.flash"


def accelerator(drive: int) -> str:
    return f"drive{drive}.accelerator"


def no_room_on_drives(at: Situation, needed: float, room: float) -> str:
    return f"{needed / 1e12:,.2f} TB of K and V, room for {room / 1e12:,.2f} TB on {at.num_drives} drive(s)"


@dataclass
class Pass:
    """One pass over the layers, as it is being built: prefill, or a decode step. ends: of each layer; loads: of
    each layer's weights"""

    simulation: Simulation
    at: Situation
    ends: list[Task] = field(default_factory=list)
    loads: list[Task] = field(default_factory=list)

    @property
    def before(self) -> Task | None:
        return self.ends[-1] if self.ends else None

    def weights(self) -> Task | None:
        """The next layer's come while the layer before is computed, into the second of two buffers; or, as in
        FlexGen's cost model, when it has ended."""
        seconds = self.at.weights_seconds
        if not seconds:
            return None
        overlaps = self.at.machine.software.weights_overlap
        room = self.ends[-2:-1] if overlaps else self.ends[-1:]
        load = self.simulation.task(GPU_LINK, seconds, "weights", [*self.loads[-1:], *room])
        self.loads.append(load)
        return load


@dataclass(frozen=True)
class Moved:
    """Bytes of one decode step, all layers: read from flash, written to it by the host, over the link between
    drives or host memory and the rest; stored: of all sequences"""

    flash_read: float
    flash_written: float
    link: float
    stored: float


class System(ABC):
    """name: on the command line; words: for people; needs_drive: whether K and V are on flash; is_sparse:
    whether answers are approximate; has_ftl: whether what is written goes through kvfs's translation layer"""

    name: str
    words: str
    needs_drive = True
    is_sparse = False
    has_ftl = False

    def situation(self, at: Situation) -> Situation:
        """As this system uses the machine."""
        return at

    @abstractmethod
    def why_not(self, at: Situation) -> str | None:
        """Why it cannot run: what does not fit, at its longest; None if it does."""

    @abstractmethod
    def decode_layer(self, one: Pass) -> Task:
        """Adds a layer of a decode step; its last task."""

    @abstractmethod
    def prefill_layer(self, one: Pass) -> Task:
        """Adds a layer of prefill; its last task."""

    @abstractmethod
    def moved(self, at: Situation) -> Moved:
        """In a decode step."""
