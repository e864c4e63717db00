"""What an administrator sets once: TOML files, and environment variables above them.

    # /etc/kvfs/kvfs.toml, then ~/.config/kvfs/kvfs.toml; KVFS_CONFIG names one file instead of both
    [open]
    cache_bytes = "1GiB"        # KVFS_OPEN_CACHE_BYTES=1GiB is above it

    [mount]
    allow_other = true

What a command line says is above all of it. FIELDS has every word that a file may use.
"""

import os
import tomllib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfs.errors import BadConfiguration
from kvfs.sizes import parse_size

SYSTEM_FILE = Path("/etc/kvfs/kvfs.toml")
VARIABLE_OF_FILE = "KVFS_CONFIG"
COLLECTIONS = ("greedy", "cost-benefit", "d-choices")
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _count(value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(number) is not int or number < 1:
        raise ValueError(f"{value!r} is not a whole number from 1 on")
    return number


def _place(value: Any) -> int:
    return 0 if value in (0, "0") and value is not False else _count(value)


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    raise ValueError(f"{value!r} is neither true nor false")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"{value!r} is not a text of one line")
    return value


def _address(value: Any) -> str:
    return _text(str(value) if type(value) is int else value)


def _one_of(*known: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}")
        return value

    return check


@dataclass(frozen=True)
class Field:
    """read: from what TOML or the environment has to the value, raising ValueError. default: None for what kvfs
    chooses by itself."""

    read: Callable[[Any], Any]
    default: Any
    meaning: str


FIELDS = {
    "open.cache_bytes": Field(parse_size, 256 << 20, "the drive's cache in memory"),
    "open.tail_bytes": Field(parse_size, 1 << 30, "host memory for tokens that are not on flash yet"),
    "open.writeback_tokens": Field(_count, None, "tokens that wait before they are written; a whole group"),
    "open.num_workers": Field(_count, None, "compute threads; one for each CPU"),
    "open.collection": Field(_one_of(*COLLECTIONS), "greedy", "how superblocks are chosen to be collected"),
    "open.evict_every_s": Field(_count, 10, "seconds between two looks of the background eviction"),
    "mount.allow_other": Field(_flag, False, "let users beside the one who mounts in"),
    "mount.read_only": Field(_flag, False, "let nobody write through a mount"),
    "mount.metrics": Field(_address, None, "port, or ADDRESS:PORT, of metrics and a status page; none"),
    "serve.listen": Field(_text, "127.0.0.1:4420", "where hosts reach a drive that is served"),
    "serve.worker": Field(_one_of("numba", "reference", "fpga"), "numba", "what computes attention"),
    "fpga.xclbin": Field(_text, None, "bitstream of a card; none, and the core is simulated"),
    "fpga.device": Field(_place, 0, "which card, as XRT counts them"),
    "fpga.lanes": Field(_count, None, "elements that the simulated core takes at once; 32"),
    "fpga.rows": Field(_count, None, "query rows that the simulated core takes at once; 8"),
    "fpga.fallback": Field(_flag, True, "have numba compute what the core cannot"),
}


def variable_of(name: str) -> str:
    return "KVFS_" + name.replace(".", "_").upper()


@dataclass(frozen=True)
class Setting:
    """source: the file or the variable that it is from; None for the default."""

    value: Any
    source: str | None


class Configuration:
    """settings: by name, such as "open.cache_bytes", all of FIELDS."""

    def __init__(self, settings: dict[str, Setting]):
        self.settings = settings

    def __getitem__(self, name: str) -> Any:
        return self.settings[name].value

    def given(self, section: str) -> dict[str, Any]:
        """What was set of a section, by names without it: of "open" keyword arguments for kvfs.open."""
        return {
            name.removeprefix(f"{section}."): setting.value
            for name, setting in self.settings.items()
            if name.startswith(f"{section}.") and setting.source is not None
        }


def export(
    configuration: Configuration, section: str, environment: MutableMapping[str, str] = os.environ
) -> None:
    """What was set of a section, into the environment: for layers below, which know no files."""
    for name, value in configuration.given(section).items():
        environment[variable_of(f"{section}.{name}")] = str(int(value) if isinstance(value, bool) else value)


def files(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where settings are looked for, the last above the first."""
    if VARIABLE_OF_FILE in environment:
        return [Path(environment[VARIABLE_OF_FILE])]
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(environment.get("HOME", "/"), ".config")
    return [SYSTEM_FILE, Path(home, "kvfs", "kvfs.toml")]


def load(environment: Mapping[str, str] = os.environ) -> Configuration:
    """Raises BadConfiguration with the file or variable, and the field."""
    settings = {name: Setting(field.default, None) for name, field in FIELDS.items()}
    for path in files(environment):
        settings |= _read_file(path, must_exist=VARIABLE_OF_FILE in environment)
    for name in FIELDS:
        variable = variable_of(name)
        if variable in environment:
            settings[name] = _read(variable, name, environment[variable])
    return Configuration(settings)


def _read_file(path: Path, must_exist: bool) -> dict[str, Setting]:
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if must_exist:
            raise BadConfiguration(path, None, f"no such file, though {VARIABLE_OF_FILE} names it") from error
        return {}
    except OSError as error:
        raise BadConfiguration(path, None, error.strerror or str(error)) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadConfiguration(path, None, f"not TOML: {error}") from error
    found = {}
    sections = {name.partition(".")[0] for name in FIELDS}
    for section, values in content.items():
        if section not in sections:
            raise BadConfiguration(path, section, f"no such section: there are {', '.join(sorted(sections))}")
        if not isinstance(values, dict):
            raise BadConfiguration(path, section, f"a section is written [{section}], with fields below it")
        for key, value in values.items():
            name = f"{section}.{key}"
            found[name] = _read(str(path), name, value)
    return found


def _read(source: str, name: str, value: Any) -> Setting:
    if name not in FIELDS:
        section = name.partition(".")[0]
        known = ", ".join(field.partition(".")[2] for field in FIELDS if field.startswith(f"{section}."))
        raise BadConfiguration(source, name, f"no such field: [{section}] has {known}")
    try:
        return Setting(FIELDS[name].read(value), source)
    except ValueError as error:
        raise BadConfiguration(source, name, str(error)) from error
