"""From elements as pages have them to integers of one exponent: what the units for K and for V begin with."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed

from accel.fpga.arithmetic import (
    ALIGNED_BITS,
    ALIGNED_SHIFT,
    BFLOAT16,
    EXPONENT_MIN,
    MANTISSA_BITS,
    Shape,
)

EXPONENT = signed(9)
GROUP = 4  # lanes whose largest exponent is found in one stage


class Lanes:
    """Of one beat in a stage of a pipeline. mantissa, negative, exponent: by lane."""

    def __init__(self, shape: Shape, name: str):
        lanes = range(shape.lanes)
        self.mantissa = [Signal(MANTISSA_BITS, name=f"{name}_mantissa_{n}", reset_less=True) for n in lanes]
        self.negative = Signal(shape.lanes, name=f"{name}_negative", reset_less=True)
        self.exponent = [Signal(EXPONENT, name=f"{name}_exponent_{n}", reset_less=True) for n in lanes]

    def follow(self, m: Module, before: "Lanes") -> None:
        m.d.sync += self.negative.eq(before.negative)
        m.d.sync += [ours.eq(theirs) for ours, theirs in zip(self.mantissa, before.mantissa, strict=True)]
        m.d.sync += [ours.eq(theirs) for ours, theirs in zip(self.exponent, before.exponent, strict=True)]


def split(m: Module, beat, dtype, shape: Shape, name: str) -> tuple[Lanes, Signal]:
    """One stage: (lanes, whether all are finite) of a beat."""
    lanes = Lanes(shape, name)
    is_infinite = []
    for n in range(shape.lanes):
        bits = beat.word_select(n, 16)
        field = Mux(dtype == BFLOAT16, bits[7:15], bits[10:15])
        is_normal = field.any()
        fraction = Mux(dtype == BFLOAT16, bits[:7] << 3, bits[:10])
        bias = Mux(dtype == BFLOAT16, Const(127, EXPONENT), Const(15, EXPONENT))
        is_zero = ~is_normal & ~fraction.any()
        is_infinite.append(Mux(dtype == BFLOAT16, bits[7:15].all(), bits[10:15].all()))
        m.d.sync += [
            lanes.mantissa[n].eq(Cat(fraction[:10], is_normal)),
            lanes.exponent[n].eq(Mux(is_zero, Const(EXPONENT_MIN, EXPONENT), Mux(is_normal, field, 1) - bias)),
            lanes.negative[n].eq(bits[15]),
        ]
    finite = Signal(name=f"{name}_finite", reset_less=True)
    m.d.sync += finite.eq(~Cat(is_infinite).any())
    return lanes, finite


def larger(a, b):
    return Mux(a > b, a, b)


def largest(values: list):
    """Of a tree, without a stage."""
    while len(values) > 1:
        pairs = [larger(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(values) - len(values) % 2 :]
    return values[0]


def largest_exponent(m: Module, lanes: Lanes, shape: Shape, name: str) -> tuple[Lanes, Signal]:
    """Two stages: (the lanes after both, their largest exponent)."""
    groups = [Signal(EXPONENT, name=f"{name}_group_{n}") for n in range(shape.lanes // GROUP)]
    for n, group in enumerate(groups):
        m.d.sync += group.eq(largest(lanes.exponent[n * GROUP : (n + 1) * GROUP]))
    of_all = Signal(EXPONENT, name=f"{name}_largest")
    m.d.sync += of_all.eq(largest(groups))
    return later(m, later(m, lanes, shape, f"{name}_grouped"), shape, f"{name}_compared"), of_all


def later(m: Module, lanes: Lanes, shape: Shape, name: str) -> Lanes:
    """One stage."""
    found = Lanes(shape, name)
    found.follow(m, lanes)
    return found


def align(m: Module, lanes: Lanes, common, shape: Shape, name: str) -> list[Signal]:
    """Two stages: signed integers of the exponent `common`, cut towards zero."""
    aligned = []
    for n in range(shape.lanes):
        distance, shift = Signal(range(512), name=f"{name}_distance_{n}"), Signal(5, name=f"{name}_shift_{n}")
        m.d.comb += distance.eq(common - lanes.exponent[n])
        m.d.sync += shift.eq(Mux(distance > 31, 31, distance))
        mantissa = delayed(m, lanes.mantissa[n], 1, f"{name}_mantissa_{n}")
        negative = delayed(m, lanes.negative[n], 1, f"{name}_negative_{n}")
        magnitude = Signal(ALIGNED_BITS - 1, name=f"{name}_magnitude_{n}")
        m.d.comb += magnitude.eq((mantissa << ALIGNED_SHIFT) >> shift)
        lane = Signal(signed(ALIGNED_BITS), name=f"{name}_{n}", reset_less=True)
        m.d.sync += lane.eq(Mux(negative, -magnitude, magnitude))
        aligned.append(lane)
    return aligned


def stages(m: Module, value, count: int, name: str, reset_less: bool = True) -> list:
    """A value, and what it was 1 to `count` stages ago. What says whether a stage holds anything must not be
    reset_less; all else may be, so that it needs no wire for that, and shift registers do for delays."""
    found = [value]
    for stage in range(1, count + 1):
        after = Signal(value.shape(), name=f"{name}_{stage}", reset_less=reset_less)
        m.d.sync += after.eq(found[-1])
        found.append(after)
    return found


def delayed(m: Module, value, count: int, name: str):
    """A value some stages later."""
    return stages(m, value, count, name)[-1]


def added_up(m: Module, values: list, name: str) -> list[Signal]:
    """The sum, by a tree of stages that add four; as many stages as `stages_to_add` says."""
    level = 0
    while len(values) > 1:
        level += 1
        sums = []
        for n in range(0, len(values), 4):
            four = values[n : n + 4]
            bits = len(four[0]) + (len(four) - 1).bit_length()
            total = Signal(signed(bits), name=f"{name}_{level}_{n}", reset_less=True)
            m.d.sync += total.eq(sum(four[1:], four[0]))
            sums.append(total)
        values = sums
    return values[0]


def stages_to_add(count: int) -> int:
    return (count.bit_length()) // 2
