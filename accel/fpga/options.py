"""What the FPGA worker is told, by the environment: KVFS_FPGA_ and a field's name in capitals.

kvfs.toml's section [fpga] has the same fields; kvfsctl puts them into the environment.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from accel.fpga.arithmetic import Shape

PREFIX = "KVFS_FPGA_"
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Options:
    """lanes, rows: of the simulated core; xclbin: a bitstream, for a real card instead, and device: which;
    fallback: whether numba computes what the core cannot."""

    lanes: int | None = None
    rows: int | None = None
    xclbin: str = ""
    device: int = 0
    fallback: bool = True

    @property
    def shape(self) -> Shape:
        """Of the simulated core. Raises ValueError."""
        default = Shape()
        return Shape(lanes=self.lanes or default.lanes, rows=self.rows or default.rows)


def read_options(environment: Mapping[str, str]) -> Options:
    """Raises ValueError naming the variable."""
    given = {name: environment.get(PREFIX + name.upper()) for name in Options.__dataclass_fields__}
    values: dict = {}
    for name, text in given.items():
        if text is None:
            continue
        if name == "xclbin":
            values[name] = text
        elif name == "fallback":
            if text.lower() not in _FLAGS:
                raise ValueError(f"{PREFIX}FALLBACK is 0 or 1, not {text!r}")
            values[name] = _FLAGS[text.lower()]
        else:
            least = 0 if name == "device" else 1
            if not text.isdecimal() or int(text) < least:
                raise ValueError(f"{PREFIX}{name.upper()} is a whole number from {least} on, not {text!r}")
            values[name] = int(text)
    options = Options(**values)
    _ = options.shape
    return options
