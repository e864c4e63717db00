"""Words for writing LLVM vector code: loads that widen, sums over lanes, exp2, counted loops.

Numba has no vector values, so the inner steps of the numba worker are intrinsics that emit LLVM IR. LLVM
lowers a vector of any number of lanes to what the CPU has. Addresses are int64, offsets constant bytes.
"""

import math
from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils

from accel.sketch import codebook
from accel.workers.target import can_permute
from spdk_glue import vendor_command
from spdk_glue.vendor_command import KvDtype

FLOAT16, BFLOAT16, FLOAT32, FLOAT8, INT8, INT4 = (int(dtype) for dtype in KvDtype)
SKETCH = len(KvDtype)  # rows of 2-bit codes, see accel/sketch; no type of rows in token-major pages
ITEM_BITS = (*(vendor_command.ITEM_BITS[dtype] for dtype in KvDtype), 2)
QUANTIZED = tuple(int(dtype) for dtype in vendor_command.QUANTIZED)
FLOAT8_FACTOR = 2.0**8  # what `load_codes` of float8 is short of

F32 = ir.FloatType()
I1 = ir.IntType(1)
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def splat_constant(value: float, lanes: int, element: ir.Type = F32) -> ir.Constant:
    return ir.Constant(vector(element, lanes), [value] * lanes)


def pointer(builder: ir.IRBuilder, address, offset: int, pointee: ir.Type):
    at = builder.inttoptr(address, I8.as_pointer())
    if offset:  # an offset from a pointer folds into the address of the instruction that uses it
        at = builder.gep(at, [ir.Constant(I64, offset)], inbounds=True)
    return builder.bitcast(at, pointee.as_pointer())


def load(builder: ir.IRBuilder, address, offset: int, kind: ir.Type, align: int = 4):
    return builder.load(pointer(builder, address, offset, kind), align=align)


def load_floats(builder: ir.IRBuilder, address, offset: int, lanes: int):
    return load(builder, address, offset, vector(F32, lanes))


def splat(builder: ir.IRBuilder, value, lanes: int):
    """A float32 in all lanes."""
    undefined = ir.Constant(vector(F32, lanes), ir.Undefined)
    single = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return shuffle(builder, single, undefined, [0] * lanes)


def load_splat(builder: ir.IRBuilder, address, offset: int, lanes: int):
    """A float32 from memory in all lanes."""
    return splat(builder, load(builder, address, offset, F32), lanes)


def forget(builder: ir.IRBuilder, address):
    """The same address, unknown to LLVM as such: what is loaded through both is loaded twice."""
    assembly = ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0", side_effect=False)
    return builder.call(assembly, [address])


def store(builder: ir.IRBuilder, value, address, offset: int, align: int = 4) -> None:
    builder.store(value, pointer(builder, address, offset, value.type), align=align)


def load_widened(builder: ir.IRBuilder, address, offset: int, dtype: int, lanes: int, converts_half: bool):
    """`lanes` stored values as float32."""
    if dtype == FLOAT32:
        return load_floats(builder, address, offset, lanes)
    if dtype == FLOAT16 and converts_half:
        half = load(builder, address, offset, vector(ir.HalfType(), lanes), align=2)
        return builder.fpext(half, vector(F32, lanes))
    raw = load(builder, address, offset, vector(I16, lanes), align=2)
    bits = builder.zext(raw, vector(I32, lanes))
    if dtype == FLOAT16:
        return _half_bits_to_float(builder, bits)
    shifted = builder.shl(bits, splat_constant(16, lanes, I32))
    return builder.bitcast(shifted, vector(F32, lanes))


def load_codes(builder: ir.IRBuilder, address, first: int, dtype: int, lanes: int, converts_half: bool):
    """Codes of a quantized row's channels [first, first + lanes), float32; float8 without FLOAT8_FACTOR."""
    if dtype == INT4:
        segment, place = divmod(first, 32)
        raw = load(builder, address, 16 * segment + place % 16, vector(I8, lanes), align=1)
        four = splat_constant(4, lanes, I8)
        nibbles = builder.lshr(raw, four) if place >= 16 else builder.and_(raw, splat_constant(15, lanes, I8))
        codes = builder.sub(builder.zext(nibbles, vector(I32, lanes)), splat_constant(8, lanes, I32))
        return builder.sitofp(codes, vector(F32, lanes))
    raw = load(builder, address, first, vector(I8, lanes), align=1)
    if dtype == INT8:
        return builder.sitofp(builder.sext(raw, vector(I32, lanes)), vector(F32, lanes))
    # the bits of e4m3 are those of float16 with a shorter exponent: a factor, which scales take in
    bits = builder.zext(raw, vector(I16, lanes))
    sign = builder.shl(builder.and_(bits, splat_constant(0x80, lanes, I16)), splat_constant(8, lanes, I16))
    rest = builder.shl(builder.and_(bits, splat_constant(0x7F, lanes, I16)), splat_constant(7, lanes, I16))
    half = builder.or_(sign, rest)
    if converts_half:
        return builder.fpext(builder.bitcast(half, vector(ir.HalfType(), lanes)), vector(F32, lanes))
    return _half_bits_to_float(builder, builder.zext(half, vector(I32, lanes)))


def load_bits(builder: ir.IRBuilder, address, first: int, bits: int, lanes: int):
    """int32 lanes whose low `bits` (2 or 4) are a row's codes from channel `first` on; the others are not zero.

    Codes are a bit string in the order of channels. Words of 32 bits are read whole, also a row's last.
    """
    per_word = 32 // bits
    words = [first // per_word + place for place in range(max(1, lanes // per_word))]
    loaded = load(builder, address, 4 * words[0], vector(I32, len(words)), align=1)
    codes_per_word = lanes // len(words)
    spread = shuffle(builder, loaded, loaded, [lane // codes_per_word for lane in range(lanes)])
    place = first % per_word
    shifts = [bits * (place + lane % codes_per_word) for lane in range(lanes)]
    return builder.lshr(spread, ir.Constant(vector(I32, lanes), shifts))


def _permute(builder: ir.IRBuilder, table: list[float], index):
    """float32 lanes table[index mod len(table)] by the CPU's permutations; see can_permute."""
    lanes = index.type.count
    table = table * max(1, lanes // len(table))
    parts = [
        ir.Constant(vector(F32, lanes), table[first : first + lanes]) for first in range(0, len(table), lanes)
    ]
    if lanes == 8:
        name, arguments = "llvm.x86.avx2.permps", [[part, index] for part in parts]
    elif len(parts) == 1:
        name, arguments = "llvm.x86.avx512.permvar.sf.512", [[parts[0], index]]
    else:
        name, arguments = "llvm.x86.avx512.vpermi2var.ps.512", [[parts[0], index, parts[1]]]
    signature = ir.FunctionType(vector(F32, lanes), [argument.type for argument in arguments[0]])
    declared = cgutils.get_or_insert_function(builder.module, signature, name)
    found = [builder.call(declared, each) for each in arguments]
    bit = lanes
    while len(found) > 1:
        is_upper = builder.icmp_unsigned(
            "!=",
            builder.and_(index, splat_constant(bit, lanes, I32)),
            splat_constant(0, lanes, I32),
        )
        found = [builder.select(is_upper, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
        bit *= 2
    return found[0]


def look_up(builder: ir.IRBuilder, table, index):
    """float32 lanes table[index mod len(table)]; of 4 to 32 floats, a power of two."""
    lanes = index.type.count
    floats = [float(value) for value in table]
    if can_permute(lanes):
        return _permute(builder, floats, index)
    kind = ir.ArrayType(F32, len(floats))
    stored = cgutils.global_constant(builder, f"table{len(floats)}", ir.Constant(kind, floats))
    index = builder.and_(index, splat_constant(len(floats) - 1, lanes, I32))
    result = ir.Constant(vector(F32, lanes), ir.Undefined)
    for lane in range(lanes):
        place = ir.Constant(I32, lane)
        at = builder.gep(stored, [ir.Constant(I32, 0), builder.extract_element(index, place)], inbounds=True)
        result = builder.insert_element(result, builder.load(at), place)
    return result


def load_sketch(builder: ir.IRBuilder, address, first: int, lanes: int):
    """Levels of 2-bit codes of a sketch's row, from channel `first` on."""
    codes = load_bits(builder, address, first, 2, lanes)
    if can_permute(lanes):
        return look_up(builder, codebook.table_2(), codes)
    small, large = (splat_constant(float(level), lanes) for level in codebook.LEVELS)
    one, zero = splat_constant(1, lanes, I32), splat_constant(0, lanes, I32)
    size = builder.select(builder.icmp_unsigned("==", builder.and_(codes, one), zero), small, large)
    return negative_at_bit(builder, size, codes, 1)


def negative_at_bit(builder: ir.IRBuilder, value, codes, bit: int):
    """Lanes of value, negative where the bit of codes is set."""
    integers = codes.type
    sign = builder.and_(
        builder.shl(codes, splat_constant(31 - bit, codes.type.count, I32)),
        splat_constant(0x80000000, codes.type.count, I32),
    )
    return builder.bitcast(builder.or_(builder.bitcast(value, integers), sign), value.type)


def widen_half_of_pairs(builder: ir.IRBuilder, pairs, high: bool):
    """float32 from the first or the second (`high`) bfloat16 of each 32-bit word."""
    lanes = pairs.type.count
    if high:
        bits = builder.and_(pairs, splat_constant(0xFFFF0000, lanes, I32))
    else:
        bits = builder.shl(pairs, splat_constant(16, lanes, I32))
    return builder.bitcast(bits, vector(F32, lanes))


def _half_bits_to_float(builder: ir.IRBuilder, bits):
    """float32 from the bits of fp16: exponent and fraction moved into place, the bias by a product.

    The product also makes subnormal numbers right; infinity and NaN get their exponent afterwards.
    """
    lanes = bits.type.count

    def constant(value):
        return splat_constant(value, lanes, I32)

    magnitude = builder.shl(builder.and_(bits, constant(0x7FFF)), constant(13))
    sign = builder.shl(builder.and_(bits, constant(0x8000)), constant(16))
    rebiased = builder.fmul(builder.bitcast(magnitude, vector(F32, lanes)), splat_constant(2.0**112, lanes))
    special = builder.icmp_unsigned(">=", magnitude, constant(0x7C00 << 13))
    finite = builder.bitcast(rebiased, bits.type)
    result = builder.select(special, builder.or_(magnitude, constant(0x7F800000)), finite)
    return builder.bitcast(builder.or_(result, sign), vector(F32, lanes))


def fma(builder: ir.IRBuilder, a, b, c):
    kind = a.type
    signature = ir.FunctionType(kind, [kind] * 3)
    declared = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{kind.count}f32")
    return builder.call(declared, (a, b, c))


def absolute(builder: ir.IRBuilder, x):
    integers = vector(I32, x.type.count)
    bits = builder.and_(builder.bitcast(x, integers), splat_constant(0x7FFFFFFF, x.type.count, I32))
    return builder.bitcast(bits, x.type)


def maximum(builder: ir.IRBuilder, a, b):
    """The larger lanes; b's where a is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def minimum(builder: ir.IRBuilder, a, b):
    """The smaller lanes; b's where a is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def shuffle(builder: ir.IRBuilder, a, b, lanes: list[int]):
    return builder.shuffle_vector(a, b, ir.Constant(vector(I32, len(lanes)), lanes))


def sum_each_of_four(builder: ir.IRBuilder, vectors: list):
    """float32 <4>: lane i is the sum of the lanes of vectors[i].

    Pairs are added inside groups of four lanes, which every instruction set shuffles cheaply; then halves.
    """
    lanes = vectors[0].type.count
    groups = range(0, lanes, 4)
    even = [group + place for group in groups for place in (0, 2, lanes, lanes + 2)]
    odd = [place + 1 for place in even]
    while len(vectors) > 1:
        vectors = [
            builder.fadd(shuffle(builder, a, b, even), shuffle(builder, a, b, odd))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    total = vectors[0]
    while total.type.count > 4:
        half = total.type.count // 2
        low = shuffle(builder, total, total, list(range(half)))
        high = shuffle(builder, total, total, list(range(half, 2 * half)))
        total = builder.fadd(low, high)
    return total


def all_lanes(builder: ir.IRBuilder, flags):
    """Whether all lanes of a vector of I1 are set."""
    bits = builder.bitcast(flags, ir.IntType(flags.type.count))
    return builder.icmp_unsigned("==", bits, ir.Constant(bits.type, -1))


def fold_lanes(builder: ir.IRBuilder, value, stride: int, combine: Callable):
    """Combine the lanes that are equal modulo stride; every lane ends with its class's result."""
    lanes = value.type.count
    shift = lanes // 2
    while shift >= stride:
        turned = shuffle(builder, value, value, [(lane + shift) % lanes for lane in range(lanes)])
        value = combine(builder, value, turned)
        shift //= 2
    return value


# 2**r for |r| <= 1/2: minimax for the relative error with the first coefficient exact, 1.1e-7 at most
_EXP2 = (1.0, 0.69314700, 0.24022242, 0.055507336, 0.009671513, 0.0013264727)
ROUNDER = 1.5 * 2**23  # adding it rounds to an integer, which then stands in the low bits
_EXP2_MIN = -126.0  # below, the result is zero: no subnormal weights


def exp2(builder: ir.IRBuilder, x):
    """2**x for x <= 0; NaN stays NaN."""
    lanes = x.type.count
    integers = vector(I32, lanes)

    def constant(value):
        return splat_constant(value, lanes)

    shifted = builder.fadd(x, constant(ROUNDER))
    r = builder.fsub(x, builder.fsub(shifted, constant(ROUNDER)))
    power = constant(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = fma(builder, power, r, constant(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, integers), splat_constant(23, lanes, I32))
    result = builder.bitcast(builder.add(builder.bitcast(power, integers), exponent), x.type)
    return builder.select(builder.fcmp_ordered("<", x, constant(_EXP2_MIN)), constant(0.0), result)


def tanh(builder: ir.IRBuilder, x):
    """Absolute error 2e-7 at most; NaN stays NaN."""
    lanes = x.type.count
    one, zero = splat_constant(1.0, lanes), splat_constant(0.0, lanes)
    negative = builder.fcmp_ordered("<", x, zero)
    size = builder.select(negative, builder.fneg(x), x)
    decay = exp2(builder, builder.fmul(size, splat_constant(-2 * math.log2(math.e), lanes)))
    result = builder.fdiv(builder.fsub(one, decay), builder.fadd(one, decay))
    return builder.select(negative, builder.fneg(result), result)


def prefetch(builder: ir.IRBuilder, address, offset: int) -> None:
    """Ask for the cache line at an address to be brought to the second-level cache. Any address is allowed.

    Into the first level a CPU has some 20 lines under way, too few for the latency of its memory: 25 GB/s from
    two Zen 4 cores where 31 come through the second level, whose own prefetcher then helps along.
    """
    kind = I8.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [kind, I32, I32, I32])
    declared = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
    flags = (ir.Constant(I32, flag) for flag in (0, 2, 1))  # read, second level, data
    builder.call(declared, [pointer(builder, address, offset, I8), *flags])


def counted_loop(builder: ir.IRBuilder, count, step: int, carried: list, body: Callable, first=None) -> list:
    """Emit `for index in range(first or 0, count, step)`; returns the carried values after it.

    body(index, carried) emits one turn and returns the next carried values; they stay in registers.
    """
    before = builder.block
    head = builder.append_basic_block("head")
    turn = builder.append_basic_block("turn")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    phis = [builder.phi(value.type) for value in carried]
    builder.cbranch(builder.icmp_signed("<", index, count), turn, after)
    builder.position_at_end(turn)
    values = body(index, phis)
    following = builder.add(index, ir.Constant(I64, step))
    index.add_incoming(ir.Constant(I64, 0) if first is None else first, before)
    index.add_incoming(following, builder.block)
    for phi, start, value in zip(phis, carried, values, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return phis
