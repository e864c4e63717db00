"""What tokens cost, and how long the flash lasts, by what the model says of a machine under a steady load."""

from dataclasses import asdict, dataclass

from machine_model.machine import Machine
from machine_model.quantities import BadMachine
from machine_model.result import Result
from machine_model.systems import SYSTEMS

YEAR = 365.25 * 86400
JOULES_PER_KWH = 3.6e6
MILLION = 1e6


@dataclass(frozen=True)
class Use:
    """years: over which the machine is paid off; load: the share of the time that it decodes; usd_per_kwh: of
    power, cooling included"""

    years: float = 3.0
    load: float = 0.5
    usd_per_kwh: float = 0.15

    def __post_init__(self):
        for name, low, high in (("years", 0.1, 30), ("load", 0.001, 1), ("usd_per_kwh", 0, 10)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise BadMachine(f"{name} is {low} to {high}, not {value!r}")


@dataclass(frozen=True)
class Economics:
    """unknown: the machine's numbers that are missing; what needs them is None.

    machine_usd: GPUs, host and drives; watts: while it decodes
    usd_per_million: of tokens generated, power and a share of the machine
    joules_per_token: at those watts
    written_per_day: bytes that the host writes to all drives
    endurance_years: until the flash has its rated cycles; None where nothing is written, or the FTL is not
        kvfs's
    """

    unknown: tuple[str, ...]
    machine_usd: float | None
    watts: float | None
    usd_per_million: float | None
    joules_per_token: float | None
    written_per_day: float | None
    endurance_years: float | None

    def as_dict(self) -> dict:
        return asdict(self)


def economics(machine: Machine, result: Result, use: Use | None = None) -> Economics:
    """Of one result; drives count where the system uses them."""
    use = use or Use()
    parts = [("gpu", machine.gpu.count), ("host", 1), ("drive", _drives(result))]
    parts = [(name, count) for name, count in parts if count]
    usd, no_price = _sum(machine, parts, "price_usd")
    watts, no_watts = _sum(machine, parts, "watts")
    rate = result.tokens_per_second
    if not result.fits or not rate:
        return Economics((*no_price, *no_watts), usd, watts, None, None, None, None)
    per_token = watts / rate if watts is not None else None
    cost = None
    if usd is not None and per_token is not None:
        tokens = use.years * YEAR * use.load * rate
        cost = MILLION * (usd / tokens + per_token / JOULES_PER_KWH * use.usd_per_kwh)
    written = result.bytes.flash_written_per_token * rate * use.load
    years = None
    if written and result.waf is not None:
        drive = machine.drive
        wears_out = result.num_drives * drive.capacity_bytes * (1 + drive.spare_share) * drive.rated_cycles
        years = wears_out / (written * result.waf) / YEAR
    return Economics((*no_price, *no_watts), usd, watts, cost, per_token, written * 86400, years)


def _drives(result: Result) -> int:
    return result.num_drives if SYSTEMS[result.system].needs_drive else 0


def _sum(machine: Machine, parts: list[tuple[str, int]], name: str) -> tuple[float | None, list[str]]:
    values = {f"{part}.{name}": (getattr(getattr(machine, part), name), count) for part, count in parts}
    missing = [path for path, (value, _) in values.items() if value is None]
    return None if missing else sum(value * count for value, count in values.values()), missing
