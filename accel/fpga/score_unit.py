"""Beats of K become scores, a bank of them for each block: one dot product for each query row, a beat a cycle.

Stages: 1 split, 2 and 3 largest exponent, 4 and 5 align, 6 multiply, some that add up (two with 16 lanes, three
with 32), then 1 shift, 2 add beats of a token, 3 limit, 4 round up, 5 write.
"""

from amaranth.hdl import Elaboratable, Module, Mux, Signal, signed
from amaranth.lib.memory import Memory

from accel.fpga.arithmetic import (
    ALIGNED_BITS,
    BANKS,
    LEFT_LIMIT,
    MAX_BITS,
    NO_MAX,
    QUERY_BITS,
    SCORE_BITS,
    SCORE_FRACTION,
    SCORE_LIMIT,
    SHIFT_LIMIT,
    Shape,
)
from accel.fpga.lanes import added_up, align, delayed, largest_exponent, split, stages, stages_to_add

PRODUCT_BITS = ALIGNED_BITS + QUERY_BITS
PRODUCT_STAGE = 6


class ScoreUnit(Elaboratable):
    """Inputs are the beat (valid: it is one), its place (block, token, beat of the token), and the unit's
    queries.

    A score leaves as `write`: to bank and token, of all rows at once, with the rows that see it; `block_done`
    with the last of a block, whose largest scores, rounded up, are in `above` then.
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        self.total_stage = PRODUCT_STAGE + stages_to_add(shape.lanes)
        self.latency = self.total_stage + 5
        rows, tokens = shape.rows, shape.block_tokens
        self.dtype = Signal()
        self.exponents = [Signal(signed(16), name=f"query_exponent_{r}") for r in range(rows)]
        self.starts = [Signal(32, name=f"visible_start_{r}") for r in range(rows)]
        self.stops = [Signal(32, name=f"visible_stop_{r}") for r in range(rows)]
        self.query_write = Signal(rows)
        self.query_address = Signal(range(shape.max_beats))
        self.query_data = Signal(shape.lanes * QUERY_BITS)
        # the beat
        self.valid = Signal()
        self.data = Signal(shape.beat_bits)
        self.beat = Signal(range(shape.max_beats))
        self.is_last_beat = Signal()
        self.is_last_token = Signal()
        self.token = Signal(range(tokens))
        self.bank = Signal(range(BANKS))
        self.position = Signal(32)
        self.is_chosen = Signal()
        # the score
        self.write = Signal()
        self.write_bank = Signal(range(BANKS))
        self.write_token = Signal(range(tokens))
        self.scores = [Signal(signed(SCORE_BITS), name=f"score_{r}") for r in range(rows)]
        self.visible = Signal(rows)
        self.block_done = Signal()
        self.above = [Signal(signed(MAX_BITS), name=f"above_{r}") for r in range(rows)]
        self.not_finite = Signal()
        self.saturated = Signal()

    def elaborate(self, platform):
        m = Module()
        shape, total_stage = self.shape, self.total_stage
        valid = stages(m, self.valid, total_stage + 4, "valid", reset_less=False)
        lanes, finite = split(m, self.data, self.dtype, shape, "key")
        m.d.comb += self.not_finite.eq(valid[1] & ~finite)
        lanes, common = largest_exponent(m, lanes, shape, "key")
        aligned = align(m, lanes, common, shape, "aligned_key")
        exponent = delayed(m, common, total_stage - 5, "key_exponent")  # two stages before the totals
        query_beat = delayed(m, self.beat, PRODUCT_STAGE - 2, "key_beat")
        totals = [self._totals(m, row, aligned, query_beat) for row in range(shape.rows)]

        is_first = delayed(m, self.beat == 0, total_stage + 1, "first_beat")
        is_last = stages(m, self.is_last_beat, total_stage + 4, "last_beat")
        is_last_token = delayed(m, self.is_last_token, total_stage + 4, "key_last_token")
        write_stage = self.latency - 1
        token = delayed(m, self.token, write_stage, "key_token")
        bank = delayed(m, self.bank, write_stage, "key_bank")
        position = delayed(m, self.position, total_stage + 2, "key_position")
        is_chosen = delayed(m, self.is_chosen, total_stage + 2, "key_chosen")
        # from a stage on a token's score is there with its last beat
        is_complete = [valid[n] & is_last[n] for n in range(total_stage + 2, total_stage + 5)]
        m.d.sync += [
            self.write.eq(is_complete[2]),
            self.write_token.eq(token),
            self.write_bank.eq(bank),
            self.block_done.eq(is_complete[2] & is_last_token),
        ]
        is_new_block = Signal(init=1)
        with m.If(is_complete[2]):
            m.d.sync += is_new_block.eq(is_last_token)
        saturated = Signal(shape.rows)
        m.d.sync += self.saturated.eq(saturated.any())
        for row in range(shape.rows):
            score, was_far = self._score(m, row, totals[row], exponent, is_first, valid[total_stage + 1])
            is_above, is_below = score > SCORE_LIMIT, score < -SCORE_LIMIT
            sees, clipped = Signal(name=f"sees_{row}"), Signal(signed(SCORE_BITS), name=f"clipped_{row}")
            has_no_place = Signal(name=f"no_place_{row}")
            m.d.sync += [
                sees.eq(is_chosen & (position >= self.starts[row]) & (position < self.stops[row])),
                clipped.eq(Mux(is_above, SCORE_LIMIT, Mux(is_below, -SCORE_LIMIT, score))),
                has_no_place.eq(is_above | is_below | was_far),
            ]
            m.d.comb += saturated[row].eq(is_complete[1] & sees & has_no_place)
            ceiling = Signal(signed(MAX_BITS), name=f"ceiling_{row}")
            m.d.sync += ceiling.eq((clipped + ((1 << SCORE_FRACTION) - 1)) >> SCORE_FRACTION)
            seen, limited = delayed(m, sees, 1, f"seen_{row}"), delayed(m, clipped, 1, f"limited_{row}")
            m.d.sync += [self.scores[row].eq(limited), self.visible[row].eq(seen)]
            so_far = Signal(signed(MAX_BITS), name=f"so_far_{row}")
            m.d.comb += so_far.eq(Mux(is_new_block, NO_MAX, self.above[row]))
            with m.If(is_complete[2]):
                m.d.sync += self.above[row].eq(Mux(seen & (ceiling > so_far), ceiling, so_far))
        return m

    def _totals(self, m: Module, row: int, aligned: list, query_beat) -> Signal:
        """A beat's dot product with the row's query, at total_stage."""
        shape = self.shape
        queries = Memory(shape=shape.lanes * QUERY_BITS, depth=shape.max_beats, init=[])
        m.submodules[f"queries_{row}"] = queries
        write, read = queries.write_port(), queries.read_port(domain="sync")
        m.d.comb += [
            write.en.eq(self.query_write[row]),
            write.addr.eq(self.query_address),
            write.data.eq(self.query_data),
            read.addr.eq(query_beat),
        ]
        products = []
        for n in range(shape.lanes):
            product = Signal(signed(PRODUCT_BITS), name=f"product_{row}_{n}", reset_less=True)
            m.d.sync += product.eq(aligned[n] * read.data.word_select(n, QUERY_BITS).as_signed())
            products.append(product)
        return added_up(m, products, f"sum_{row}")

    def _score(self, m: Module, row: int, total, exponent, is_first, valid) -> tuple[Signal, Signal]:
        """(score, whether a beat of it had no place), one and two stages after the total."""
        amount = Signal(range(SHIFT_LIMIT + LEFT_LIMIT + 1), name=f"amount_{row}")
        is_far, was_far = Signal(name=f"far_{row}"), Signal(name=f"was_far_{row}")
        right = Signal(signed(18), name=f"right_{row}")
        m.d.sync += right.eq(-(exponent + self.exponents[row] + (SCORE_FRACTION - 16)))
        limited = Mux(right > SHIFT_LIMIT, SHIFT_LIMIT, Mux(right < -LEFT_LIMIT, -LEFT_LIMIT, right))
        m.d.sync += [amount.eq(limited + LEFT_LIMIT), is_far.eq(right < -LEFT_LIMIT)]
        shifted = Signal(signed(len(total) + LEFT_LIMIT), name=f"shifted_{row}", reset_less=True)
        m.d.sync += shifted.eq((total << LEFT_LIMIT) >> amount)
        far = delayed(m, is_far, 1, f"far_{row}")
        bits = len(shifted) + (self.shape.max_beats - 1).bit_length()
        score = Signal(signed(bits), name=f"token_total_{row}")
        with m.If(valid):
            m.d.sync += [
                score.eq(Mux(is_first, 0, score) + shifted),
                was_far.eq(Mux(is_first, 0, was_far) | far),
            ]
        return score, was_far
