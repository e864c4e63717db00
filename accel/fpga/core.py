"""The attention core: command, keys and values come as streams, partial attention of one unit goes out as one.

Streams are AXI4-Stream (TVALID, TREADY, TDATA, TLAST), one beat wide. FORMAT.md says what is in them. A unit's
blocks go through the score unit, banks of scores, and the value unit, so that both compute at once, each a beat
a cycle. A unit over channels has weights instead of keys, which go into the banks as they are.
"""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from accel.fpga.arithmetic import (
    ANSWER_BITS,
    BAD_COMMAND,
    BAD_LENGTH,
    BANKS,
    CHANNEL_SCORE_BITS,
    CHANNEL_WEIGHT_BITS,
    CHANNELS,
    MAX_BITS,
    NO_MAX,
    NOT_FINITE,
    QUERY_BITS,
    SATURATED,
    SCORE_BITS,
    SHIFT_LIMIT,
    SUM_BITS,
    Shape,
)
from accel.fpga.lanes import larger
from accel.fpga.score_unit import ScoreUnit
from accel.fpga.value_unit import ValueUnit

WORD_BITS = 32


def beats(bits: int) -> stream.Signature:
    return stream.Signature(data.StructLayout({"data": bits, "last": 1}))


class AttentionCore(wiring.Component):
    """status: bits of arithmetic.py, of the unit under way or ended last; busy: between a command and its
    answer."""

    def __init__(self, shape: Shape):
        self.shape = shape
        block = data.StructLayout({"position": 32, "tokens": 16, "last": 16, "mask": shape.block_tokens})
        super().__init__(
            {
                "command": In(beats(shape.beat_bits)),
                "blocks": In(stream.Signature(block)),
                "keys": In(beats(shape.beat_bits)),
                "values": In(beats(shape.beat_bits)),
                "answer": Out(beats(shape.beat_bits)),
                "status": Out(8),
                "busy": Out(1),
                "units": Out(32),
                "cycles": Out(64),
            }
        )

    def elaborate(self, platform):
        m = Module()
        shape, rows = self.shape, self.shape.rows
        m.submodules.score = score = ScoreUnit(shape)
        m.submodules.value = value = ValueUnit(shape)
        num_beats = Signal(range(shape.max_beats + 1))
        dtype, channels = Signal(), Signal()
        m.d.comb += [score.dtype.eq(dtype), value.dtype.eq(dtype), value.channels.eq(channels)]
        is_open, has_failed = Signal(), Signal()  # a unit's blocks may come; it cannot go on
        all_blocks_in, all_blocks_out = Signal(), Signal()
        answer_done = Signal()
        status = Signal(8)
        m.d.comb += [self.status.eq(status), has_failed.eq((status & (BAD_LENGTH | BAD_COMMAND)).any())]
        m.d.sync += status.eq(
            status
            | Mux(score.not_finite | value.not_finite, NOT_FINITE, 0)
            | Mux(score.saturated, SATURATED, 0)
        )
        m.d.sync += self.cycles.eq(self.cycles + self.busy)
        self._take_command(m, score, num_beats, dtype, channels, is_open, status, has_failed, answer_done)

        # the banks between both units
        width = rows * (SCORE_BITS + 1)
        m.submodules.banks = banks = Memory(shape=width, depth=BANKS * shape.block_tokens, init=[])
        write, read = banks.write_port(), banks.read_port(domain="sync")
        is_taken, is_full = Signal(BANKS), Signal(BANKS)  # a bank has a block under way; all its scores
        block_tokens = Array(Signal(16, name=f"tokens_{n}") for n in range(BANKS))
        block_is_last = Array(Signal(name=f"is_last_{n}") for n in range(BANKS))
        above = [
            Array(Signal(signed(MAX_BITS), name=f"above_{n}_{r}") for n in range(BANKS)) for r in range(rows)
        ]
        freed = Signal()
        value_bank = Signal(range(BANKS))

        # keys
        key_bank, key_active = Signal(range(BANKS)), Signal()
        token, beat = Signal(range(shape.block_tokens)), Signal(range(shape.max_beats))
        position, mask = Signal(32), Signal(shape.block_tokens)
        tokens, is_last_block = Signal(16), Signal()
        can_begin = Signal()
        ends = Signal()  # with the beat that comes now the block ends
        new_bank = Signal(range(BANKS))
        m.d.comb += [
            new_bank.eq(key_bank + key_active),
            can_begin.eq(
                is_open
                & ~has_failed
                & ~all_blocks_in
                & (~key_active | ends)
                & ~is_taken.bit_select(new_bank, 1)
            ),
        ]
        takes_key = self.keys.valid & self.keys.ready
        last_beat, last_token = channels | (beat == num_beats - 1), token == tokens - 1
        m.d.comb += [
            self.keys.ready.eq(key_active & ~has_failed),
            ends.eq(takes_key & last_beat & last_token),
            score.valid.eq(takes_key & ~channels),
            score.data.eq(self.keys.payload.data),
            score.beat.eq(beat),
            score.is_last_beat.eq(last_beat),
            score.is_last_token.eq(last_token),
            score.token.eq(token),
            score.bank.eq(key_bank),
            score.position.eq(position),
            score.is_chosen.eq(mask[0]),
        ]
        with m.If(takes_key):
            m.d.sync += beat.eq(Mux(last_beat, 0, beat + 1))
            with m.If(last_beat):
                m.d.sync += [token.eq(token + 1), position.eq(position + 1), mask.eq(mask >> 1)]
            with m.If(self.keys.payload.last != (last_beat & last_token)):
                m.d.sync += status.eq(status | BAD_LENGTH)
        with m.If(ends):
            m.d.sync += [key_active.eq(0), key_bank.eq(key_bank + 1), all_blocks_in.eq(is_last_block)]
        begins = self.blocks.valid & self.blocks.ready & ~(ends & is_last_block)
        m.d.comb += self.blocks.ready.eq(can_begin & ~(ends & is_last_block))
        with m.If(begins):
            block = self.blocks.payload
            m.d.sync += [
                key_active.eq(1),
                token.eq(0),
                position.eq(block.position),
                mask.eq(block.mask),
                tokens.eq(block.tokens),
                is_last_block.eq(block.last[0]),
                block_tokens[new_bank].eq(block.tokens),
                block_is_last[new_bank].eq(block.last[0]),
            ]
            with m.If((block.tokens == 0) | (block.tokens > shape.block_tokens)):
                m.d.sync += status.eq(status | BAD_COMMAND)
        with m.If(score.block_done):
            for r in range(rows):
                m.d.sync += above[r][score.write_bank].eq(score.above[r])
        is_filled, filled_bank = Signal(), Signal(range(BANKS))
        with m.If(channels):
            words = [self.keys.payload.data.word_select(r, WORD_BITS) for r in range(rows)]
            weights = [_widened(word[:CHANNEL_WEIGHT_BITS], SCORE_BITS) for word in words]
            m.d.comb += [
                write.en.eq(takes_key),
                write.addr.eq(Cat(token, key_bank)),
                write.data.eq(Cat(*weights, mask[0].replicate(rows))),
                is_filled.eq(ends),
                filled_bank.eq(key_bank),
            ]
        with m.Else():
            m.d.comb += [
                write.en.eq(score.write),
                write.addr.eq(Cat(score.write_token, score.write_bank)),
                write.data.eq(Cat(*score.scores, score.visible)),
                is_filled.eq(score.block_done),
                filled_bank.eq(score.write_bank),
            ]

        # values: the block after the one under way is made ready ahead
        maxima = [Signal(signed(MAX_BITS), name=f"maximum_{r}", init=NO_MAX) for r in range(rows)]
        next_ready, next_bank = Signal(), Signal(range(BANKS))
        next_down = [Signal(range(SHIFT_LIMIT + 1), name=f"next_down_{r}") for r in range(rows)]
        now_maxima = [Signal(signed(MAX_BITS), name=f"now_maximum_{r}") for r in range(rows)]
        now_down = [Signal(range(SHIFT_LIMIT + 1), name=f"now_down_{r}") for r in range(rows)]
        now_tokens, now_is_last, value_active = Signal(16), Signal(), Signal()
        value_token, value_beat = Signal(range(shape.block_tokens)), Signal(range(shape.max_beats))
        is_first_of_unit = Signal(init=1)
        value_last_beat, value_last_token = value_beat == num_beats - 1, value_token == now_tokens - 1
        takes_value = self.values.valid & self.values.ready
        value_ends = Signal()
        m.d.comb += [
            self.values.ready.eq(value_active & ~has_failed),
            value_ends.eq(takes_value & value_last_beat & value_last_token),
            freed.eq(value_ends),
        ]
        starts = Signal()
        m.d.comb += starts.eq(next_ready & (~value_active | value_ends))
        # in three steps, since each compares or subtracts
        candidates = [Signal(signed(MAX_BITS), name=f"candidate_{r}") for r in range(rows)]
        rises = [Signal(signed(MAX_BITS + 1), name=f"rise_{r}") for r in range(rows)]
        steps, is_first_seen = Signal(2), Signal(rows)
        makes_ready = ~next_ready & is_full.bit_select(next_bank, 1)
        m.d.sync += steps.eq(Mux(makes_ready, Cat(~steps.any(), steps[0]), 0))
        m.d.sync += next_ready.eq((next_ready | steps[1]) & ~starts)
        for r in range(rows):
            m.d.sync += candidates[r].eq(above[r][next_bank])
            with m.If(steps[0] & ~channels):
                top = larger(candidates[r], maxima[r])
                m.d.sync += [
                    maxima[r].eq(top),
                    rises[r].eq(candidates[r] - maxima[r]),
                    is_first_seen[r].eq(maxima[r] == NO_MAX),
                ]
            with m.If(steps[1]):
                limited = Mux(rises[r] > SHIFT_LIMIT, SHIFT_LIMIT, rises[r])
                m.d.sync += next_down[r].eq(Mux(channels | is_first_seen[r] | (rises[r] < 0), 0, limited))
        with m.If(starts):
            m.d.sync += [
                next_bank.eq(next_bank + 1),
                value_bank.eq(next_bank),
                value_active.eq(1),
                value_token.eq(0),
                now_tokens.eq(block_tokens[next_bank]),
                now_is_last.eq(block_is_last[next_bank]),
            ]
            for r in range(rows):
                m.d.sync += [now_maxima[r].eq(maxima[r]), now_down[r].eq(next_down[r])]
        with m.Elif(value_ends):
            m.d.sync += value_active.eq(0)
        with m.If(takes_value):
            m.d.sync += value_beat.eq(Mux(value_last_beat, 0, value_beat + 1))
            with m.If(value_last_beat):
                m.d.sync += is_first_of_unit.eq(0)
                with m.If(~value_ends):
                    m.d.sync += value_token.eq(value_token + 1)
            with m.If(self.values.payload.last != (value_last_beat & value_last_token)):
                m.d.sync += status.eq(status | BAD_LENGTH)
        with m.If(value_ends & now_is_last):
            m.d.sync += all_blocks_out.eq(1)
        m.d.comb += [
            read.addr.eq(Cat(value_token, value_bank)),
            value.valid.eq(takes_value),
            value.data.eq(self.values.payload.data),
            value.beat.eq(value_beat),
            value.is_first_of_block.eq(value_token == 0),
            value.is_first_of_unit.eq(is_first_of_unit),
            value.visible.eq(read.data[rows * SCORE_BITS :]),
        ]
        for r in range(rows):
            m.d.comb += [
                value.scores[r].eq(read.data.word_select(r, SCORE_BITS).as_signed()),
                value.maxima[r].eq(now_maxima[r]),
                value.down[r].eq(now_down[r]),
            ]
        for n in range(BANKS):
            with m.If(begins & (new_bank == n)):
                m.d.sync += is_taken[n].eq(1)
            with m.Elif(freed & (value_bank == n)):
                m.d.sync += [is_taken[n].eq(0), is_full[n].eq(0)]
            with m.If(is_filled & (filled_bank == n)):
                m.d.sync += is_full[n].eq(1)

        self._answer(m, value, maxima, num_beats, channels, status, all_blocks_out, answer_done)
        with m.If(answer_done):
            m.d.sync += [
                is_open.eq(0),
                all_blocks_in.eq(0),
                all_blocks_out.eq(0),
                is_first_of_unit.eq(1),
                self.units.eq(self.units + 1),
            ]
            m.d.sync += [maximum.eq(NO_MAX) for maximum in maxima]
        return m

    def _take_command(self, m, score, num_beats, dtype, channels, is_open, status, has_failed, answer_done):
        """Head; rows, several a beat; queries, two beats for a beat's worth of lanes. Of channels, the head."""
        shape = self.shape
        words = shape.beat_bits // WORD_BITS
        rows_a_beat = words // 4
        payload = self.command.payload
        word = [payload.data.word_select(n, WORD_BITS) for n in range(words)]
        row, part, half = Signal(range(shape.rows + 1)), Signal(range(shape.max_beats)), Signal()
        first_half = Signal(words * QUERY_BITS)
        packed = Cat(each[:QUERY_BITS] for each in word)
        takes = self.command.valid & self.command.ready
        with m.FSM(name="command") as steps:
            m.d.comb += self.busy.eq(~steps.ongoing("HEAD"))
            with m.State("HEAD"):
                m.d.comb += self.command.ready.eq(~has_failed)
                with m.If(takes):
                    m.d.sync += [
                        dtype.eq(word[0][0]),
                        num_beats.eq(word[1]),
                        channels.eq(word[2] == CHANNELS),
                        status.eq(0),
                        row.eq(0),
                        part.eq(0),
                        half.eq(0),
                    ]
                    is_bad = (word[0] > 1) | (word[1] == 0) | (word[1] > shape.max_beats) | (word[2] > 1)
                    with m.If(is_bad):
                        m.d.sync += status.eq(BAD_COMMAND)
                    with m.Elif(payload.last != (word[2] == CHANNELS)):
                        m.d.sync += status.eq(BAD_LENGTH)
                    with m.If(payload.last):
                        m.d.sync += is_open.eq(1)
                        m.next = "COMPUTE"
                    with m.Else():
                        m.next = "ROWS"
            with m.State("ROWS"):
                m.d.comb += self.command.ready.eq(~has_failed)
                with m.If(takes):
                    for r in range(shape.rows):
                        with m.If(row == r // rows_a_beat * rows_a_beat):
                            start, stop, exponent = word[r % rows_a_beat * 4 :][:3]
                            m.d.sync += [
                                score.starts[r].eq(start),
                                score.stops[r].eq(stop),
                                score.exponents[r].eq(exponent),
                            ]
                    m.d.sync += row.eq(row + rows_a_beat)
                    with m.If(payload.last):
                        m.d.sync += status.eq(BAD_LENGTH)
                    with m.If(row + rows_a_beat >= shape.rows):
                        m.d.sync += row.eq(0)
                        m.next = "QUERIES"
            with m.State("QUERIES"):
                m.d.comb += self.command.ready.eq(~has_failed)
                m.d.comb += [
                    score.query_address.eq(part),
                    score.query_data.eq(Cat(first_half, packed)),
                ]
                with m.If(takes):
                    m.d.sync += half.eq(~half)
                    with m.If(~half):
                        m.d.sync += first_half.eq(packed)
                    with m.Else():
                        m.d.comb += score.query_write.eq(Const(1, shape.rows) << row)
                        is_last_part = part == num_beats - 1
                        m.d.sync += part.eq(Mux(is_last_part, 0, part + 1))
                        is_end = is_last_part & (row == shape.rows - 1)
                        with m.If(is_last_part):
                            m.d.sync += row.eq(row + 1)
                        with m.If(is_end):
                            m.d.sync += is_open.eq(1)
                            m.next = "COMPUTE"
                        with m.If(payload.last != is_end):
                            m.d.sync += status.eq(BAD_LENGTH)
                    with m.If(~half & payload.last):
                        m.d.sync += status.eq(BAD_LENGTH)
            with m.State("COMPUTE"), m.If(answer_done):
                m.next = "HEAD"

    def _answer(self, m, value, maxima, num_beats, channels, status, all_blocks_out, answer_done):
        """Sums and maxima of the rows; exponents and status; totals, ANSWER_BITS a lane, or scores."""
        shape = self.shape
        drained = Signal(value.LATENCY + 1)  # a shift register, but empty at once for the next unit
        m.d.sync += drained.eq(Mux(all_blocks_out, Cat(1, drained), 0))
        parts = ANSWER_BITS // 16
        row, beat, part = Signal(range(shape.rows)), Signal(range(shape.max_beats)), Signal(range(parts))
        out = self.answer
        next_beat = Signal(range(shape.max_beats))
        m.d.comb += [value.read_row.eq(row), value.read_beat.eq(next_beat), next_beat.eq(beat)]
        sums = [Cat(value.sums[r], maxima[r]) for r in range(shape.rows)]
        rows_a_beat = shape.beat_bits // (SUM_BITS + MAX_BITS)
        takes = out.valid & out.ready
        with m.FSM(name="answer"):
            with m.State("SUMS"):
                m.d.comb += out.valid.eq(drained[-1] & all_blocks_out)
                m.d.comb += out.payload.data.eq(
                    Cat(sums) >> (row * 64) if shape.rows > rows_a_beat else Cat(sums)
                )
                with m.If(takes):
                    m.d.sync += row.eq(row + rows_a_beat)
                    with m.If(row + rows_a_beat >= shape.rows):
                        m.d.sync += row.eq(0)
                        m.next = "EXPONENTS"
            with m.State("EXPONENTS"):
                words = [_widened(each, 16) for each in value.exponents]
                m.d.comb += [value.reads.eq(1), out.valid.eq(1), out.payload.data.eq(Cat(*words, status))]
                with m.If(takes):
                    m.next = "TOTALS"
            with m.State("TOTALS"):
                last_part = part == Mux(channels, CHANNEL_SCORE_BITS // 16, parts) - 1
                is_last = (row == shape.rows - 1) & (beat == num_beats - 1) & last_part
                words = Mux(channels, value.channel_scores, value.totals)
                m.d.comb += [
                    value.reads.eq(1),
                    out.valid.eq(1),
                    out.payload.data.eq(words.word_select(part, shape.beat_bits)),
                    out.payload.last.eq(is_last),
                ]
                m.d.sync += beat.eq(next_beat)
                with m.If(takes):
                    m.d.sync += part.eq(Mux(last_part, 0, part + 1))
                    with m.If(last_part):
                        m.d.comb += next_beat.eq(Mux(beat == num_beats - 1, 0, beat + 1))
                        with m.If(beat == num_beats - 1):
                            m.d.sync += row.eq(Mux(row == shape.rows - 1, 0, row + 1))
                    with m.If(is_last):
                        m.d.comb += answer_done.eq(1)
                        m.next = "SUMS"


def _widened(number, bits: int):
    return Cat(number, number[-1].replicate(bits - len(number)))
