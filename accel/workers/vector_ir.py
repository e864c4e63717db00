"""Micro-kernels of the numba worker, emitted as LLVM vector code.

Numba has no vector values, so the inner steps are intrinsics that write LLVM IR: rows of fp16, bf16 or
fp32 are widened in registers, accumulators stay in registers, and LLVM lowers the vectors to what the
CPU has (AVX2, AVX-512, NEON). Every size is a literal, so loops over head_dim and heads are unrolled.

Names: `lanes` floats per vector; `heads` query heads worked on together; `stride` the scores' floats
per token, `heads` rounded up to a power of two, so that lane l of any score vector belongs to head
l % stride.
"""

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT16, BFLOAT16, FLOAT32 = range(3)
ITEM_SIZE = (2, 2, 4)

_F32 = ir.FloatType()
_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


def _vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _splat_constant(value: float, lanes: int) -> ir.Constant:
    return ir.Constant(_vector(_F32, lanes), [value] * lanes)


def _pointer(builder: ir.IRBuilder, address, offset: int, pointee: ir.Type):
    return builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), pointee.as_pointer())


def _load(builder: ir.IRBuilder, address, offset: int, lanes: int, align: int = 4):
    return builder.load(_pointer(builder, address, offset, _vector(_F32, lanes)), align=align)


def _store(builder: ir.IRBuilder, value, address, offset: int) -> None:
    builder.store(value, _pointer(builder, address, offset, value.type), align=4)


def _load_widened(builder: ir.IRBuilder, address, offset: int, dtype: int, lanes: int):
    """`lanes` stored values as float32."""
    if dtype == FLOAT32:
        return _load(builder, address, offset, lanes)
    if dtype == FLOAT16:
        half = builder.load(_pointer(builder, address, offset, _vector(ir.HalfType(), lanes)), align=2)
        return builder.fpext(half, _vector(_F32, lanes))
    raw = builder.load(_pointer(builder, address, offset, _vector(_I16, lanes)), align=2)
    wide = builder.zext(raw, _vector(_I32, lanes))
    shift = ir.Constant(_vector(_I32, lanes), [16] * lanes)
    return builder.bitcast(builder.shl(wide, shift), _vector(_F32, lanes))


def _call(builder: ir.IRBuilder, function: str, *arguments):
    """A call of an overloaded LLVM intrinsic on vectors or floats."""
    kind = arguments[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    signature = ir.FunctionType(kind, [argument.type for argument in arguments])
    declared = cgutils.get_or_insert_function(builder.module, signature, f"llvm.{function}.{suffix}")
    return builder.call(declared, arguments)


def _fma(builder, a, b, c):
    return _call(builder, "fma", a, b, c)


def _shuffle(builder: ir.IRBuilder, a, b, lanes: list[int]):
    return builder.shuffle_vector(a, b, ir.Constant(_vector(_I32, len(lanes)), lanes))


def _sum_each(builder: ir.IRBuilder, vectors: list, lanes: int):
    """One vector whose lane i is the sum of vectors[i]; there are `lanes` vectors.

    Pairs are added inside groups of four lanes, which every instruction set shuffles cheaply, then the
    groups are added up.
    """
    for _ in range(2):
        even, odd = [], []
        for group in range(0, lanes, 4):
            even += [group, group + 2, lanes + group, lanes + group + 2]
            odd += [group + 1, group + 3, lanes + group + 1, lanes + group + 3]
        vectors = [
            builder.fadd(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    total = None
    for group in range(0, lanes, 4):
        part = None
        for vector in vectors:
            piece = _shuffle(builder, vector, vector, list(range(group, group + 4)))
            part = piece if part is None else _concatenate(builder, part, piece)
        total = part if total is None else builder.fadd(total, part)
    return total


def _concatenate(builder: ir.IRBuilder, a, b):
    """Lanes of `a` followed by the four of `b`."""
    size = a.type.count
    if size > 4:  # shufflevector wants operands of one type
        b = _shuffle(builder, b, b, [lane % 4 for lane in range(size)])
    return _shuffle(builder, a, b, list(range(size)) + [size + lane for lane in range(4)])


def _fold(builder: ir.IRBuilder, vector, stride: int, combine):
    """Combine the lanes of each head; every lane ends with its head's result."""
    lanes = vector.type.count
    shift = lanes // 2
    while shift >= stride:
        turned = _shuffle(builder, vector, vector, [(lane + shift) % lanes for lane in range(lanes)])
        vector = combine(vector, turned)
        shift //= 2
    return vector


_LOG2_E = 1.4426950408889634
# ln 2 in two parts: the first has few bits, so that n * _LN2_HIGH is exact for every n that occurs
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_EXP_MIN = -87.0  # below, exp is taken as zero: under 1e-37 of the largest weight


def _exp(builder: ir.IRBuilder, x):
    """exp(x) for x <= 0, relative error below 2e-7; NaN stays NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its Taylor series to r**7, 2**n by exponent arithmetic.
    """
    lanes = x.type.count

    def constant(value):
        return _splat_constant(value, lanes)

    n = _call(builder, "rint", builder.fmul(x, constant(_LOG2_E)))
    r = _fma(builder, n, constant(-_LN2_HIGH), x)
    r = _fma(builder, n, constant(-_LN2_LOW), r)
    power = constant(1 / math.factorial(7))
    for degree in range(6, -1, -1):
        power = _fma(builder, power, r, constant(1 / math.factorial(degree)))
    exponent = builder.fptosi(n, _vector(_I32, lanes))
    shift = ir.Constant(_vector(_I32, lanes), [23] * lanes)
    bits = builder.add(builder.bitcast(power, _vector(_I32, lanes)), builder.shl(exponent, shift))
    result = builder.bitcast(bits, _vector(_F32, lanes))
    result = builder.select(builder.fcmp_ordered("<", x, constant(_EXP_MIN)), constant(0.0), result)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, result)


def _literals(*arguments) -> list[int] | None:
    if not all(isinstance(argument, types.IntegerLiteral) for argument in arguments):
        return None
    return [argument.literal_value for argument in arguments]


@intrinsic(prefer_literal=True)
def score_tokens(typingctx, keys, queries, scores, dtype, head_dim, heads, stride, tokens, lanes):
    """Scores of `tokens` rows at address `keys`: float32 [tokens, stride] at address `scores`.

    queries: address of float32 [heads, head_dim], already scaled. tokens * stride <= lanes; lanes of the
    stride beyond `heads` are set to zero.
    """
    sizes = _literals(dtype, head_dim, heads, stride, tokens, lanes)
    if sizes is None:
        return None
    dtype_, head_dim_, heads_, stride_, tokens_, lanes_ = sizes

    def codegen(context, builder, signature, arguments):
        key, query, score = arguments[:3]
        item = ITEM_SIZE[dtype_]
        zero = _splat_constant(0.0, lanes_)
        sums = {(t, h): zero for t in range(tokens_) for h in range(heads_)}
        for start in range(0, head_dim_, lanes_):
            rows = [
                _load_widened(builder, key, (t * head_dim_ + start) * item, dtype_, lanes_)
                for t in range(tokens_)
            ]
            for h in range(heads_):
                part = _load(builder, query, (h * head_dim_ + start) * 4, lanes_)
                for t in range(tokens_):
                    sums[t, h] = _fma(builder, rows[t], part, sums[t, h])
        vectors = [sums.get((lane // stride_, lane % stride_), zero) for lane in range(lanes_)]
        result = _sum_each(builder, vectors, lanes_)
        if tokens_ * stride_ < lanes_:
            result = _shuffle(builder, result, result, list(range(tokens_ * stride_)))
        _store(builder, result, score, 0)
        return context.get_dummy_value()

    return types.void(keys, queries, scores, dtype, head_dim, heads, stride, tokens, lanes), codegen


@intrinsic(prefer_literal=True)
def softmax_block(typingctx, scores, num_vectors, top, total, correction, stride, lanes):
    """One step of online softmax over `num_vectors` score vectors, which become weights in place.

    top, total, correction: addresses of float32 [lanes]. top becomes the new maximum, correction
    exp(old top - new top), total is corrected and grows by the weights (lane by lane: the caller adds
    the lanes of a head).
    """
    sizes = _literals(stride, lanes)
    if sizes is None:
        return None
    stride_, lanes_ = sizes

    def codegen(context, builder, signature, arguments):
        score, count, top_, total_, correction_ = arguments[:5]
        kind = _vector(_F32, lanes_)
        step = ir.Constant(_I64, 4 * lanes_)

        def at(index):
            return builder.add(score, builder.mul(index, step))

        old = _load(builder, top_, 0, lanes_)
        best = cgutils.alloca_once_value(builder, old)
        with cgutils.for_range(builder, count) as loop:
            vector = _load(builder, at(loop.index), 0, lanes_)
            builder.store(_call(builder, "maxnum", builder.load(best), vector), best)
        new = _fold(builder, builder.load(best), stride_, lambda a, b: _call(builder, "maxnum", a, b))
        factor = _exp(builder, builder.fsub(old, new))
        sums = cgutils.alloca_once_value(builder, ir.Constant(kind, [0.0] * lanes_))
        with cgutils.for_range(builder, count) as loop:
            address = at(loop.index)
            weight = _exp(builder, builder.fsub(_load(builder, address, 0, lanes_), new))
            _store(builder, weight, address, 0)
            builder.store(builder.fadd(builder.load(sums), weight), sums)
        grown = _fma(builder, _load(builder, total_, 0, lanes_), factor, builder.load(sums))
        _store(builder, grown, total_, 0)
        _store(builder, new, top_, 0)
        _store(builder, factor, correction_, 0)
        return context.get_dummy_value()

    return types.void(scores, num_vectors, top, total, correction, stride, lanes), codegen


@intrinsic(prefer_literal=True)
def add_weighted_rows(
    typingctx, values, weights, sums, num_tokens, dtype, head_dim, heads, stride, chunks, lanes
):
    """sums[h] += weights[t, h] * values[t] over `num_tokens` rows, for `chunks` vectors of head_dim.

    values: address of the first chunk in row 0; weights: float32 [num_tokens, stride]; sums: address of
    the first chunk in float32 [heads, head_dim]. heads * chunks accumulators stay in registers.
    """
    sizes = _literals(dtype, head_dim, heads, stride, chunks, lanes)
    if sizes is None:
        return None
    dtype_, head_dim_, heads_, stride_, chunks_, lanes_ = sizes

    def codegen(context, builder, signature, arguments):
        value, weight, sum_, count = arguments[:4]
        item = ITEM_SIZE[dtype_]
        places = [(h, c) for h in range(heads_) for c in range(chunks_)]
        accumulators = {
            (h, c): cgutils.alloca_once_value(
                builder, _load(builder, sum_, (h * head_dim_ + c * lanes_) * 4, lanes_)
            )
            for h, c in places
        }
        with cgutils.for_range(builder, count) as loop:
            row = builder.add(value, builder.mul(loop.index, ir.Constant(_I64, head_dim_ * item)))
            scale = builder.add(weight, builder.mul(loop.index, ir.Constant(_I64, stride_ * 4)))
            widened = [
                _load_widened(builder, row, c * lanes_ * item, dtype_, lanes_) for c in range(chunks_)
            ]
            for h in range(heads_):
                scalar = builder.load(_pointer(builder, scale, 4 * h, _F32), align=4)
                undefined = ir.Constant(_vector(_F32, lanes_), ir.Undefined)
                single = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
                splat = _shuffle(builder, single, undefined, [0] * lanes_)
                for c in range(chunks_):
                    accumulator = accumulators[h, c]
                    builder.store(_fma(builder, widened[c], splat, builder.load(accumulator)), accumulator)
        for h, c in places:
            _store(builder, builder.load(accumulators[h, c]), sum_, (h * head_dim_ + c * lanes_) * 4)
        return context.get_dummy_value()

    signature = types.void(
        values, weights, sums, num_tokens, dtype, head_dim, heads, stride, chunks, lanes
    )
    return signature, codegen


@intrinsic(prefer_literal=True)
def prefetch(typingctx, address):
    """Ask for the cache line at an address, to be read soon."""

    def codegen(context, builder, signature, arguments):
        kind = _I8.as_pointer()
        function = ir.FunctionType(ir.VoidType(), [kind, _I32, _I32, _I32])
        declared = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0i8")
        pointer = builder.inttoptr(arguments[0], kind)
        builder.call(declared, [pointer, *(ir.Constant(_I32, flag) for flag in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(address), codegen
