"""Products of 2-bit codes with bytes, as LLVM vector code: what scores all tokens and sums up their values.

The levels of codes are 3 : 10 within a thousandth, so codes, queries and weights are bytes and products exact
in 32 bits. A CPU that multiplies bytes (AVX-512 VNNI) does 64 in an instruction, and widens 64 codes in two:
each byte of a word is a shift of it, and a permutation of a table needs no more bits masked.

Scores come with a token to a lane: a block's words are transposed first, so no sum goes over lanes. Sums come
with a channel to a lane, four tokens to a 32-bit word.
"""

import math
from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from accel.sketch import codebook
from accel.workers import vector_ir as v
from accel.workers.micro_kernels import _at, near_equal

LANES = 16  # 32-bit words of a vector: tokens that are scored together
BYTES = 4 * LANES
GROUP = 4  # tokens that are summed together
SLAB = 64  # channels that are summed together: the 16-byte pieces of GROUP rows
TILE_HEADS = 4  # times SLAB sums in 16 registers
BIAS = 10  # added to levels that are to be unsigned
QUERY_MAX, WEIGHT_MAX = 127, 255

_BYTE_VECTOR = v.vector(v.I8, BYTES)
_WORD_VECTOR = v.vector(v.I32, LANES)
_FLOAT_VECTOR = v.vector(v.F32, LANES)


@dataclass(frozen=True)
class Sizes:
    """What one kernel is compiled for; literals, in this order. native: see target.multiplies_bytes"""

    head_dim: int
    heads: int
    native: int

    @property
    def words(self) -> int:
        """Of a row, the last one perhaps half of the next row's."""
        return -(-self.head_dim // 16)

    @property
    def row_bytes(self) -> int:
        return self.head_dim // 4

    @property
    def slabs(self) -> int:
        return -(-self.head_dim // SLAB)


def _sizes(literals) -> Sizes | None:
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    return Sizes(*(literal.literal_value for literal in literals))


def _bytes(values: list[int]) -> ir.Constant:
    return ir.Constant(_BYTE_VECTOR, [value & 255 for value in values])


def _call(builder, name: str, result: ir.Type, arguments: list):
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def _add_products(builder, sizes: Sizes, total, unsigned, signed):
    """total + the sum of each word's four products of bytes."""
    if sizes.native:
        words = [builder.bitcast(operand, _WORD_VECTOR) for operand in (unsigned, signed)]
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _WORD_VECTOR, [total, *words])
    halves = v.vector(v.I16, BYTES)
    unsigned, signed = (builder.bitcast(operand, _BYTE_VECTOR) for operand in (unsigned, signed))
    products = builder.mul(builder.zext(unsigned, halves), builder.sext(signed, halves))
    for place in range(GROUP):
        part = v.shuffle(builder, products, products, list(range(place, BYTES, GROUP)))
        total = builder.add(total, builder.sext(part, _WORD_VECTOR))
    return total


def _levels(builder, sizes: Sizes, vector, bits: list[int], bias: int):
    """64 levels, plus bias: of the codes at bits[i] of the 64-bit word that output byte i lies in."""
    table = [3 + bias, 10 + bias, -3 + bias, -10 + bias]
    if sizes.native:
        vector = builder.bitcast(vector, _BYTE_VECTOR)
        shifted = _call(builder, "llvm.x86.avx512.pmultishift.qb.512", _BYTE_VECTOR, [_bytes(bits), vector])
        # the low 6 bits choose, of which 2 are the code
        return _call(builder, "llvm.x86.avx512.permvar.qi.512", _BYTE_VECTOR, [_bytes(table * 16), shifted])
    vector = builder.bitcast(vector, _BYTE_VECTOR)
    spread = v.shuffle(builder, vector, vector, [8 * (i // 8) + bit // 8 for i, bit in enumerate(bits)])
    code = builder.lshr(spread, _bytes([bit % 8 for bit in bits]))
    zero = _bytes([0] * BYTES)

    def has(bit):
        return builder.icmp_unsigned("!=", builder.and_(code, _bytes([bit] * BYTES)), zero)

    is_large = has(1)
    levels = [
        builder.select(is_large, _bytes([b] * BYTES), _bytes([a] * BYTES)) for a, b in (table[:2], table[2:])
    ]
    return builder.select(has(2), levels[1], levels[0])


def _columns(builder, sizes: Sizes, rows) -> list:
    """Of LANES packed rows from an address on: for each word of a row, that of all rows."""
    words = sizes.words
    if sizes.head_dim % 16 == 0 and words & (words - 1) == 0:
        columns = [v.load(builder, rows, BYTES * part, _WORD_VECTOR, align=1) for part in range(words)]
        even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
        for _ in range(
            words.bit_length() - 1
        ):  # each turn the lowest bit of a word's number becomes the highest
            pairs = list(zip(columns[::2], columns[1::2], strict=True))
            columns = [v.shuffle(builder, a, b, part) for part in (even, odd) for a, b in pairs]
        return columns
    columns = []
    for word in range(words):
        column = ir.Constant(_WORD_VECTOR, ir.Undefined)
        for lane in range(LANES):
            one = v.load(builder, rows, lane * sizes.row_bytes + 4 * word, v.I32, align=1)
            column = builder.insert_element(column, one, ir.Constant(v.I32, lane))
        columns.append(column)
    return columns


def _splat_word(builder, address, offset: int):
    undefined = ir.Constant(_WORD_VECTOR, ir.Undefined)
    single = builder.insert_element(undefined, v.load(builder, address, offset, v.I32), ir.Constant(v.I32, 0))
    return v.shuffle(builder, single, undefined, [0] * LANES)


@intrinsic(prefer_literal=True)
def score_codes(
    typingctx, rows, count, scales, queries, biases, of_heads, scores, stride, head_dim, heads, native
):
    """scores[h, t]: of keys by their 2-bit codes, as micro_kernels.finish_scores has it, to base 2.

    rows: address of packed rows, `count` rounded up to LANES of them are read; scales: of float32 by token
    queries: of int8 [words, 4, heads, 4], 4 channels each; biases: of int32 [heads], BIAS times their sums
    of_heads: of float32 [3, heads]: what a product is worth, the score of the mean, the deviation
    scores: of float32 [heads, stride], of which count rounded up are written
    """
    sizes = _sizes((head_dim, heads, native))
    if sizes is None:
        return None

    def codegen(context, builder, signature, arguments):
        rows_, count_, scales_, queries_, biases_, of_heads_, scores_, stride_ = arguments[:8]
        limit = v.splat_constant(codebook.CORRECTED_DEVIATION / math.sqrt(2 * math.log(2)), LANES)
        head_bytes = builder.mul(stride_, ir.Constant(v.I64, 4))

        def block(token, _):
            columns = _columns(builder, sizes, _at(builder, rows_, token, sizes.row_bytes))
            totals = [ir.Constant(_WORD_VECTOR, [0] * LANES)] * sizes.heads
            for word, column in enumerate(columns):
                for part in range(4):
                    bits = [32 * (i // 4) + 8 * part + 2 * (i % 4) for i in range(8)] * (BYTES // 8)
                    levels = _levels(builder, sizes, column, bits, BIAS)
                    for head in range(sizes.heads):
                        query = _splat_word(builder, queries_, 4 * ((4 * word + part) * sizes.heads + head))
                        totals[head] = _add_products(builder, sizes, totals[head], levels, query)
            scale = v.load_floats(builder, _at(builder, scales_, token, 4), 0, LANES)
            for head, total in enumerate(totals):
                worth, mean, deviation = (
                    v.load_splat(builder, of_heads_, 4 * (part * sizes.heads + head), LANES)
                    for part in range(3)
                )
                exact = builder.sub(total, _splat_word(builder, biases_, 4 * head))
                score = builder.fmul(builder.sitofp(exact, _FLOAT_VECTOR), worth)
                spread = builder.fmul(scale, deviation)
                capped = v.minimum(builder, spread, limit)
                excess = builder.fsub(builder.fadd(spread, spread), capped)
                score = v.fma(builder, score, scale, mean)
                score = v.fma(builder, builder.fneg(capped), excess, score)
                place = builder.add(
                    _at(builder, scores_, token, 4), builder.mul(head_bytes, ir.Constant(v.I64, head))
                )
                v.store(builder, score, place, 0)
            return []

        v.counted_loop(builder, count_, LANES, [], block)
        return context.get_dummy_value()

    given = (rows, count, scales, queries, biases, of_heads, scores, stride)
    return types.void(*given, head_dim, heads, native), codegen


@intrinsic(prefer_literal=True)
def weigh_tokens(typingctx, scores, count, scales, largest, weights, found, head_dim, heads, native):
    """One head's softmax over a few tokens: their weights times scales as bytes, for `sum_codes`.

    scores, scales: addresses of float32 [count + LANES]; largest: of the scales
    weights: of uint8 [count rounded up to LANES, heads, ...] in words of GROUP tokens, this head's first
    found: of float32 [2]: the largest score, the sum of 2 ** (score - largest)
    """
    sizes = _sizes((head_dim, heads, native))
    if sizes is None:
        return None

    def codegen(context, builder, signature, arguments):
        scores_, count_, scales_, largest_, weights_, found_ = arguments[:6]
        empty, zero = v.splat_constant(float("-inf"), LANES), v.splat_constant(0.0, LANES)
        ramp = ir.Constant(_WORD_VECTOR, list(range(LANES)))

        def load(index):
            left = builder.trunc(builder.sub(count_, index), v.I32)
            undefined = ir.Constant(_WORD_VECTOR, ir.Undefined)
            left = builder.insert_element(undefined, left, ir.Constant(v.I32, 0))
            is_there = builder.icmp_signed("<", ramp, v.shuffle(builder, left, undefined, [0] * LANES))
            return builder.select(
                is_there, v.load_floats(builder, _at(builder, scores_, index, 4), 0, LANES), empty
            )

        def larger(index, carried):
            return [v.maximum(builder, load(index), carried[0])]

        (top,) = v.counted_loop(builder, count_, LANES, [empty], larger)
        top = v.fold_lanes(builder, top, 1, v.maximum)
        base = builder.select(builder.fcmp_ordered("==", top, empty), zero, top)
        worth = builder.fdiv(ir.Constant(v.F32, float(WEIGHT_MAX)), largest_)
        worth = v.splat(builder, worth, LANES)

        def weigh(index, carried):
            weight = v.exp2(builder, builder.fsub(load(index), base))
            scale = v.load_floats(builder, _at(builder, scales_, index, 4), 0, LANES)
            scaled = v.fma(builder, builder.fmul(weight, scale), worth, v.splat_constant(0.5, LANES))
            # a scale beyond the last token may be anything
            scaled = builder.select(builder.fcmp_ordered(">", weight, zero), scaled, zero)
            scaled = v.minimum(builder, scaled, v.splat_constant(float(WEIGHT_MAX), LANES))
            whole = builder.trunc(builder.fptoui(scaled, _WORD_VECTOR), v.vector(v.I8, LANES))
            words = builder.bitcast(whole, v.vector(v.I32, LANES // GROUP))
            target = _at(builder, weights_, index, sizes.heads)
            for group in range(LANES // GROUP):
                word = builder.extract_element(words, ir.Constant(v.I32, group))
                v.store(builder, word, target, GROUP * sizes.heads * group)
            return [builder.fadd(carried[0], weight)]

        (total,) = v.counted_loop(builder, count_, LANES, [zero], weigh)
        total = v.fold_lanes(builder, total, 1, lambda builder, a, b: builder.fadd(a, b))
        for place, value in enumerate((top, total)):
            v.store(builder, builder.extract_element(value, ir.Constant(v.I32, 0)), found_, 4 * place)
        return context.get_dummy_value()

    given = (scores, count, scales, largest, weights, found)
    return types.void(*given, head_dim, heads, native), codegen


@intrinsic(prefer_literal=True)
def sum_codes(typingctx, rows, num_groups, weights, factors, sums, head_dim, heads, native):
    """sums[h] += factors[h] * sum over tokens of their byte weights times levels of 2-bit codes.

    rows: address of packed rows, GROUP * num_groups and a cache line behind them are read
    weights: of uint8 [num_groups, heads, GROUP]; factors: of float32 [heads]
    sums: of float32 [heads, slabs, SLAB], channels in the order of scan._place_of_channel
    """
    sizes = _sizes((head_dim, heads, native))
    if sizes is None:
        return None

    def codegen(context, builder, signature, arguments):
        rows_, groups_, weights_, factors_, sums_ = arguments[:5]
        zero = ir.Constant(_WORD_VECTOR, [0] * LANES)
        parts = SLAB // LANES
        for slab in range(sizes.slabs):
            for first, num_heads in near_equal(sizes.heads, TILE_HEADS):

                def add(group, carried, slab=slab, first=first, num_heads=num_heads):
                    row = _at(builder, rows_, group, GROUP * sizes.row_bytes)
                    pieces = [
                        v.load(builder, row, t * sizes.row_bytes + 16 * slab, v.vector(v.I16, 8), align=1)
                        for t in range(GROUP)
                    ]
                    pairs = [
                        v.shuffle(builder, a, b, list(range(16)))
                        for a, b in zip(pieces[::2], pieces[1::2], strict=True)
                    ]
                    # a 64-bit word of GROUP tokens' 8 channels
                    words = v.shuffle(
                        builder, *pairs, [8 * t + place for place in range(8) for t in range(GROUP)]
                    )
                    weight_list = _at(builder, weights_, group, GROUP * sizes.heads)
                    weight = [_splat_word(builder, weight_list, 4 * (first + h)) for h in range(num_heads)]
                    grown = []
                    for part in range(parts):
                        bits = [16 * (i % 4) + 4 * part + 2 * (i // 4) for i in range(8)] * (BYTES // 8)
                        levels = _levels(builder, sizes, words, bits, 0)
                        for h in range(num_heads):
                            total = carried[part * num_heads + h]
                            grown.append(_add_products(builder, sizes, total, weight[h], levels))
                    return grown

                totals = v.counted_loop(builder, groups_, 1, [zero] * (parts * num_heads), add)
                for h in range(num_heads):
                    factor = v.load_splat(builder, factors_, 4 * (first + h), LANES)
                    for part in range(parts):
                        place = 4 * (((first + h) * sizes.slabs + slab) * SLAB + part * LANES)
                        sum_ = v.load_floats(builder, sums_, place, LANES)
                        total = builder.sitofp(totals[part * num_heads + h], _FLOAT_VECTOR)
                        v.store(builder, v.fma(builder, total, factor, sum_), sums_, place)
        return context.get_dummy_value()

    given = (rows, num_groups, weights, factors, sums)
    return types.void(*given, head_dim, heads, native), codegen
