"""Scores become softmax weights, and beats of V weighted sums: each beat meets all query rows in one cycle.

Stages of a weight: 1 the score, from its bank; 2 below the maximum; 3 its power of two; 4 the table of exp2;
5 and 6 interpolation; 7 the weight. Of a beat: 1 split, 2 and 3 largest exponent, 4 the exponent of its totals,
5 and 6 align, 7 wait. Of both: 8 multiply; 9 add to the sums, which are shifted first where the maximum or the
exponent of their beat has grown.

With `channels` a word is no score but what its beats are multiplied by: a channel of many tokens. The totals
are the tokens' scores over chosen channels then.
"""

from amaranth.hdl import Array, Cat, Const, Elaboratable, Module, Mux, Signal, signed
from amaranth.lib.memory import Memory

from accel.fpga.arithmetic import (
    ALIGNED_BITS,
    ANSWER_BITS,
    CHANNEL_SCORE_BITS,
    CHANNEL_SCORE_CUT,
    CHANNEL_WEIGHT_BITS,
    EXPONENT_MIN,
    MAX_BITS,
    PRODUCT_CUT,
    SCORE_BITS,
    SCORE_FRACTION,
    SHIFT_LIMIT,
    SUM_BITS,
    TABLE_BITS,
    TOTAL_BITS,
    WEIGHT_FRACTION,
    Shape,
    exp2_table,
)
from accel.fpga.lanes import EXPONENT, align, delayed, larger, largest_exponent, later, split, stages

FAR_BELOW = WEIGHT_FRACTION + 2  # powers of two under the maximum: the weight is 0
SLOPE_BITS = 17
PRODUCT_BITS = ALIGNED_BITS + WEIGHT_FRACTION + 2
REST_BITS = SCORE_FRACTION - TABLE_BITS
WEIGHT_STAGE, ADD_STAGE = 7, 8  # a weight is ready at the end of one; a product meets its total after the other


class ValueUnit(Elaboratable):
    """Inputs are the beat, its place, and for each row the block's maximum; a cycle later the token's score.

    is_first_of_unit: the token is the first at all; down: by how much the maximum has grown with this block.
    While `reads`, `totals` and `channel_scores`, in the answer's bits, are those of read_row and of what
    read_beat was a cycle before.
    """

    LATENCY = 9

    def __init__(self, shape: Shape):
        self.shape = shape
        rows = shape.rows
        self.dtype = Signal()
        self.channels = Signal()
        # the beat
        self.valid = Signal()
        self.data = Signal(shape.beat_bits)
        self.beat = Signal(range(shape.max_beats))
        self.is_first_of_block = Signal()
        self.is_first_of_unit = Signal()
        self.scores = [Signal(signed(SCORE_BITS), name=f"score_{r}") for r in range(rows)]
        self.visible = Signal(rows)
        self.maxima = [Signal(signed(MAX_BITS), name=f"maximum_{r}") for r in range(rows)]
        self.down = [Signal(range(SHIFT_LIMIT + 1), name=f"down_{r}") for r in range(rows)]
        # what has come of them
        self.not_finite = Signal()
        self.sums = [Signal(SUM_BITS, name=f"sum_{r}") for r in range(rows)]
        self.exponents = [
            Signal(EXPONENT, name=f"exponent_{b}", init=EXPONENT_MIN) for b in range(shape.max_beats)
        ]
        self.reads = Signal()
        self.read_row = Signal(range(rows))
        self.read_beat = Signal(range(shape.max_beats))
        self.totals = Signal(shape.lanes * ANSWER_BITS)
        self.channel_scores = Signal(shape.lanes * CHANNEL_SCORE_BITS)

    def elaborate(self, platform):
        m = Module()
        shape = self.shape
        lanes, finite = split(m, self.data, self.dtype, shape, "value")
        valid = stages(m, self.valid, ADD_STAGE, "valid", reset_less=False)
        m.d.comb += self.not_finite.eq(valid[1] & ~finite)
        lanes, largest_now = largest_exponent(m, lanes, shape, "value")
        beat = stages(m, self.beat, ADD_STAGE - 1, "value_beat")
        of_unit = stages(m, self.is_first_of_unit, ADD_STAGE, "of_unit")
        # the exponent of this beat of the rows, as large as any so far
        exponents = Array(self.exponents)
        before, common = Signal(EXPONENT), Signal(EXPONENT)
        m.d.comb += before.eq(Mux(of_unit[3], EXPONENT_MIN, exponents[beat[3]]))
        m.d.comb += common.eq(larger(before, largest_now))
        common_exponent, grown = Signal(EXPONENT), Signal(range(512))
        m.d.sync += [common_exponent.eq(common), grown.eq(common - before)]
        with m.If(valid[3]):
            m.d.sync += exponents[beat[3]].eq(common)
        lanes = later(m, lanes, shape, "value_with_exponent")
        aligned = align(m, lanes, common_exponent, shape, "aligned_value")
        aligned = [delayed(m, lane, 1, lane.name) for lane in aligned]
        grown_at_7 = delayed(m, grown, 3, "grown")
        of_block_at_7 = delayed(m, self.is_first_of_block, 7, "of_block")
        is_first_beat = delayed(m, self.beat == 0, ADD_STAGE, "value_first_beat")
        address = Signal(range(shape.max_beats))
        m.d.sync += address.eq(Mux(self.reads, self.read_beat, beat[ADD_STAGE - 1]))

        table = exp2_table()
        read = []
        for row in range(shape.rows):
            weight = self._weight(m, row, table)
            weight_at_8 = delayed(m, weight, 1, f"weight_at_8_{row}")
            down_at_7 = delayed(m, self.down[row], 7, f"down_{row}")
            down = Signal(range(SHIFT_LIMIT + 1), name=f"down_{row}")
            shift = Signal(range(1024), name=f"shift_{row}")
            limited = Signal(range(SHIFT_LIMIT + 1), name=f"limited_{row}")
            down_now = Mux(of_block_at_7, down_at_7, 0)
            m.d.comb += shift.eq(grown_at_7 + down_now)
            m.d.sync += [down.eq(down_now), limited.eq(Mux(shift > SHIFT_LIMIT, SHIFT_LIMIT, shift))]
            with m.If(valid[8] & is_first_beat):
                m.d.sync += self.sums[row].eq(Mux(of_unit[8], 0, self.sums[row] >> down) + weight_at_8)
            words = []
            for n in range(shape.lanes):
                product = Signal(signed(PRODUCT_BITS), name=f"weighted_{row}_{n}", reset_less=True)
                m.d.sync += product.eq(aligned[n] * weight)
                totals = Memory(shape=signed(TOTAL_BITS), depth=shape.max_beats, init=[])
                m.submodules[f"totals_{row}_{n}"] = totals
                write, now = totals.write_port(), totals.read_port(domain="comb")
                kept = Signal(signed(TOTAL_BITS), name=f"kept_{row}_{n}")
                m.d.comb += [
                    now.addr.eq(address),
                    write.addr.eq(address),
                    write.en.eq(valid[8]),
                    kept.eq(Mux(of_unit[8], 0, now.data >> limited)),
                    write.data.eq(_add_rounded(kept, product)),
                ]
                words.append(now.data)
            read.append(Cat(words))
        chosen = Signal(shape.lanes * TOTAL_BITS)
        m.d.comb += chosen.eq(Array(read)[self.read_row])
        totals = [chosen.word_select(n, TOTAL_BITS).as_signed() for n in range(shape.lanes)]
        scores = slice(CHANNEL_SCORE_CUT, CHANNEL_SCORE_CUT + CHANNEL_SCORE_BITS)
        m.d.comb += [
            self.totals.eq(Cat(Cat(each, each[-1].replicate(ANSWER_BITS - TOTAL_BITS)) for each in totals)),
            self.channel_scores.eq(Cat(each[scores] for each in totals)),
        ]
        return m

    def _weight(self, m: Module, row: int, table) -> Signal:
        """At stage 7: 2**(score - maximum) in units of 2**-24, or the word; 0 for what does not count."""
        maximum = delayed(m, self.maxima[row], 1, f"maximum_{row}")
        below = Signal(signed(SCORE_BITS + 1), name=f"below_{row}", reset_less=True)
        m.d.sync += below.eq(self.scores[row] - (maximum << SCORE_FRACTION))
        powers, right = Signal(signed(SCORE_BITS), name=f"powers_{row}"), Signal(5, name=f"right_{row}")
        m.d.comb += powers.eq(-(below >> SCORE_FRACTION))
        m.d.sync += right.eq(Mux(powers > FAR_BELOW, FAR_BELOW, powers))
        fraction = delayed(m, below[:SCORE_FRACTION], 1, f"fraction_{row}")
        point, slope = Signal(WEIGHT_FRACTION + 1, name=f"point_{row}"), Signal(SLOPE_BITS, name=f"slope_{row}")
        points = Memory(
            shape=WEIGHT_FRACTION + 1 + SLOPE_BITS, depth=len(table), init=[p | d << 25 for p, d in table]
        )
        m.submodules[f"exp2_{row}"] = points
        read = points.read_port(domain="sync")
        m.d.comb += [read.addr.eq(fraction[REST_BITS:]), Cat(point, slope).eq(read.data)]
        rest = delayed(m, fraction[:REST_BITS], 1, f"rest_{row}")
        rise = Signal(SLOPE_BITS + REST_BITS, name=f"rise_{row}", reset_less=True)
        m.d.sync += rise.eq(slope * rest)
        mantissa = Signal(WEIGHT_FRACTION + 2, name=f"mantissa_{row}", reset_less=True)
        m.d.sync += mantissa.eq(delayed(m, point, 1, f"point_{row}") + (rise >> TABLE_BITS))
        *_, right_at_5, right = stages(m, right, 3, f"right_{row}")
        half = Signal(WEIGHT_FRACTION + 2, name=f"half_{row}")
        m.d.sync += half.eq(Mux(right_at_5 == 0, 0, (Const(1, 1) << right_at_5) >> 1))
        counts = delayed(m, self.visible[row], WEIGHT_STAGE - 2, f"counts_{row}")
        word = delayed(m, self.scores[row][:CHANNEL_WEIGHT_BITS].as_signed(), WEIGHT_STAGE - 2, f"word_{row}")
        weight = Signal(signed(WEIGHT_FRACTION + 2), name=f"weight_{row}", reset_less=True)
        m.d.sync += weight.eq(Mux(counts, Mux(self.channels, word, (mantissa + half) >> right), 0))
        return weight


def _add_rounded(total, product):
    """The product rounded to what a total keeps of it: its last bit but one is the adder's carry."""
    return (Cat(Const(1, 1), total) + product[PRODUCT_CUT - 1 :].as_signed())[1:]
