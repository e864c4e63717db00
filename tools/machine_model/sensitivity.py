"""Which of a machine's numbers matter: tokens/s with each of them changed alone."""

from dataclasses import asdict, dataclass

from machine_model.language_model import LanguageModel
from machine_model.machine import Machine
from machine_model.quantities import BadMachine
from machine_model.simulation import simulate
from machine_model.workload import Workload

STEP = 0.2
NO_MATTER = 1e-3  # a change of tokens/s below this is none


@dataclass(frozen=True)
class Sensitivity:
    """less, more: tokens/s with the number `step` lower and higher, over that without a change, less one; None
    where the machine is impossible so, or the model does not fit it"""

    path: str
    value: float
    unit: str
    source: str
    assumed: bool
    less: float | None
    more: float | None

    @property
    def reach(self) -> float:
        return max(abs(change) for change in (self.less or 0.0, self.more or 0.0))

    def as_dict(self) -> dict:
        return asdict(self)


def sensitivity(
    machine: Machine,
    model: LanguageModel,
    system: str,
    work: Workload,
    num_drives: int | None = None,
    step: float = STEP,
) -> list[Sensitivity]:
    """The numbers that change tokens/s, those that do most first. Raises BadMachine where it does not fit."""
    if not 0 < step < 1:
        raise BadMachine(f"step is between 0 and 1, not {step!r}")
    base = simulate(machine, model, system, work, num_drives)
    if not base.fits:
        raise BadMachine(f"{system} on {machine.name}: {base.why_not}")

    def changed(path: str, factor: float) -> float | None:
        try:
            found = simulate(machine.with_changed(path, factor), model, system, work, num_drives)
        except BadMachine:  # a page of 4.8 KiB, less memory than what is free of it
            return None
        return found.tokens_per_second / base.tokens_per_second - 1 if found.fits else None

    found = []
    for one in machine.numbers():
        less, more = changed(one.path, 1 - step), changed(one.path, 1 + step)
        found.append(Sensitivity(one.path, one.value, one.unit, one.source, one.assumed, less, more))
    found = [one for one in found if one.reach > NO_MATTER]
    return sorted(found, key=lambda one: -one.reach)
