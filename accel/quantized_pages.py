"""Quantized pages: rows of float16 to codes with a scale per channel, and back.

A page's scales are chosen from its own rows, so each is coded at once, when all its tokens are there. Scales
are rounded up, so that no code is out of range. The format is declared in spdk_glue.vendor_command.

A scale per channel (not one per page) is what keys need, whose channels differ in size by far: KIVI
(arXiv:2402.02750). It costs a reader nothing per row: keys' scales go into the query, values' into the sums.
"""

import zlib
from functools import cache
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from accel.workers import vector_ir as v
from accel.workers.target import host_target
from spdk_glue.vendor_command import KvDtype, scale_bytes, tokens_per_page

LARGEST_CODE = {KvDtype.FLOAT8_E4M3: 448.0, KvDtype.INT8: 127.0, KvDtype.INT4: 7.0}
FLOAT16_BYTES = 2
_EMITTERS = zlib.crc32(Path(v.__file__).read_bytes())


def _literals(sizes) -> list[int] | None:
    return (
        [size.literal_value for size in sizes]
        if all(isinstance(s, types.IntegerLiteral) for s in sizes)
        else None
    )


def _scales_up(builder, scale):
    """Rounded up to bfloat16, in float32; 1 where there is nothing but zeros to scale."""
    lanes = scale.type.count
    integers = v.vector(v.I32, lanes)
    raised = builder.add(builder.bitcast(scale, integers), v.splat_constant(0xFFFF, lanes, v.I32))
    raised = builder.bitcast(builder.and_(raised, v.splat_constant(0xFFFF0000, lanes, v.I32)), scale.type)
    zero = v.splat_constant(0.0, lanes)
    return builder.select(builder.fcmp_ordered("==", scale, zero), v.splat_constant(1.0, lanes), raised)


def _code(builder, value, dtype: int):
    """int32 lanes: the codes nearest to what is within their range."""
    lanes = value.type.count
    integers = v.vector(v.I32, lanes)
    if dtype != v.FLOAT8:
        return builder.bitcast(builder.fadd(value, v.splat_constant(v.ROUNDER, lanes)), integers)

    def constant(number):
        return v.splat_constant(number, lanes, v.I32)

    # with e4m3's exponents where float32 has its own, its codes are the upper bits, subnormal ones as well
    bits = builder.bitcast(builder.fmul(value, v.splat_constant(2.0**-120, lanes)), integers)
    size = builder.and_(bits, constant(0x7FFFFFFF))
    is_odd = builder.and_(builder.lshr(size, constant(20)), constant(1))
    code = builder.lshr(builder.add(builder.add(size, constant(0x7FFFF)), is_odd), constant(20))
    return builder.or_(code, builder.and_(builder.lshr(bits, constant(24)), constant(0x80)))


@intrinsic(prefer_literal=True)
def _encode(typingctx, rows, count, page, scales, dtype, head_dim, lanes, converts_half):
    """Codes and scales of rows of float16 at the addresses rows[t], t < count, written to a page."""
    sizes = (dtype, head_dim, lanes, converts_half)
    literals = _literals(sizes)
    if literals is None:
        return None
    dtype_, head_dim_, lanes_, converts_half_ = literals
    width = head_dim_ * v.ITEM_BITS[dtype_] // 8

    def codegen(context, builder, signature, arguments):
        rows_, count_, page_, scales_ = arguments[:4]

        def row_at(index):
            return v.load(
                builder, builder.add(rows_, builder.mul(index, ir.Constant(v.I64, 8))), 0, v.I64, align=8
            )

        def element(row, first):
            return v.load_widened(builder, row, FLOAT16_BYTES * first, v.FLOAT16, lanes_, bool(converts_half_))

        def inverse_scale(first):
            """Of the channels from `first` on, whose scales it stores."""

            def larger(index, carried):
                return [v.maximum(builder, v.absolute(builder, element(row_at(index), first)), carried[0])]

            (largest,) = v.counted_loop(builder, count_, 1, [v.splat_constant(0.0, lanes_)], larger)
            limit = v.splat_constant(1 / LARGEST_CODE[KvDtype(dtype_)], lanes_)
            scale = _scales_up(builder, builder.fmul(largest, limit))
            upper = builder.lshr(
                builder.bitcast(scale, v.vector(v.I32, lanes_)), v.splat_constant(16, lanes_, v.I32)
            )
            v.store(builder, builder.trunc(upper, v.vector(v.I16, lanes_)), scales_, 2 * first, align=2)
            return builder.fdiv(v.splat_constant(1.0, lanes_), scale)

        def code(row, first, inverse):
            return _code(builder, builder.fmul(element(row, first), inverse), dtype_)

        def place(index):
            return builder.add(page_, builder.mul(index, ir.Constant(v.I64, width)))

        bytes_ = v.vector(v.I8, lanes_)
        if dtype_ != v.INT4:
            for first in range(0, head_dim_, lanes_):
                inverse = inverse_scale(first)

                def put(index, _, first=first, inverse=inverse):
                    codes = builder.trunc(code(row_at(index), first, inverse), bytes_)
                    v.store(builder, codes, place(index), first, align=1)
                    return []

                v.counted_loop(builder, count_, 1, [], put)
            return context.get_dummy_value()
        for first in range(0, head_dim_, 32):  # 16 bytes: channels of the low halves, then of the high ones
            for part in range(first, first + 16, lanes_):
                low, high = inverse_scale(part), inverse_scale(part + 16)

                def put(index, _, part=part, first=first, low=low, high=high):
                    eight, fifteen = (v.splat_constant(number, lanes_, v.I32) for number in (8, 15))
                    row = row_at(index)
                    lower, upper = (
                        builder.and_(builder.add(code(row, channel, inverse), eight), fifteen)
                        for channel, inverse in ((part, low), (part + 16, high))
                    )
                    both = builder.or_(lower, builder.shl(upper, v.splat_constant(4, lanes_, v.I32)))
                    v.store(builder, builder.trunc(both, bytes_), place(index), first // 2 + part % 16, align=1)
                    return []

                v.counted_loop(builder, count_, 1, [], put)
        return context.get_dummy_value()

    return types.void(rows, count, page, scales, *sizes), codegen


@intrinsic(prefer_literal=True)
def _decode(typingctx, first_row, count, scales, target, dtype, head_dim, lanes, converts_half):
    """float32 rows at `target`, from `count` rows of codes from address first_row on."""
    sizes = (dtype, head_dim, lanes, converts_half)
    literals = _literals(sizes)
    if literals is None:
        return None
    dtype_, head_dim_, lanes_, converts_half_ = literals
    width = head_dim_ * v.ITEM_BITS[dtype_] // 8

    def codegen(context, builder, signature, arguments):
        first_row_, count_, scales_, target_ = arguments[:4]
        for first in range(0, head_dim_, lanes_):
            scale = v.load_widened(builder, scales_, 2 * first, v.BFLOAT16, lanes_, bool(converts_half_))
            if dtype_ == v.FLOAT8:
                scale = builder.fmul(scale, v.splat_constant(v.FLOAT8_FACTOR, lanes_))

            def put(index, _, first=first, scale=scale):
                row = builder.add(first_row_, builder.mul(index, ir.Constant(v.I64, width)))
                codes = v.load_codes(builder, row, first, dtype_, lanes_, bool(converts_half_))
                to = builder.add(target_, builder.mul(index, ir.Constant(v.I64, 4 * head_dim_)))
                v.store(builder, builder.fmul(codes, scale), to, 4 * first)
                return []

            v.counted_loop(builder, count_, 1, [], put)
        return context.get_dummy_value()

    return types.void(first_row, count, scales, target, *sizes), codegen


def _lanes(head_dim: int) -> int:
    return next(lanes for lanes in (16, 8) if head_dim % lanes == 0)


@cache
def _encoder(dtype: int, head_dim: int, lanes: int, converts_half: int):
    emitters = _EMITTERS
    source_row_bytes = FLOAT16_BYTES * head_dim

    @njit(nogil=True, cache=True, boundscheck=False)
    def encode(images, image_page_rows, first_row, num_rows, page_rows, scales_offset, pages):
        # images: uint8 [runs, image pages, page size], pages: uint8 [runs, pages, page size]
        emitters  # noqa: B018 - makes it part of the key
        rows = np.empty(page_rows, np.int64)
        for run in range(images.shape[0]):
            source = np.int64(images.ctypes.data) + run * images.strides[0]
            target = np.int64(pages.ctypes.data) + run * pages.strides[0]
            for page in range(pages.shape[1]):
                count = min(page_rows, num_rows - page * page_rows)
                for i in range(count):
                    image_page, row = divmod(first_row + page * page_rows + i, image_page_rows)
                    rows[i] = source + image_page * images.strides[1] + row * source_row_bytes
                at = target + page * pages.strides[1]
                _encode(rows.ctypes.data, count, at, at + scales_offset, dtype, head_dim, lanes, converts_half)

    return encode


@cache
def _decoder(dtype: int, head_dim: int, lanes: int, converts_half: int):
    emitters = _EMITTERS

    @njit(nogil=True, cache=True, boundscheck=False)
    def decode(pages, page_rows, scales_offset, rows):
        # pages: uint8 [num_pages, page size]; rows: float32 [num_pages, page_rows, head_dim]
        emitters  # noqa: B018 - makes it part of the key
        for page in range(pages.shape[0]):
            at = np.int64(pages.ctypes.data) + page * pages.strides[0]
            target = np.int64(rows.ctypes.data) + page * rows.strides[0]
            _decode(at, page_rows, at + scales_offset, target, dtype, head_dim, lanes, converts_half)

    return decode


def _sizes(dtype: KvDtype, head_dim: int) -> tuple[int, int, int, int]:
    return int(dtype), head_dim, _lanes(head_dim), int(host_target().converts_half)


def encode_pages(
    images: np.ndarray,
    image_page_rows: int,
    first_row: int,
    num_rows: int,
    dtype: KvDtype,
    head_dim: int,
    pages,
) -> None:
    """Fill quantized pages with rows [first_row, first_row + num_rows) of each run, and leave slack alone.

    images: uint8 [num_runs, num_image_pages, page_size], pages of image_page_rows rows of float16, all finite
    pages: uint8 [num_runs, num_pages, page_size], zeroed, with room for num_rows rows
    """
    page_size = pages.shape[2]
    encode = _encoder(*_sizes(dtype, head_dim))
    scales_offset = page_size - scale_bytes(head_dim, dtype)
    encode(
        images,
        image_page_rows,
        first_row,
        num_rows,
        tokens_per_page(page_size, head_dim, dtype),
        scales_offset,
        pages,
    )


def decode_pages(pages: np.ndarray, dtype: KvDtype, head_dim: int) -> np.ndarray:
    """float16 [num_pages, tokens_per_page, head_dim]: all rows of pages, uint8 [num_pages, page_size]."""
    page_size = pages.shape[1]
    page_rows = tokens_per_page(page_size, head_dim, dtype)
    rows = np.empty((len(pages), page_rows, head_dim), np.float32)
    decode = _decoder(*_sizes(dtype, head_dim))
    decode(np.ascontiguousarray(pages), page_rows, page_size - scale_bytes(head_dim, dtype), rows)
    # scales are rounded up, so the largest code may be a little more than float16 takes
    limit = np.finfo(np.float16).max
    return rows.clip(-limit, limit, out=rows).astype(np.float16)
