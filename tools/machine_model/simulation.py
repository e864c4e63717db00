"""From a machine, a language model, a system and a workload to a Result.

Decode steps are simulated at the middles of SAMPLES equal parts of the output; between them what a step takes
grows with the context. Layers are alike, so of each pass some are simulated, and the time from one to the next
goes on for the others.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from machine_model.amplification import amplification_of
from machine_model.events import Run, Simulation, Task
from machine_model.language_model import LanguageModel
from machine_model.machine import Machine
from machine_model.quantities import BadMachine
from machine_model.result import CATEGORIES, Result, StepSample, Traffic
from machine_model.situation import Situation
from machine_model.systems import SYSTEMS
from machine_model.systems.system import GPU, Pass, System
from machine_model.workload import Workload

SAMPLES = 4
SIMULATED_LAYERS = 6
WARM_LAYERS = 2  # of these, before the pipeline runs evenly
SWEEPS = {"batch": "batch", "context": "input_tokens", "output": "output_tokens", "drives": None}


def simulate(
    machine: Machine, model: LanguageModel, system: str, work: Workload, num_drives: int | None = None
) -> Result:
    """Raises BadMachine for a system that is not known or fewer than one drive."""
    if system not in SYSTEMS:
        raise BadMachine(f"system {system!r} is none of {', '.join(SYSTEMS)}")
    count = machine.num_drives if num_drives is None else num_drives
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1 << 16:
        raise BadMachine(f"num_drives is 1 to 65,536 (no unit), not {num_drives!r}")
    kind = SYSTEMS[system]
    at = kind.situation(Situation(machine, model, work, count, work.input_tokens))
    if (why := kind.why_not(at)) is not None:
        return _does_not_fit(at, kind, why)
    prefill = _pass(at, kind.prefill_layer, behind=True)
    samples = [_sample(at.at(context), kind) for context in _contexts(work)]
    decode = work.output_tokens * sum(one.seconds * one.weight for one in samples)
    breakdown = _mean(samples, lambda one: one.breakdown, work.output_tokens)
    busy = _mean(samples, lambda one: one.busy, work.output_tokens)
    utilisation = {name: seconds / decode for name, seconds in busy.items()}
    traffic = _traffic(at, kind, work)
    return Result(
        machine.name,
        model.name,
        system,
        work,
        count,
        True,
        None,
        prefill.seconds,
        decode,
        work.batch * work.output_tokens / (prefill.seconds + decode),
        work.batch * work.output_tokens / decode,
        tuple(samples),
        {name: breakdown[name] for name in CATEGORIES if name in breakdown},
        utilisation,
        max(utilisation, key=utilisation.get),
        traffic,
        amplification_of(at, traffic.kv_stored) if kind.has_ftl else None,
    )


def sweep(
    machine: Machine,
    model: LanguageModel,
    systems: Iterable[str],
    work: Workload,
    over: str,
    values: Sequence[int],
    num_drives: int | None = None,
) -> list[Result]:
    """Every system at every value of `over`: batch, context (tokens of the input), output or drives."""
    if over not in SWEEPS:
        raise BadMachine(f"a sweep is over {', '.join(SWEEPS)}, not {over!r}")
    results = []
    for system in systems:
        for value in values:
            if over == "drives":
                results.append(simulate(machine, model, system, work, value))
            else:
                changed = replace(work, **{SWEEPS[over]: value})
                results.append(simulate(machine, model, system, changed, num_drives))
    return results


def _contexts(work: Workload) -> list[int]:
    """The middles of equal parts of the output; of a short one each step."""
    count = min(SAMPLES, work.output_tokens)
    return [work.input_tokens + (2 * i + 1) * work.output_tokens // (2 * count) for i in range(count)]


def _sample(at: Situation, kind: System) -> StepSample:
    found = _pass(at, kind.decode_layer)
    # what is written behind a step has to be written before the next one's
    more = max(found.busy.values()) - found.seconds
    if more > 0:
        found.seconds += more
        found.breakdown["write"] = found.breakdown.get("write", 0.0) + more
    weight = 1 / min(SAMPLES, at.work.output_tokens)
    return StepSample(at.context, found.seconds, weight, found.busy, found.breakdown)


def _pass(at: Situation, layer: Callable[[Pass], Task], behind: bool = False) -> Run:
    """All layers and the vocabulary's logits. behind: until all that was written behind has been written,
    too."""
    simulation = Simulation()
    one = Pass(simulation, at)
    layers = at.geometry.num_layers
    simulated = min(layers, SIMULATED_LAYERS)
    for _ in range(simulated):
        one.ends.append(layer(one))
    run = simulation.run(None if behind else one.ends[-1])
    if simulated < layers:
        period = (one.ends[-1].end - one.ends[WARM_LAYERS - 1].end) / (simulated - WARM_LAYERS)
        if behind:
            period = max(period, max(run.busy.values()) / simulated)
        run = _longer(run, (layers - simulated) * period, layers / simulated)
    head = at.head_seconds
    run.busy[GPU] = run.busy.get(GPU, 0.0) + head
    run.breakdown["gpu"] = run.breakdown.get("gpu", 0.0) + head
    return Run(run.seconds + head, run.busy, run.breakdown)


def _longer(run: Run, more: float, factor: float) -> Run:
    """The same for more layers: so many more seconds, so many times the work."""
    seconds = run.seconds + more
    return Run(
        seconds,
        {name: busy * factor for name, busy in run.busy.items()},
        {name: part * seconds / run.seconds for name, part in run.breakdown.items()},
    )


def _mean(samples: list[StepSample], part: Callable[[StepSample], dict[str, float]], steps: int) -> dict:
    found: dict[str, float] = {}
    for one in samples:
        for name, seconds in part(one).items():
            found[name] = found.get(name, 0.0) + steps * one.weight * seconds
    return found


def _traffic(at: Situation, kind: System, work: Workload) -> Traffic:
    moved = [kind.moved(at.at(context)) for context in _contexts(work)]
    tokens = len(moved) * work.batch
    dense = sum(at.at(context).kv_bytes for context in _contexts(work))
    return Traffic(
        kind.moved(at.at(work.last_tokens)).stored,
        sum(one.flash_read for one in moved) / tokens,
        sum(one.link for one in moved) / tokens,
        sum(one.flash_written for one in moved) / tokens,
        dense / tokens,
    )


def _does_not_fit(at: Situation, kind: System, why: str) -> Result:
    return Result(
        at.machine.name, at.model.name, kind.name, at.work, at.num_drives, False, why,
        None, None, 0.0, 0.0, (), {}, {}, None, None, None,
    )  # fmt: skip
