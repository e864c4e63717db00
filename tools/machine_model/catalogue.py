"""TOML files of machines, their parts and language models; see machines/ and models/ for how they look.

A machine names its GPU and drive by `file` and may override their numbers. Names are looked for beside the
machine's own file first, then among those shipped. All that is wrong raises BadMachine with file and field.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from kvfs.errors import InvalidArgument
from kvfs.layout import KvGeometry
from machine_model.language_model import LanguageModel
from machine_model.machine import PARTS, Machine, Part
from machine_model.quantities import COUNT, BadMachine, Number, read_number

HERE = Path(__file__).parent
MACHINES, MODELS = HERE / "machines", HERE / "models"
PLANES_MAX = 1 << 14
FOLDER_OF_PART = {"gpu": "gpus", "drive": "drives"}
_MODEL_WHOLE = (
    "layers",
    "query_heads",
    "kv_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
)
_MODEL_OPTIONAL = {"title", "dtype", "tied", "mlp_matrices"}


def machine_names() -> list[str]:
    return sorted(path.stem for path in MACHINES.glob("*.toml"))


def model_names() -> list[str]:
    return sorted(path.stem for path in MODELS.glob("*.toml"))


def load_machine(name: str | Path) -> Machine:
    """The machine of a file, or a shipped one by its name. Raises BadMachine."""
    path = _find(name, MACHINES, "machine", machine_names())
    table = _read(path)
    try:
        return _machine(path, table)
    except BadMachine as error:
        raise BadMachine(f"{path.name}: {error}") from error


def load_model(name: str | Path) -> LanguageModel:
    """The language model of a file, or a shipped one by its name. Raises BadMachine."""
    path = _find(name, MODELS, "model", model_names())
    table = _read(path)
    try:
        return _model(path.stem, table)
    except InvalidArgument as error:
        raise BadMachine(f"{path.name}: {error}") from error


def _find(name: str | Path, folder: Path, what: str, known: list[str]) -> Path:
    if str(name) in known:
        return folder / f"{name}.toml"
    path = Path(name)
    if path.suffix == ".toml":
        return path
    raise BadMachine(f"{what} {str(name)!r} is no .toml file and none of {', '.join(known)}")


def _read(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise BadMachine(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadMachine(f"{path} is no TOML: {error}") from error


def _machine(path: Path, table: dict) -> Machine:
    unknown = set(table) - {"title", "num_drives", *PARTS}
    if unknown:
        raise BadMachine(f"{', '.join(sorted(unknown))}: none of title, num_drives, {', '.join(PARTS)}")
    if "num_drives" not in table:
        raise BadMachine("num_drives is missing: a whole number without a unit, as 8")
    sources: dict[str, Number] = {}
    parts = {}
    for part, kind in PARTS.items():
        section = table.get(part)
        if not isinstance(section, Mapping):
            raise BadMachine(f"[{part}] is missing")
        parts[part] = _part(path, part, kind, dict(section), sources)
    drives = sources["num_drives"] = read_number("num_drives", COUNT, table["num_drives"])
    machine = Machine(
        path.stem, str(table.get("title", path.stem)), **parts, num_drives=int(drives.value), sources=sources
    )
    _check_together(machine)
    return machine


def _part(path: Path, part: str, kind: type[Part], section: dict, sources: dict[str, Number]) -> Part:
    name = section.pop("file", None)
    if name is not None:
        folder = FOLDER_OF_PART.get(part)
        if folder is None:
            raise BadMachine(f"{part}.file: only gpu and drive have files of their own")
        section = _read(_part_file(path, folder, str(name))) | section
    title = str(section.pop("title", name or part))
    units, values = kind.units(), {}
    unknown = set(section) - set(units)
    if unknown:
        raise BadMachine(f"{part}.{min(unknown)} is none of {', '.join(units)}")
    for field, unit in units.items():
        where = f"{part}.{field}"
        if field in section:
            found = read_number(where, unit, section[field])
            values[field], sources[where] = found.value, found
        elif field in kind.required():
            raise BadMachine(f"{where} is missing: {_expected(unit)}")
    return kind(title, **values)


def _part_file(machine: Path, folder: str, name: str) -> Path:
    for place in (machine.parent / folder, MACHINES / folder):
        if (found := place / f"{name}.toml").is_file():
            return found
    known = sorted(one.stem for one in (MACHINES / folder).glob("*.toml"))
    raise BadMachine(f"file = {name!r}: no such file in {folder}/; shipped are {', '.join(known)}")


def _expected(unit) -> str:
    return (
        f"in {unit.base}, as {unit.example!r}" if unit.base else f"a number without a unit, as {unit.example}"
    )


def _check_together(machine: Machine) -> None:
    """What no single number shows."""
    host, drive, gpu = machine.host, machine.drive, machine.gpu
    if host.free_bytes > host.memory_bytes:
        raise BadMachine("host.free_bytes is more than host.memory_bytes (B)")
    if host.attention_bandwidth > host.memory_bandwidth:
        raise BadMachine("host.attention_bandwidth is more than host.memory_bandwidth (B/s)")
    if machine.links.gpu > gpu.memory_bandwidth:
        raise BadMachine("links.gpu is more than gpu.memory_bandwidth (B/s)")
    for name in ("weights_bandwidth", "zero_bandwidth"):
        if getattr(machine.software, name) > machine.links.gpu:
            raise BadMachine(f"software.{name} is more than links.gpu (B/s)")
    planes = drive.channels * drive.dies_per_channel * drive.planes_per_die
    if planes > PLANES_MAX:
        raise BadMachine(f"drive: {planes:,} planes, channels x dies x planes, are more than {PLANES_MAX:,}")
    try:
        drive.geometry()
    except ValueError as error:
        raise BadMachine(f"drive: {error}") from error


def _model(name: str, table: dict) -> LanguageModel:
    unknown = set(table) - {*_MODEL_WHOLE, *_MODEL_OPTIONAL, "source"}
    if unknown:
        raise BadMachine(
            f"{min(unknown)} is none of {', '.join((*_MODEL_WHOLE, *sorted(_MODEL_OPTIONAL)))}, source"
        )
    whole = {}
    for field in _MODEL_WHOLE:
        if field not in table:
            raise BadMachine(f"{field} is missing: a whole number without a unit")
        whole[field] = COUNT.parse(field, table[field])
    source = table.get("source")
    if not isinstance(source, str) or not source.strip():
        raise BadMachine("source is missing: where the shape is from")
    matrices = table.get("mlp_matrices", 3)
    if matrices not in (2, 3):
        raise BadMachine(f"mlp_matrices is 2 or 3 (no unit), not {matrices!r}")
    dtype = table.get("dtype", "float16")
    if not isinstance(dtype, str):
        raise BadMachine(f'dtype is a name, as "float16", not {dtype!r}')
    geometry = KvGeometry(
        whole["layers"],
        whole["query_heads"],
        whole["kv_heads"],
        whole["head_dim"],
        dtype,
    )
    return LanguageModel(
        name,
        str(table.get("title", name)),
        geometry,
        whole["hidden_size"],
        whole["intermediate_size"],
        matrices,
        whole["vocab_size"],
        source,
        bool(table.get("tied", False)),
    )


__all__ = ["load_machine", "load_model", "machine_names", "model_names"]
