"""A whole run: measure, plan, and verify if asked to."""

from collections.abc import Callable
from pathlib import Path

from kvfs_bench.planner import measuring, model_probe, verification
from kvfs_bench.planner.planning import Plan, Request, make_plan
from kvfs_bench.planner.probe_drive import num_cpus
from kvfs_bench.planner.rates import Rates

Status = Callable[[str], None]


def measure(request: Request, places: list[Path], status: Status = lambda text: None) -> Rates:
    """All rates that a plan needs: of one drive with one and with all workers, of each larger set."""
    cpus = num_cpus()
    status("the model")
    model = model_probe.measure_model(request.shape, request.context, request.batch, places[0])
    status("memory")
    memory = measuring.memory_bandwidth()
    drives = []
    for count in range(1, request.num_drives + 1):
        workers = sorted({cpus, 1}, reverse=True) if count == 1 else [max(1, cpus // count)]
        drives += measuring.measure_drives(request, places, count, workers, status)
    return Rates(cpus, measuring.link_bandwidth(), memory, tuple(drives), model)


def plan(request: Request, places: list[Path], status: Status = lambda text: None) -> Plan:
    return make_plan(request, measure(request, places, status))


def verify(
    made: Plan, places: list[Path], everything: bool = False, status: Status = lambda text: None
) -> list[verification.Verification]:
    """Run what was chosen, dense and with its compression; everything: each candidate, dense."""
    wanted = [(candidate, None) for candidate in (made.candidates if everything else [made.chosen])]
    if made.compression is not None:
        wanted.append((made.chosen, made.compression))
    return [verification.verify(made, *what, places, status) for what in wanted]
