"""The systems that are modelled, by name."""

from machine_model.systems.baselines import DeepSpeedDram, FlexGenDram, FlexGenSsd, GpuResident
from machine_model.systems.near_data import Dense, Immediate, Sketch, Sparf, SparfIdeal, XCache
from machine_model.systems.system import System

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        GpuResident(),
        FlexGenSsd(),
        FlexGenDram(),
        DeepSpeedDram(),
        Dense(),
        Immediate(),
        Sketch(),
        Sparf(),
        SparfIdeal(),
        XCache(),
    )
}
