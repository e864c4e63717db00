"""The steps that attention over sketches adds to those of accel.workers.micro_kernels, as LLVM vector code.

A block's scores and weights lie as there: float32 [token][head], heads padded to `stride`. Arrays of a float
per token may be read up to a vector beyond the block's end.
"""

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from accel.sketch import codebook
from accel.workers import vector_ir as v
from accel.workers.micro_kernels import Shape, _at, _shape
from accel.workers.vector_ir import I64

LANES_MAX = 16


@intrinsic(prefer_literal=True)
def copy_bytes(typingctx, target, source, count):
    """Copy bytes from an address to another."""

    def codegen(context, builder, signature, arguments):
        target_, source_ = (builder.inttoptr(at, v.I8.as_pointer()) for at in arguments[:2])
        cgutils.raw_memcpy(builder, target_, source_, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(target, source, count), codegen


@intrinsic(prefer_literal=True)
def token_scales(
    typingctx, codes, count, base, step, target,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """target[t] = base * 2 ** (step * codes[t]) for t < count, and up to a vector more.

    codes: address of uint8 [count + lanes]; base, step: float32; target: address of float32 [count + lanes]
    """
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        codes_, count_, base_, step_, target_ = arguments[:5]
        base_, step_ = (v.splat(builder, value, shape.lanes) for value in (base_, step_))

        def scale(index, _):
            raw = v.load(builder, builder.add(codes_, index), 0, v.vector(v.I8, shape.lanes), align=1)
            code = builder.uitofp(builder.zext(raw, v.vector(v.I32, shape.lanes)), v.vector(v.F32, shape.lanes))
            power = v.exp2(builder, builder.fmul(code, step_))
            v.store(builder, builder.fmul(power, base_), _at(builder, target_, index, 4), 0)
            return []

        v.counted_loop(builder, count_, shape.lanes, [], scale)
        return context.get_dummy_value()

    return types.void(codes, count, base, step, target, *sizes), codegen


@intrinsic(prefer_literal=True)
def widen_halves(
    typingctx, halves, target,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """float32 [head_dim] at an address, of float16 [head_dim] at another."""
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        halves_, target_ = arguments[:2]

        def widen(index, _):
            at = _at(builder, halves_, index, 2)
            row = v.load_widened(builder, at, 0, v.FLOAT16, shape.lanes, bool(shape.converts_half))
            v.store(builder, row, _at(builder, target_, index, 4), 0)
            return []

        v.counted_loop(builder, ir.Constant(I64, shape.head_dim), shape.lanes, [], widen)
        return context.get_dummy_value()

    return types.void(halves, target, *sizes), codegen


def _per_token(builder, shape: Shape, floats, index):
    """The vector of a float per token that belongs to the vector of scores at `index`."""
    if shape.stride >= shape.lanes:
        token = builder.udiv(index, ir.Constant(I64, shape.stride))
        return v.load_splat(builder, _at(builder, floats, token, 4), 0, shape.lanes)
    token = builder.udiv(index, ir.Constant(I64, shape.stride))
    tokens = shape.lanes // shape.stride
    loaded = v.load_floats(builder, _at(builder, floats, token, 4), 0, tokens)
    return v.shuffle(builder, loaded, loaded, [lane // shape.stride for lane in range(shape.lanes)])


def _for_scores(builder, shape: Shape, count, body) -> None:
    """Emits body(index, offset) for each vector of scores of `count` tokens: at `index` + offset floats."""
    num_floats = builder.mul(count, ir.Constant(I64, shape.stride))

    def turn(index, _):
        for column in range(shape.columns):
            body(index, column * shape.lanes)
        return []

    v.counted_loop(builder, num_floats, shape.columns * shape.lanes, [], turn)


@intrinsic(prefer_literal=True)
def finish_scores(
    typingctx, scores, count, scales, mean_scores, deviation,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """scores[t, h] = scales[t] * scores[t, h] + mean_scores[h] - what codes' noise raises the weight by.

    scales: address of float32 [count + lanes]; mean_scores, deviation: of float32 [max(stride, lanes)], a
    head's in each of its lanes. A score's standard deviation s is deviation * scales[t], in units of sqrt(2 *
    ln 2): then s**2, up to CORRECTED_DEVIATION, is what comes off a score to base 2; beyond it goes on
    linearly.
    """
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        scores_, count_, scales_, means_, deviation_ = arguments[:5]
        lanes_ = shape.lanes
        limit = v.splat_constant(codebook.CORRECTED_DEVIATION / math.sqrt(2 * math.log(2)), lanes_)

        def finish(index, offset):
            address = _at(builder, scores_, index, 4)
            scale = _per_token(builder, shape, scales_, index)
            score = v.load_floats(builder, address, 4 * offset, lanes_)
            spread = builder.fmul(scale, v.load_floats(builder, deviation_, 4 * offset, lanes_))
            capped = v.minimum(builder, spread, limit)
            # 2 * capped * spread - capped**2: the square, or its tangent
            excess = builder.fsub(builder.fadd(spread, spread), capped)
            score = v.fma(builder, score, scale, v.load_floats(builder, means_, 4 * offset, lanes_))
            score = v.fma(builder, builder.fneg(capped), excess, score)
            v.store(builder, score, address, 4 * offset)

        _for_scores(builder, shape, count_, finish)
        return context.get_dummy_value()

    return types.void(scores, count, scales, mean_scores, deviation, *sizes), codegen


@intrinsic(prefer_literal=True)
def scale_weights(
    typingctx, weights, count, scales,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """weights[t, h] *= scales[t]"""
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        weights_, count_, scales_ = arguments[:3]

        def scale(index, offset):
            address = _at(builder, weights_, index, 4)
            weight = v.load_floats(builder, address, 4 * offset, shape.lanes)
            factor = _per_token(builder, shape, scales_, index)
            v.store(builder, builder.fmul(weight, factor), address, 4 * offset)

        _for_scores(builder, shape, count_, scale)
        return context.get_dummy_value()

    return types.void(weights, count, scales, *sizes), codegen


@intrinsic(prefer_literal=True)
def add_noise(
    typingctx, weights, count, key_scales, value_scales, deviation, distortion, factor, noise,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """Adds up what codes cause: noise[0] that of values, noise[1] that of weights; see reference.

    With w a weight and s a score's standard deviation: noise[1] += w**2 * (1 - exp(-s**2)), noise[0] += w**2 *
    (1 - exp(-s**2) + distortion) * value_scale**2; both are scaled by factor**2 before.

    deviation: as of finish_scores; factor: address of float32 [max(stride, lanes)]; noise: of float32
    [2, max(stride, LANES_MAX)], a head's lanes are still to be added
    """
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        weights_, count_, keys_, values_, deviation_, distortion_, factor_, noise_ = arguments[:8]
        lanes_ = shape.lanes
        one = v.splat_constant(1.0, lanes_)
        distortion_ = v.splat(builder, distortion_, lanes_)
        width = 4 * max(shape.stride, LANES_MAX)
        num_floats = builder.mul(count_, ir.Constant(I64, shape.stride))
        for column in range(shape.columns):
            offset = 4 * column * lanes_

            def add(index, carried, offset=offset):
                weight = v.load_floats(builder, _at(builder, weights_, index, 4), offset, lanes_)
                square = builder.fmul(weight, weight)
                spread = builder.fmul(
                    _per_token(builder, shape, keys_, index),
                    v.load_floats(builder, deviation_, offset, lanes_),
                )
                # exp(-s**2) is 2**(-2 * spread**2)
                power = builder.fmul(builder.fmul(spread, spread), v.splat_constant(-2.0, lanes_))
                of_weight = builder.fsub(one, v.exp2(builder, power))
                scale = _per_token(builder, shape, values_, index)
                of_value = builder.fmul(builder.fadd(of_weight, distortion_), builder.fmul(scale, scale))
                return [
                    v.fma(builder, square, of_value, carried[0]),
                    v.fma(builder, square, of_weight, carried[1]),
                ]

            rescale = v.load_floats(builder, factor_, offset, lanes_)
            rescale = builder.fmul(rescale, rescale)
            carried = [
                builder.fmul(v.load_floats(builder, noise_, offset + part * width, lanes_), rescale)
                for part in range(2)
            ]
            carried = v.counted_loop(builder, num_floats, shape.columns * lanes_, carried, add)
            for part, value in enumerate(carried):
                v.store(builder, value, noise_, offset + part * width)
        return context.get_dummy_value()

    given = (weights, count, key_scales, value_scales, deviation, distortion, factor, noise)
    return types.void(*given, *sizes), codegen


@intrinsic(prefer_literal=True)
def refine_rows(
    typingctx, codes, refinement, count, target,
    dtype, head_dim, heads, lanes, accumulators, converts_half,
):  # fmt: skip
    """float32 target[t, channel]: levels of 6-bit codes.

    codes: address of rows of 2-bit codes, packed; refinement: of rows of 4-bit codes
    """
    sizes = (dtype, head_dim, heads, lanes, accumulators, converts_half)
    shape = _shape(sizes)
    if shape is None:
        return None

    def codegen(context, builder, signature, arguments):
        codes_, refinement_, count_, target_ = arguments[:4]
        lanes_ = shape.lanes

        def constant(value):
            return v.splat_constant(value, lanes_, v.I32)

        def refine(index, _):
            row = _at(builder, codes_, index, shape.head_dim // 4)
            finer = _at(builder, refinement_, index, shape.head_dim // 2)
            to = _at(builder, target_, index, 4 * shape.head_dim)
            for first in range(0, shape.head_dim, lanes_):
                code = v.load_bits(builder, row, first, 2, lanes_)
                low = builder.and_(v.load_bits(builder, finer, first, 4, lanes_), constant(15))
                magnitude = builder.or_(low, builder.shl(builder.and_(code, constant(1)), constant(4)))
                level = v.look_up(builder, codebook.REFINED_LEVELS, magnitude)
                v.store(builder, v.negative_at_bit(builder, level, code, 1), to, 4 * first)
            return []

        v.counted_loop(builder, count_, 1, [], refine)
        return context.get_dummy_value()

    return types.void(codes, refinement, count, target, *sizes), codegen
