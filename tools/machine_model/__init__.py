"""What a machine would give, before anyone buys it: see DESIGN.md."""

from machine_model.catalogue import load_machine, load_model, machine_names, model_names
from machine_model.machine import Machine
from machine_model.papers import PaperFigure, paper_figures
from machine_model.quantities import BadMachine, Number
from machine_model.result import CATEGORIES, Result, StepSample, Traffic
from machine_model.simulation import simulate, sweep
from machine_model.systems import SYSTEMS
from machine_model.workload import Workload

__all__ = [
    "CATEGORIES",
    "SYSTEMS",
    "BadMachine",
    "Machine",
    "Number",
    "PaperFigure",
    "Result",
    "StepSample",
    "Traffic",
    "Workload",
    "load_machine",
    "load_model",
    "machine_names",
    "model_names",
    "paper_figures",
    "simulate",
    "sweep",
]
