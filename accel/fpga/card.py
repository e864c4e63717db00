"""The core as a kernel that XRT runs on a card: it reads its job and the pages from the card's memory, and
writes the answer there.

Of a kind that XRT itself starts and waits for (ap_ctrl_hs), since XRT's Python interface reaches no others. The
memory's ports are AXI4 masters: one for the job and the answer, one for keys, one for values. FORMAT.md says
how a job lies in memory. A kernel that fails ends its run all the same: it lets all come in that it has asked
for, and says what went wrong.
"""

from amaranth.hdl import Cat, ClockDomain, ClockSignal, Const, Module, Mux, ResetInserter, ResetSignal, Signal
from amaranth.lib import wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from accel.fpga.arithmetic import BAD_COMMAND, BAD_LENGTH, Shape
from accel.fpga.card_format import ARGUMENTS, BUS_ERROR, ID, NAME, RECORD_BITS, VERSION
from accel.fpga.core import AttentionCore
from accel.fpga.data_mover import OKAY, BeatWriter, BurstReader

MASTERS = ("job", "keys", "values")  # the answer goes by the job's
CONTROL, FIRST_ARGUMENT = 0x00, 0x10  # byte addresses; two words an argument
START, DONE, IDLE, READY = 1, 2, 4, 8  # bits of the control register
SLAVE_ERROR = 2
INCREMENTING, MODIFIABLE = 1, 3  # AXI4's burst type, and cache bits


def _master_ports(name: str, bits: int) -> dict:
    """All channels, since tools know whole masters best: of keys and values none is ever written."""
    outputs = {"awaddr": 64, "awlen": 8, "awsize": 3, "awburst": 2, "awcache": 4, "awvalid": 1}
    outputs |= {"wdata": bits, "wstrb": bits // 8, "wlast": 1, "wvalid": 1, "bready": 1, "rready": 1}
    outputs |= {"araddr": 64, "arlen": 8, "arsize": 3, "arburst": 2, "arcache": 4, "arvalid": 1}
    inputs = {"awready": 1, "wready": 1, "bresp": 2, "bvalid": 1, "arready": 1}
    inputs |= {"rdata": bits, "rresp": 2, "rlast": 1, "rvalid": 1}
    ports = {port: Out(width) for port, width in outputs.items()}
    ports |= {port: In(width) for port, width in inputs.items()}
    return {f"m_axi_{name}_{port}": direction for port, direction in ports.items()}


def _control_ports() -> dict:
    inputs = {"awaddr": 12, "awvalid": 1, "wdata": 32, "wstrb": 4, "wvalid": 1, "bready": 1}
    inputs |= {"araddr": 12, "arvalid": 1, "rready": 1}
    outputs = {"awready": 1, "wready": 1, "bresp": 2, "bvalid": 1}
    outputs |= {"arready": 1, "rdata": 32, "rresp": 2, "rvalid": 1}
    ports = {port: In(width) for port, width in inputs.items()}
    ports |= {port: Out(width) for port, width in outputs.items()}
    return {f"s_axi_control_{port}": direction for port, direction in ports.items()}


def ports(shape: Shape) -> dict:
    """Of the kernel. Raises ValueError for a shape whose block records are larger than a beat."""
    if RECORD_BITS + shape.block_tokens > shape.beat_bits:
        most = shape.beat_bits - RECORD_BITS
        raise ValueError(f"block_tokens of a card's kernel of {shape.lanes} lanes: at most {most}")
    found = {"ap_clk": In(1), "ap_rst_n": In(1)} | _control_ports()
    for name in MASTERS:
        found |= _master_ports(name, shape.beat_bits)
    return found


class CardKernel(wiring.Component):
    """FORMAT.md says what it reads and writes."""

    def __init__(self, shape: Shape):
        self.shape = shape
        super().__init__(ports(shape))

    def elaborate(self, platform):
        m = Module()
        shape = self.shape
        m.domains.sync = ClockDomain()
        m.d.comb += [ClockSignal().eq(self.ap_clk), ResetSignal().eq(~self.ap_rst_n)]
        start, done = Signal(), Signal()
        arguments = self._control(m, start, done)

        flush, restart = Signal(), Signal()
        core = AttentionCore(shape)
        m.submodules.core = ResetInserter(restart)(core)
        readers = {}
        for name in MASTERS:
            m.submodules[f"{name}_reader"] = reader = readers[name] = BurstReader(shape.beat_bits)
            self._connect_reader(m, name, reader)
            m.d.comb += reader.flush.eq(flush)
        m.submodules.writer = writer = BeatWriter(shape.beat_bits)
        self._connect_writer(m, "job", writer)
        job = readers["job"]
        for name, port in (("keys", core.keys), ("values", core.values)):
            wiring.connect(m, readers[name].data, port)

        num_commands, num_blocks, seen = Signal(32), Signal(32), Signal(33)
        job_goes_on = Signal()
        self._route_job(m, restart, core, readers, arguments, num_commands, num_blocks, seen, job_goes_on)

        failed, bus_failed = Signal(), Signal()
        m.d.comb += bus_failed.eq(Cat(*(reader.failed for reader in readers.values()), writer.failed).any())
        m.d.comb += failed.eq((core.status & (BAD_COMMAND | BAD_LENGTH)).any() | bus_failed)
        status, cycles = Signal(32), Signal(32)
        is_idle = Cat(*(reader.idle for reader in readers.values()), writer.idle).all()
        facts = (ID, VERSION, shape.lanes, shape.rows, shape.max_beats, shape.block_tokens)
        m.d.sync += cycles.eq(cycles + 1)
        with m.FSM(name="run"):
            with m.State("IDLE"):
                m.d.sync += [status.eq(0), cycles.eq(0), seen.eq(0)]
                m.d.comb += [
                    job.requests.valid.eq(start & ~done),
                    job.requests.payload.address.eq(arguments["job"]),
                    job.requests.payload.beats.eq(1),
                ]
                with m.If(job.requests.valid & job.requests.ready):
                    m.next = "HEAD"
            with m.State("HEAD"):
                m.d.comb += [job.data.ready.eq(1), writer.move.eq(1)]
                m.d.comb += writer.to.eq(arguments["answer"] + shape.beat_bits // 8)
                head = [job.data.payload.data.word_select(n, 32) for n in range(2)]
                m.d.sync += [num_commands.eq(head[0]), num_blocks.eq(head[1])]
                with m.If(bus_failed):
                    m.d.sync += status.eq(BUS_ERROR)
                    m.next = "FLUSH"
                with m.Elif(job.data.valid):
                    m.next = "ASK"
                    with m.If((head[0] == 0) | (head[1] == 0)):
                        m.next = "FACTS"
            with m.State("ASK"):
                m.d.comb += [
                    job.requests.valid.eq(1),
                    job.requests.payload.address.eq(arguments["job"] + shape.beat_bits // 8),
                    job.requests.payload.beats.eq(num_commands + num_blocks),
                ]
                with m.If(job.requests.ready):
                    m.next = "COMPUTE"
            with m.State("COMPUTE"):
                m.d.comb += [
                    job_goes_on.eq(1),
                    writer.beats.valid.eq(core.answer.valid),
                    writer.beats.payload.eq(core.answer.payload),
                    core.answer.ready.eq(writer.beats.ready),
                ]
                with m.If(failed):
                    m.d.sync += status.eq(core.status | Mux(bus_failed, BUS_ERROR, 0))
                    m.next = "FLUSH"
                with m.Elif(core.answer.valid & core.answer.ready & core.answer.payload.last):
                    m.next = "FLUSH"
                    m.d.sync += status.eq(core.status)
            with m.State("FLUSH"):  # after a good run: until the answer is in memory
                m.d.comb += [flush.eq(1), writer.flush.eq(1)]
                with m.If(bus_failed):
                    m.d.sync += status.eq(status | BUS_ERROR)
                with m.If(is_idle):
                    m.next = "FACTS"
            with m.State("FACTS"):
                m.d.comb += [flush.eq(1), restart.eq(1)]
                m.d.comb += [writer.move.eq(1), writer.to.eq(arguments["answer"])]
                m.next = "SAY"
            with m.State("SAY"):
                words = Cat(*(Const(fact, 32) for fact in facts), status, cycles)
                m.d.comb += [writer.beats.valid.eq(1), writer.beats.payload.data.eq(words)]
                with m.If(writer.beats.ready):
                    m.next = "END"
            with m.State("END"), m.If(writer.idle):
                m.d.comb += done.eq(1)
                m.next = "IDLE"
        return m

    def _route_job(self, m, restart, core, readers, arguments, num_commands, num_blocks, seen, goes_on) -> None:
        """The command's beats to the core; of a block what it is to the core, where its rows are to the
        readers."""
        shape, job = self.shape, readers["job"]
        beat = job.data.payload.data
        record = beat.word_select(0, 64)
        is_command = seen < num_commands
        is_last_block = seen == num_commands + num_blocks - 1
        queues = {}
        for name in ("blocks", "keys", "values"):
            bits = 64 + shape.block_tokens if name == "blocks" else 80
            queue = SyncFIFOBuffered(width=bits, depth=16)
            m.submodules[f"{name}_queue"] = ResetInserter(restart)(queue)
            queues[name] = queue
        have_room = Cat(*(queue.w_rdy for queue in queues.values())).all()
        takes = Signal()
        m.d.comb += takes.eq(goes_on & job.data.valid & job.data.ready)
        with m.If(goes_on):
            m.d.comb += [
                core.command.valid.eq(job.data.valid & is_command),
                core.command.payload.data.eq(beat),
                core.command.payload.last.eq(seen == num_commands - 1),
                job.data.ready.eq(Mux(is_command, core.command.ready, have_room)),
            ]
        with m.If(takes):
            m.d.sync += seen.eq(seen + 1)
        rows = {"keys": (beat[64:112], beat[48:64]), "values": (beat[128:192], beat[112:128])}
        mask = beat[RECORD_BITS : RECORD_BITS + shape.block_tokens]
        m.d.comb += [queue.w_en.eq(takes & ~is_command) for queue in queues.values()]
        m.d.comb += queues["blocks"].w_data.eq(Cat(record[:48], is_last_block, Const(0, 15), mask))
        m.d.comb += [
            core.blocks.payload.as_value().eq(queues["blocks"].r_data),
            core.blocks.valid.eq(queues["blocks"].r_rdy),
            queues["blocks"].r_en.eq(core.blocks.ready),
        ]
        for name, (offset, num_beats) in rows.items():
            queue, requests = queues[name], readers[name].requests
            m.d.comb += [
                queue.w_data.eq(Cat(num_beats, offset)),
                requests.valid.eq(queue.r_rdy),
                requests.payload.address.eq(arguments[name] + queue.r_data[16:]),
                requests.payload.beats.eq(queue.r_data[:16]),
                queue.r_en.eq(requests.ready),
            ]

    def _port(self, name: str, port: str):
        return getattr(self, f"m_axi_{name}_{port}")

    def _connect_reader(self, m: Module, name: str, reader: BurstReader) -> None:
        size = (self.shape.beat_bits // 8 - 1).bit_length()
        ask, response = reader.address, reader.response
        m.d.comb += [
            self._port(name, "araddr").eq(ask.payload.address),
            self._port(name, "arlen").eq(ask.payload.length),
            self._port(name, "arsize").eq(size),
            self._port(name, "arburst").eq(INCREMENTING),
            self._port(name, "arcache").eq(MODIFIABLE),
            self._port(name, "arvalid").eq(ask.valid),
            ask.ready.eq(self._port(name, "arready")),
            response.payload.data.eq(self._port(name, "rdata")),
            response.payload.status.eq(self._port(name, "rresp")),
            response.payload.last.eq(self._port(name, "rlast")),
            response.valid.eq(self._port(name, "rvalid")),
            self._port(name, "rready").eq(response.ready),
        ]

    def _connect_writer(self, m: Module, name: str, writer: BeatWriter) -> None:
        beat_bytes = self.shape.beat_bits // 8
        m.d.comb += [
            self._port(name, "awaddr").eq(writer.address.payload.address),
            self._port(name, "awlen").eq(0),
            self._port(name, "awsize").eq((beat_bytes - 1).bit_length()),
            self._port(name, "awburst").eq(INCREMENTING),
            self._port(name, "awcache").eq(MODIFIABLE),
            self._port(name, "awvalid").eq(writer.address.valid),
            writer.address.ready.eq(self._port(name, "awready")),
            self._port(name, "wdata").eq(writer.data.payload),
            self._port(name, "wstrb").eq((1 << beat_bytes) - 1),
            self._port(name, "wlast").eq(1),
            self._port(name, "wvalid").eq(writer.data.valid),
            writer.data.ready.eq(self._port(name, "wready")),
            writer.response.payload.eq(self._port(name, "bresp")),
            writer.response.valid.eq(self._port(name, "bvalid")),
            self._port(name, "bready").eq(writer.response.ready),
        ]

    def _control(self, m: Module, start: Signal, done: Signal) -> dict[str, Signal]:
        """XRT's registers: control, three of interrupts that read as zero, then the arguments; by name."""
        arguments = {name: Signal(64, name=f"argument_{name}") for name in ARGUMENTS}
        was_done = Signal()  # until it is read
        control = Cat(start, was_done, ~start, was_done)
        words = {0x00: control, 0x04: Const(0, 32), 0x08: Const(0, 32), 0x0C: Const(0, 32)}
        for number, argument in enumerate(arguments.values()):
            words[FIRST_ARGUMENT + 8 * number] = argument[:32]
            words[FIRST_ARGUMENT + 8 * number + 4] = argument[32:]

        reads, writes = Signal(), Signal()
        m.d.comb += [
            reads.eq(self.s_axi_control_arvalid & ~self.s_axi_control_rvalid),
            self.s_axi_control_arready.eq(reads),
            writes.eq(self.s_axi_control_awvalid & self.s_axi_control_wvalid & ~self.s_axi_control_bvalid),
            self.s_axi_control_awready.eq(writes),
            self.s_axi_control_wready.eq(writes),
        ]
        with m.If(reads):
            m.d.sync += [
                self.s_axi_control_rvalid.eq(1),
                self.s_axi_control_rdata.eq(0),
                self.s_axi_control_rresp.eq(SLAVE_ERROR),
            ]
            for address, value in words.items():
                with m.If(self.s_axi_control_araddr == address):
                    m.d.sync += [self.s_axi_control_rdata.eq(value), self.s_axi_control_rresp.eq(OKAY)]
            with m.If(self.s_axi_control_araddr == CONTROL):
                m.d.sync += was_done.eq(0)
        with m.Elif(self.s_axi_control_rready):
            m.d.sync += self.s_axi_control_rvalid.eq(0)

        with m.If(writes):
            value = self.s_axi_control_wdata
            is_whole = self.s_axi_control_wstrb.all()
            m.d.sync += [self.s_axi_control_bvalid.eq(1), self.s_axi_control_bresp.eq(SLAVE_ERROR)]
            with m.If(is_whole):
                for address in words:
                    with m.If(self.s_axi_control_awaddr == address):
                        m.d.sync += self.s_axi_control_bresp.eq(OKAY)
                with m.If((self.s_axi_control_awaddr == CONTROL) & value[0]):
                    m.d.sync += start.eq(1)
                for number, argument in enumerate(arguments.values()):
                    for half in range(2):
                        with m.If(self.s_axi_control_awaddr == FIRST_ARGUMENT + 8 * number + 4 * half):
                            m.d.sync += argument.word_select(half, 32).eq(value)
        with m.Elif(self.s_axi_control_bready):
            m.d.sync += self.s_axi_control_bvalid.eq(0)

        with m.If(done):
            m.d.sync += [start.eq(0), was_done.eq(1)]
        return arguments


def to_verilog(shape: Shape) -> str:
    from amaranth.back import verilog

    return verilog.convert(CardKernel(shape), name=NAME, strip_internal_attrs=True, emit_src=False)
