"""The core with the names and buses that FPGA tools know: AXI4-Stream for data, AXI4-Lite for status and reset.

`python -m accel.fpga.kernel --rows 8 > kvfs_attention.v` writes the Verilog for Vitis, Vivado, yosys or a
simulator.
"""

from amaranth.hdl import Array, Const, Module, Mux, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from accel.fpga.arithmetic import Shape
from accel.fpga.card_format import ID, VERSION
from accel.fpga.core import AttentionCore

NAME = "kvfs_attention"
REGISTERS = (
    "id",
    "version",
    "lanes",
    "rows",
    "max_beats",
    "block_tokens",
    "state",
    "units",
    "cycles_low",
    "cycles_high",
)
CONTROL = 4 * 16  # write 1: reset, whatever was under way
INPUTS, OUTPUT = ("command", "blocks", "keys", "values"), "answer"
OKAY, SLAVE_ERROR = 0, 2


def register_address(name: str) -> int:
    return 4 * REGISTERS.index(name)


def _ports(shape: Shape) -> dict:
    ports = {}
    for name in INPUTS:
        bits = 64 + shape.block_tokens if name == "blocks" else shape.beat_bits
        ports |= {f"s_axis_{name}_tdata": In(bits), f"s_axis_{name}_tlast": In(1)}
        ports |= {f"s_axis_{name}_tvalid": In(1), f"s_axis_{name}_tready": Out(1)}
    ports |= {"m_axis_answer_tdata": Out(shape.beat_bits), "m_axis_answer_tlast": Out(1)}
    ports |= {"m_axis_answer_tvalid": Out(1), "m_axis_answer_tready": In(1)}
    ports |= {"s_axi_awaddr": In(8), "s_axi_awvalid": In(1), "s_axi_awready": Out(1)}
    ports |= {"s_axi_wdata": In(32), "s_axi_wstrb": In(4), "s_axi_wvalid": In(1), "s_axi_wready": Out(1)}
    ports |= {"s_axi_bresp": Out(2), "s_axi_bvalid": Out(1), "s_axi_bready": In(1)}
    ports |= {"s_axi_araddr": In(8), "s_axi_arvalid": In(1), "s_axi_arready": Out(1)}
    ports |= {"s_axi_rdata": Out(32), "s_axi_rresp": Out(2), "s_axi_rvalid": Out(1), "s_axi_rready": In(1)}
    ports |= {"status": Out(8)}
    return ports


class AttentionKernel(wiring.Component):
    """See FORMAT.md for streams and registers. state: status bits, and bit 8 while a unit is under way;
    the port `status` has the bits, too, for an interrupt."""

    def __init__(self, shape: Shape):
        self.shape = shape
        super().__init__(_ports(shape))

    def elaborate(self, platform):
        m = Module()
        core, reset = AttentionCore(self.shape), Signal()
        m.submodules.core = ResetInserter(reset)(core)
        for name in INPUTS:
            port = getattr(core, name)
            m.d.comb += [
                port.valid.eq(getattr(self, f"s_axis_{name}_tvalid")),
                getattr(self, f"s_axis_{name}_tready").eq(port.ready),
            ]
            data = getattr(self, f"s_axis_{name}_tdata")
            if name == "blocks":
                m.d.comb += port.payload.as_value().eq(data)
            else:
                m.d.comb += [
                    port.payload.data.eq(data),
                    port.payload.last.eq(getattr(self, f"s_axis_{name}_tlast")),
                ]
        m.d.comb += [
            self.m_axis_answer_tdata.eq(core.answer.payload.data),
            self.m_axis_answer_tlast.eq(core.answer.payload.last),
            self.m_axis_answer_tvalid.eq(core.answer.valid),
            core.answer.ready.eq(self.m_axis_answer_tready),
        ]
        m.d.comb += self.status.eq(core.status)
        self._read_registers(m, core)
        self._write_control(m, reset)
        return m

    def _read_registers(self, m: Module, core: AttentionCore) -> None:
        shape = self.shape
        values = Array(Signal(32, name=f"register_{name}") for name in REGISTERS)
        facts = (ID, VERSION, shape.lanes, shape.rows, shape.max_beats, shape.block_tokens)
        now = [*(Const(fact, 32) for fact in facts), core.status | (core.busy << 8), core.units]
        now += [core.cycles[:32], core.cycles[32:]]
        m.d.comb += [value.eq(fact) for value, fact in zip(values, now, strict=True)]
        m.d.comb += self.s_axi_arready.eq(~self.s_axi_rvalid)
        index = self.s_axi_araddr[2:]
        with m.If(self.s_axi_arvalid & self.s_axi_arready):
            is_known = index < len(REGISTERS)
            m.d.sync += [
                self.s_axi_rvalid.eq(1),
                self.s_axi_rdata.eq(Mux(is_known, values[index], 0)),
                self.s_axi_rresp.eq(Mux(is_known, OKAY, SLAVE_ERROR)),
            ]
        with m.Elif(self.s_axi_rready):
            m.d.sync += self.s_axi_rvalid.eq(0)

    def _write_control(self, m: Module, reset: Signal) -> None:
        takes = Signal()
        m.d.comb += [
            takes.eq(self.s_axi_awvalid & self.s_axi_wvalid & ~self.s_axi_bvalid),
            self.s_axi_awready.eq(takes),
            self.s_axi_wready.eq(takes),
        ]
        m.d.sync += reset.eq(0)
        with m.If(takes):
            is_control = self.s_axi_awaddr == CONTROL
            m.d.sync += [
                self.s_axi_bvalid.eq(1),
                self.s_axi_bresp.eq(Mux(is_control, OKAY, SLAVE_ERROR)),
                reset.eq(is_control & self.s_axi_wdata[0] & self.s_axi_wstrb[0]),
            ]
        with m.Elif(self.s_axi_bready):
            m.d.sync += self.s_axi_bvalid.eq(0)


def to_verilog(shape: Shape) -> str:
    from amaranth.back import verilog

    return verilog.convert(AttentionKernel(shape), name=NAME, strip_internal_attrs=True, emit_src=False)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field, value in vars(Shape()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=value)
    print(to_verilog(Shape(**vars(parser.parse_args()))))
