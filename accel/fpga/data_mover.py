"""Between a card's memory and the core's streams: AXI4 bursts that become beats, and beats that are written.

A reader asks only for what its buffer has room for, so that it never holds up the memory that it shares with
others: the core takes keys and values at different times, and two streams that wait for each other behind one
memory would stand still.
"""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from accel.fpga.core import beats

PAGE_BYTES = 4096  # no burst crosses such a boundary: a rule of AXI4
OKAY = 0

REQUEST = stream.Signature(data.StructLayout({"address": 64, "beats": 32}))
ADDRESS = stream.Signature(data.StructLayout({"address": 64, "length": 8}))  # length: beats - 1


class BurstReader(wiring.Component):
    """Runs of beats out of memory, one after the other, as one stream; `last` comes with the end of each.

    requests: a run of no beats is none; address, response: AXI4's AR and R; flush: take no requests, and drop
    what is still to come; idle: nothing is to come; failed: with a response that is not OKAY.
    """

    def __init__(self, beat_bits: int, buffer_beats: int = 512):
        """buffer_beats: what may be under way at once, so it hides as many cycles of latency."""
        self.beat_bits, self.buffer_beats = beat_bits, buffer_beats
        response = data.StructLayout({"data": beat_bits, "status": 2, "last": 1})
        super().__init__(
            {
                "requests": In(REQUEST),
                "data": Out(beats(beat_bits)),
                "address": Out(ADDRESS),
                "response": In(stream.Signature(response)),
                "flush": In(1),
                "idle": Out(1),
                "failed": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        beat_bytes = self.beat_bits // 8
        page_beats = PAGE_BYTES // beat_bytes
        m.submodules.buffer = buffer = SyncFIFOBuffered(width=self.beat_bits + 1, depth=self.buffer_beats)
        m.submodules.ends = ends = SyncFIFOBuffered(width=1, depth=16)  # of each burst: whether its run ends
        address, left = Signal(64), Signal(32)
        length = Signal(range(page_beats + 1))
        reserved = Signal(range(self.buffer_beats + 1))  # beats in the buffer, or asked for
        asks = Signal()
        m.d.comb += [
            self.address.payload.address.eq(address),
            self.address.payload.length.eq(length - 1),
            ends.w_data.eq(left == length),
            ends.w_en.eq(asks),
        ]
        request = self.requests.payload
        in_page = address[(beat_bytes - 1).bit_length() : (PAGE_BYTES - 1).bit_length()]
        with m.FSM(name="burst") as steps:
            m.d.comb += self.idle.eq(steps.ongoing("IDLE") & (reserved == 0))
            with m.State("IDLE"):
                m.d.comb += self.requests.ready.eq(~self.flush)
                m.d.sync += [address.eq(request.address), left.eq(request.beats)]
                with m.If(self.requests.valid & ~self.flush & request.beats.any()):
                    m.next = "CUT"
            with m.State("CUT"):
                room = page_beats - in_page
                m.d.sync += length.eq(Mux(left < room, left, room))
                m.next = "WAIT"
            with m.State("WAIT"):
                with m.If(self.flush):
                    m.next = "IDLE"
                with m.Elif((reserved + length <= self.buffer_beats) & ends.w_rdy):
                    m.d.comb += asks.eq(1)
                    m.d.sync += left.eq(left - length)
                    m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += self.address.valid.eq(1)
                with m.If(self.address.ready):
                    m.d.sync += address.eq(address + length * beat_bytes)
                    m.next = "CUT"
                    with m.If(self.flush | (left == 0)):
                        m.next = "IDLE"
        response = self.response.payload
        comes = self.response.valid
        m.d.comb += [
            self.response.ready.eq(1),
            self.failed.eq(comes & (response.status != OKAY)),
            buffer.w_en.eq(comes),
            buffer.w_data.eq(Cat(response.data, response.last & ends.r_data)),
            ends.r_en.eq(comes & response.last),
            self.data.valid.eq(buffer.r_rdy & ~self.flush),
            self.data.payload.eq(buffer.r_data),
            buffer.r_en.eq(self.flush | self.data.ready),
        ]
        leaves = buffer.r_rdy & buffer.r_en
        m.d.sync += reserved.eq(reserved + Mux(asks, length, 0) - leaves)
        return m


class BeatWriter(wiring.Component):
    """Beats into memory, from an address on, each a burst of its own: answers are short beside pages.

    move: what comes next goes to `to`; address, data, response: AXI4's AW, W and B; flush: take nothing; idle:
    all that was taken is in memory; failed: with a response that is not OKAY.
    """

    MOST_UNDER_WAY = 31

    def __init__(self, beat_bits: int):
        self.beat_bits = beat_bits
        super().__init__(
            {
                "beats": In(beats(beat_bits)),
                "move": In(1),
                "to": In(64),
                "address": Out(ADDRESS),
                "data": Out(stream.Signature(beat_bits)),
                "response": In(stream.Signature(2)),
                "flush": In(1),
                "idle": Out(1),
                "failed": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        place, now = Signal(64), Signal(64)  # of the next beat, of the one at hand
        beat, has_beat = Signal(self.beat_bits), Signal()
        address_sent, data_sent = Signal(), Signal()
        under_way = Signal(range(self.MOST_UNDER_WAY + 1))
        m.d.comb += [
            self.address.payload.address.eq(now),
            self.address.valid.eq(has_beat & ~address_sent),
            self.data.payload.eq(beat),
            self.data.valid.eq(has_beat & ~data_sent),
            self.response.ready.eq(1),
            self.failed.eq(self.response.valid & (self.response.payload != OKAY)),
            self.idle.eq(~has_beat & (under_way == 0)),
        ]
        address_done = address_sent | self.address.ready
        data_done = data_sent | self.data.ready
        leaves, takes = Signal(), Signal()
        m.d.comb += [
            leaves.eq(has_beat & address_done & data_done),
            self.beats.ready.eq((~has_beat | leaves) & ~self.flush & (under_way != self.MOST_UNDER_WAY)),
            takes.eq(self.beats.valid & self.beats.ready),
        ]
        m.d.sync += [
            address_sent.eq(has_beat & address_done & ~leaves),
            data_sent.eq(has_beat & data_done & ~leaves),
            under_way.eq(under_way + takes - self.response.valid),
        ]
        with m.If(takes):
            m.d.sync += [
                has_beat.eq(1),
                beat.eq(self.beats.payload.data),
                now.eq(place),
                place.eq(place + self.beat_bits // 8),
            ]
        with m.Elif(leaves):
            m.d.sync += has_beat.eq(0)
        with m.If(self.move):
            m.d.sync += place.eq(self.to)
        return m
