"""The three inner steps of the numba worker, each one intrinsic: scores, softmax, weighted sums.

They work on a block: a list of row addresses, wherever the rows lie, so that pages of any size and ragged
ends cost nothing. Products are register-blocked: a tile of tokens x heads (scores) or heads x vectors of
head_dim (sums) keeps its accumulators in registers while rows are widened on the fly; a tile reloads few
operands per multiply-add, and what it widens twice lies in the first-level cache. Every size is a literal,
so LLVM sees straight code.

`stride`: the scores' floats per token, heads rounded up to a power of two: lane l of a vector of scores
belongs to head l % stride. What the lanes of no head hold is never looked at.
"""

import math
from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from accel.workers import vector_ir as v
from accel.workers.vector_ir import BFLOAT16, FLOAT8, FLOAT8_FACTOR, I64, ITEM_BITS, QUANTIZED, SKETCH

CACHE_LINE = 64
TILE_HEADS, TILE_HEADS_MANY_REGISTERS = 4, 8  # a row widened once serves this many heads
MANY_ACCUMULATORS = 24


def score_stride(heads: int) -> int:
    return 1 << (heads - 1).bit_length()


def load_pairs(dtype: int, head_dim: int, lanes: int) -> bool:
    """Whether vectors hold every other channel: 2c of the even ones of 2 * lanes channels, 2c + 1 of the odd.

    bfloat16 is the high half of float32. In a vector of 32-bit words the odd channels lie in place and the
    even ones are one shift away, where widening in order costs a shuffle and a shift on the ports that
    multiply-adds need.
    """
    return dtype == BFLOAT16 and head_dim % (2 * lanes) == 0


@dataclass(frozen=True)
class Shape:
    """The sizes one kernel is compiled for. All intrinsics take them as literals, in this order."""

    dtype: int
    head_dim: int
    heads: int
    lanes: int
    accumulators: int
    converts_half: int

    @property
    def row_bytes(self) -> int:
        return self.head_dim * ITEM_BITS[self.dtype] // 8

    @property
    def stride(self) -> int:
        return score_stride(self.heads)

    @property
    def columns(self) -> int:
        """Vectors of scores per token, at least 1."""
        return max(1, self.stride // self.lanes)

    @property
    def tile_heads(self) -> int:
        return TILE_HEADS_MANY_REGISTERS if self.accumulators >= MANY_ACCUMULATORS else TILE_HEADS

    @property
    def loads_pairs(self) -> bool:
        return load_pairs(self.dtype, self.head_dim, self.lanes)

    @property
    def is_quantized(self) -> bool:
        return self.dtype in QUANTIZED

    def load_scales(self, builder, scales, chunk: int):
        """The `chunk`-th vector of a page's scales: times it, codes as `load_row` gives them are values."""
        offset = chunk * self.lanes * ITEM_BITS[BFLOAT16] // 8
        vector = v.load_widened(builder, scales, offset, BFLOAT16, self.lanes, bool(self.converts_half))
        if self.dtype == FLOAT8:
            vector = builder.fmul(vector, v.splat_constant(FLOAT8_FACTOR, self.lanes))
        return vector

    def load_row(self, builder, row, chunk: int):
        """The `chunk`-th vector of a row, widened, or its codes; see load_pairs for its channels."""
        if self.dtype == SKETCH:
            return v.load_sketch(builder, row, chunk * self.lanes, self.lanes)
        if self.is_quantized:
            first = chunk * self.lanes
            return v.load_codes(builder, row, first, self.dtype, self.lanes, bool(self.converts_half))
        if self.loads_pairs:
            pairs = v.load(builder, row, chunk // 2 * 4 * self.lanes, v.vector(v.I32, self.lanes))
            return v.widen_half_of_pairs(builder, pairs, high=bool(chunk % 2))
        offset = chunk * self.lanes * ITEM_BITS[self.dtype] // 8
        return v.load_widened(builder, row, offset, self.dtype, self.lanes, bool(self.converts_half))


def near_equal(total: int, limit: int) -> list[tuple[int, int]]:
    """(first, size) of the fewest parts of at most `limit`, the larger ones first."""
    num_parts = -(-total // limit)
    small, num_large = divmod(total, num_parts)
    sizes = [small + (part < num_large) for part in range(num_parts)]
    return [(sum(sizes[:part]), size) for part, size in enumerate(sizes)]


def tile_tokens(heads: int, accumulators: int) -> int:
    """Tokens scored together with `heads` heads.

    For one or two heads the tile's scores are stored as whole vectors of 4, hence the multiples of 4.
    """
    if heads == 1:
        return 8
    limit = accumulators // heads
    return max(1, min(8, limit // 2 * 2 if heads == 2 else limit))


def _lines(shape: Shape, part: int, num_parts: int) -> list[int]:
    """Offsets of a row's cache lines that pass `part` of `num_parts` asks for: an even share."""
    offsets = range(0, shape.row_bytes, CACHE_LINE)
    return [offset for line, offset in enumerate(offsets) if line * num_parts // len(offsets) == part]


def _shape(literals) -> Shape | None:
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    return Shape(*(literal.literal_value for literal in literals))


def _at(builder: ir.IRBuilder, base, index, size: int):
    return builder.add(base, builder.mul(index, ir.Constant(I64, size)))


@intrinsic
def align_frame(typingctx):
    """Have the function that calls this begin its stack frame at a cache line.

    LLVM keeps vectors there that have no register. It would keep them wherever the caller's stack happens to
    end: with each of 64 bytes in two lines a kernel takes an eighth longer, in one process or call and not in
    another.
    """

    def codegen(context, builder, signature, arguments):
        attributes = builder.function.attributes
        attributes.add("nounwind")  # no function of numba's does; llvmlite writes alignstack beside others only
        attributes.alignstack = CACHE_LINE
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic(prefer_literal=True)
def fill_rows(typingctx, target, first, step, count):
    """int64 target[i] = first + i * step for i < count, and up to 7 places more."""

    def codegen(context, builder, signature, arguments):
        target_, first_, step_, count_ = arguments
        undefined = ir.Constant(v.vector(I64, 4), ir.Undefined)

        def splat(value):
            single = builder.insert_element(undefined, value, ir.Constant(v.I32, 0))
            return v.shuffle(builder, single, undefined, [0] * 4)

        ramp = builder.mul(splat(step_), ir.Constant(v.vector(I64, 4), [0, 1, 2, 3]))
        four = splat(builder.shl(step_, ir.Constant(I64, 2)))

        def fill(index, carried):
            following = builder.add(carried[0], four)
            v.store(builder, carried[0], _at(builder, target_, index, 8), 0)
            v.store(builder, following, _at(builder, target_, index, 8), 32)
            return [builder.add(following, four)]

        v.counted_loop(builder, count_, 8, [builder.add(splat(first_), ramp)], fill)
        return context.get_dummy_value()

    return types.void(target, first, step, count), codegen


@intrinsic(prefer_literal=True)
def scales_hold(typingctx, scales, dtype, head_dim, heads, lanes, accumulators, converts_half):
    """Whether the scales of a page are finite and above zero. scales: address of bfloat16 [head_dim]."""
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        zero = v.splat_constant(0.0, shape.lanes)
        infinite = v.splat_constant(math.inf, shape.lanes)
        hold = ir.Constant(v.vector(v.I1, shape.lanes), [1] * shape.lanes)
        for chunk in range(shape.head_dim // shape.lanes):
            scale = shape.load_scales(builder, arguments[0], chunk)
            above = builder.fcmp_ordered(">", scale, zero)
            hold = builder.and_(hold, builder.and_(above, builder.fcmp_ordered("<", scale, infinite)))
        return v.all_lanes(builder, hold)

    return types.boolean(scales, *sizes), codegen


@intrinsic(prefer_literal=True)
def scale_queries(
    typingctx, queries, scales, scaled,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """scaled[h] = queries[h] * scales: what scores the codes of a quantized page as queries do its values.

    queries, scaled: addresses of float32 [heads, head_dim]; scales: of bfloat16 [head_dim].
    """
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        queries_, scales_, scaled_ = arguments[:3]
        for chunk in range(shape.head_dim // shape.lanes):
            scale = shape.load_scales(builder, scales_, chunk)
            for h in range(shape.heads):
                offset = 4 * (h * shape.head_dim + chunk * shape.lanes)
                part = v.load_floats(builder, queries_, offset, shape.lanes)
                v.store(builder, builder.fmul(part, scale), scaled_, offset)
        return context.get_dummy_value()

    return types.void(queries, scales, scaled, *sizes), codegen


@intrinsic(prefer_literal=True)
def cap_scores(
    typingctx, scores, count, cap,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """scores = cap * tanh(scores / cap) for scores[:count]; what is far out becomes cap, NaN stays NaN.

    scores: address of float32 [count + lanes, stride]; cap: float32 above zero. Source: soft-capped logits,
    arXiv:2408.00118.
    """
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        scores_, count_, cap_ = arguments[:3]
        lanes_ = shape.lanes
        inverse = builder.fdiv(ir.Constant(v.F32, 1.0), cap_)
        high, low = (v.splat(builder, value, lanes_) for value in (cap_, inverse))

        def bend(index, _):
            address = _at(builder, scores_, index, 4)
            score = v.load_floats(builder, address, 0, lanes_)
            bent = v.tanh(builder, builder.fmul(score, low))
            v.store(builder, builder.fmul(bent, high), address, 0)
            return []

        v.counted_loop(builder, builder.mul(count_, ir.Constant(I64, shape.stride)), lanes_, [], bend)
        return context.get_dummy_value()

    return types.void(scores, count, cap, *sizes), codegen


@intrinsic(prefer_literal=True)
def score_block(
    typingctx, rows, ahead, count, queries, scores,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """scores[t, h] = queries[h] . row t, for the rows at the addresses rows[t], t < count.

    rows, ahead: addresses of int64 [count + 7], readable rows also beyond count; those of `ahead` are
    prefetched. queries: address of float32 [heads, head_dim]. scores: address of float32 [count + 8, stride].
    """
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        rows_, ahead_, count_, queries_, scores_ = arguments[:5]
        tiles = near_equal(shape.heads, shape.tile_heads)
        for part, (first_head, num_heads) in enumerate(tiles):
            tokens = tile_tokens(num_heads, shape.accumulators)

            def tile(first, _, part=part, first_head=first_head, num_heads=num_heads, tokens=tokens):
                row_list = _at(builder, rows_, first, 8)
                row = [v.load(builder, row_list, 8 * t, I64, align=8) for t in range(tokens)]
                ahead_list = _at(builder, ahead_, first, 8)
                lines = _lines(shape, part, len(tiles))
                soon = [(t, line) for t in range(tokens) for line in lines]
                sums = _tile_products(builder, shape, row, queries_, first_head, num_heads, ahead_list, soon)
                target = _at(builder, scores_, first, 4 * shape.stride)
                _store_tile(builder, shape, sums, target, first_head)
                return []

            v.counted_loop(builder, count_, tokens, [], tile)
        return context.get_dummy_value()

    return types.void(rows, ahead, count, queries, scores, *sizes), codegen


def _tile_products(builder, shape: Shape, row, queries, first_head: int, num_heads: int, ahead, soon):
    """[token][head] vectors whose lanes add up to the score.

    soon: (token, line) pairs to prefetch from the rows of `ahead`, evenly between the products: more at
    once than the CPU can have under way would hold up the loads behind them.
    """
    zero = v.splat_constant(0.0, shape.lanes)
    sums = [[zero] * num_heads for _ in row]
    num_chunks = shape.head_dim // shape.lanes
    # kept loaded, the pairs of even and odd channels would push sums out of the registers
    odd_row = [v.forget(builder, address) for address in row] if shape.loads_pairs else row
    for chunk in range(num_chunks):
        for t, line in soon[chunk * len(soon) // num_chunks : (chunk + 1) * len(soon) // num_chunks]:
            v.prefetch(builder, v.load(builder, ahead, 8 * t, I64, align=8), line)
        widened = [shape.load_row(builder, address, chunk) for address in (odd_row if chunk % 2 else row)]
        for h in range(num_heads):
            offset = 4 * ((first_head + h) * shape.head_dim + chunk * shape.lanes)
            part = v.load_floats(builder, queries, offset, shape.lanes)
            for t, key in enumerate(widened):
                sums[t][h] = v.fma(builder, key, part, sums[t][h])
    return sums


def _store_tile(builder, shape: Shape, sums: list[list], target, first_head: int) -> None:
    zero = v.splat_constant(0.0, shape.lanes)
    if shape.stride < 4:  # one or two heads: the tile's scores are contiguous
        flat = [vector for token in sums for vector in token]
        flat += [zero] * (-len(flat) % 4)
        for place in range(0, len(flat), 4):
            v.store(builder, v.sum_each_of_four(builder, flat[place : place + 4]), target, 4 * place)
        return
    for t, token in enumerate(sums):
        # whole vectors of four are written: a later tile of heads overwrites what lies behind this one's
        for head in range(0, len(token), 4):
            part = token[head : head + 4]
            four = v.sum_each_of_four(builder, part + [zero] * (4 - len(part)))
            v.store(builder, four, target, 4 * (t * shape.stride + first_head + head))


@intrinsic(prefer_literal=True)
def softmax_block(
    typingctx, scores, count, top, total, factor,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """One step of online softmax, base 2; scores[:count] become weights 2**(score - top) in place.

    scores: address of float32 [count + lanes, stride]. top, total, factor: addresses of float32
    [max(stride, lanes)]. top becomes the new maximum; factor 2**(old top - new top); total is scaled by it
    and grows by the weights, lane by lane: a head's lanes are still to be added. Where all scores so far
    are -inf, weights and factor are zero. Source: arXiv:1805.02867.
    """
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        scores_, count_, top_, total_, factor_ = arguments[:5]
        lanes_ = shape.lanes
        empty = v.splat_constant(float("-inf"), lanes_)
        zero = v.splat_constant(0.0, lanes_)
        num_floats = builder.mul(count_, ir.Constant(I64, shape.stride))
        if shape.stride < lanes_:  # the last vector may be part filled
            v.store(builder, empty, _at(builder, scores_, num_floats, 4), 0)
        step = shape.columns * lanes_
        for column in range(shape.columns):
            offset = 4 * column * lanes_

            def larger(index, carried, offset=offset):
                score = v.load_floats(builder, _at(builder, scores_, index, 4), offset, lanes_)
                return [v.maximum(builder, score, carried[0])]

            old = v.load_floats(builder, top_, offset, lanes_)
            (new,) = v.counted_loop(builder, num_floats, step, [old], larger)
            new = v.fold_lanes(builder, new, shape.stride, v.maximum)
            # subtracting -inf would make NaN of what has no weight
            base = builder.select(builder.fcmp_ordered("==", new, empty), zero, new)

            def weigh(index, carried, offset=offset, base=base):
                address = _at(builder, scores_, index, 4)
                score = v.load_floats(builder, address, offset, lanes_)
                weight = v.exp2(builder, builder.fsub(score, base))
                v.store(builder, weight, address, offset)
                return [builder.fadd(carried[0], weight)]

            (grown,) = v.counted_loop(builder, num_floats, step, [zero], weigh)
            scaled = v.exp2(builder, builder.fsub(old, base))
            total = v.fma(builder, v.load_floats(builder, total_, offset, lanes_), scaled, grown)
            v.store(builder, total, total_, offset)
            v.store(builder, new, top_, offset)
            v.store(builder, scaled, factor_, offset)
        return context.get_dummy_value()

    return types.void(scores, count, top, total, factor, *sizes), codegen


class _AheadShare:
    """The lines of the next rows that one of `add_block`'s passes prefetches, one at a time.

    With fewer passes than lines per row a pass asks for several lines of every row; with more, for one
    line of some rows, one in every `rows_per_turn` rows that it adds.
    """

    def __init__(self, builder, shape: Shape, part: int, num_parts: int, ahead, count):
        self._builder = builder
        self._ahead = ahead
        num_lines = -(-shape.row_bytes // CACHE_LINE)
        self._lines = _lines(shape, part, num_parts)
        self.rows_per_turn = 1
        self._first_row = ir.Constant(I64, 0)
        if num_parts > num_lines:
            line = part * num_lines // num_parts
            sharing = [other for other in range(num_parts) if other * num_lines // num_parts == line]
            self._lines = [line * CACHE_LINE]
            self.rows_per_turn = len(sharing)
        self.num_turns = builder.udiv(count, ir.Constant(I64, self.rows_per_turn))
        if num_parts > num_lines:
            self._first_row = builder.mul(self.num_turns, ir.Constant(I64, sharing.index(part)))

    def prefetch(self, turn) -> None:
        row = self._builder.add(self._first_row, turn)
        soon = v.load(self._builder, _at(self._builder, self._ahead, row, 8), 0, I64, align=8)
        for line in self._lines:
            v.prefetch(self._builder, soon, line)


@intrinsic(prefer_literal=True)
def add_block(
    typingctx, rows, ahead, count, weights, factor, sums, scales,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """sums[h] = factor[h] * sums[h] + sum over t < count of weights[t, h] * row t.

    rows, ahead: addresses of int64 [count]; the rows of `ahead` are prefetched. weights: address of float32
    [count, stride]; factor: of float32 [heads]; sums: of float32 [heads, head_dim]; scales: of the channels of
    these rows, if they are quantized.
    """
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        rows_, ahead_, count_, weights_, factor_, sums_, scales_ = arguments[:7]
        lanes_ = shape.lanes
        num_chunks = shape.head_dim // lanes_
        tiles = [
            (range(first_head, first_head + num_heads), range(first_chunk, first_chunk + chunks))
            for first_head, num_heads in near_equal(shape.heads, shape.tile_heads)
            for first_chunk, chunks in near_equal(num_chunks, max(1, shape.accumulators // max(num_heads, 2)))
        ]
        for part, (tile_heads, tile_chunks) in enumerate(tiles):
            ahead_share = _AheadShare(builder, shape, part, len(tiles), ahead_, count_)
            places = [(h, 4 * (h * shape.head_dim + c * lanes_)) for h in tile_heads for c in tile_chunks]

            def add_row(index, carried, tile_heads=tile_heads, tile_chunks=tile_chunks):
                row = v.load(builder, _at(builder, rows_, index, 8), 0, I64, align=8)
                weight_list = _at(builder, weights_, index, 4 * shape.stride)
                widened = [shape.load_row(builder, row, chunk) for chunk in tile_chunks]
                grown = []
                for place, h in enumerate(tile_heads):
                    weight = v.load_splat(builder, weight_list, 4 * h, lanes_)
                    for c, value in enumerate(widened):
                        grown.append(v.fma(builder, value, weight, carried[place * len(widened) + c]))
                return grown

            def add_rows(turn, carried, ahead_share=ahead_share, add_row=add_row):
                ahead_share.prefetch(turn)
                first = builder.mul(turn, ir.Constant(I64, ahead_share.rows_per_turn))
                for t in range(ahead_share.rows_per_turn):
                    carried = add_row(builder.add(first, ir.Constant(I64, t)), carried)
                return carried

            def rescaled(place):
                h, offset = place
                return builder.fmul(
                    v.load_floats(builder, sums_, offset, lanes_), v.load_splat(builder, factor_, 4 * h, lanes_)
                )

            if shape.is_quantized:  # the block's sums are of codes until their end
                carried = [v.splat_constant(0.0, lanes_)] * len(places)
            else:
                carried = [rescaled(place) for place in places]
            carried = v.counted_loop(builder, ahead_share.num_turns, 1, carried, add_rows)
            done = builder.mul(ahead_share.num_turns, ir.Constant(I64, ahead_share.rows_per_turn))
            if ahead_share.rows_per_turn > 1:
                carried = v.counted_loop(builder, count_, 1, carried, add_row, first=done)
            if shape.is_quantized:
                scale = [shape.load_scales(builder, scales_, chunk) for chunk in tile_chunks]
                carried = [
                    v.fma(builder, value, scale[position % len(scale)], rescaled(place))
                    for position, (value, place) in enumerate(zip(carried, places, strict=True))
                ]
            for value, (_, offset) in zip(carried, places, strict=True):
                v.store(builder, value, sums_, offset)
        return context.get_dummy_value()

    return types.void(rows, ahead, count, weights, factor, sums, scales, *sizes), codegen
