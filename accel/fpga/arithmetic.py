"""The numbers inside the attention core: widths, the table of exp2, and how floats become integers.

Everything here is integer arithmetic that the RTL (*_unit.py) and its bit-accurate model (model.py) share by
name, so that neither can drift from the other.

A beat is LANES elements of 16 bits. An element of exponent x and 11-bit mantissa is mantissa * 2**(x - 10).
Elements of a beat are aligned to one exponent X as 18-bit integers: a * 2**(X - 16), cut towards zero.
"""

import itertools
from dataclasses import dataclass

ALIGNED_BITS = 18  # of an element, signed: one input of a DSP48E2
MANTISSA_BITS = 11  # of float16, hidden bit included; bfloat16 has 8 and is shifted
ALIGNED_SHIFT = ALIGNED_BITS - 1 - MANTISSA_BITS  # so that a mantissa fills the magnitude
EXPONENT_MIN = -126  # of what is zero, too
QUERY_BITS = 24  # of a query's channel, signed; its row has an exponent
SCORE_FRACTION = 16  # bits: scores are in units of log2, 2**-16 apart
SCORE_LIMIT = (1 << 31) - (1 << 16)  # a score's magnitude, at most: 32767.0
SCORE_BITS = 32
LEFT_LIMIT = 12  # a shift of products, beyond which a score has no place anyway
MAX_BITS = 16  # of the running maximum, a whole number
NO_MAX = -(1 << (MAX_BITS - 1))  # no token was visible yet
WEIGHT_FRACTION = 24  # bits of a softmax weight, 0 to 1
TABLE_BITS = 8  # of the fraction look up the table, as many interpolate
SUM_BITS = 48  # of all weights of a row
PRODUCT_CUT = 14  # bits of a weighted element that its total does not keep; rounded
TOTAL_BITS = 48  # of a channel's weighted sum
ANSWER_BITS = 64  # of a total in the answer
MAX_TOKENS = 1 << 20  # of one unit: a product has 17 + 24 bits and loses 14, 20 are for their number
CHANNEL_WEIGHT_BITS = 24  # of what a channel is multiplied by, signed
MAX_CHANNELS = 256  # of one unit: 17 + 23 bits a product, 8 for their number
CHANNEL_SCORE_BITS = 32  # of a score in the answer
CHANNEL_SCORE_CUT = 3  # bits of its total below them
BANKS = 4  # of scores between both units: two would have each wait for the other's pipeline
SHIFT_LIMIT = 63  # of sums, when the maximum or the exponent grows

FLOAT16, BFLOAT16 = 0, 1
ATTENTION, CHANNELS = 0, 1  # what a unit computes

# status bits of a unit
NOT_FINITE = 1  # an element of a row in use is infinite or NaN
SATURATED = 2  # a score did not fit
# these end the unit: the core wants a reset
BAD_LENGTH = 4  # a stream ended early or late
BAD_COMMAND = 8  # a head or block that this core has no place for


def exp2_table() -> list[tuple[int, int]]:
    """(2**(k / 256), difference to the next), in units of 2**-24.

    Between its points the table is a chord: the error is at most (log(2) / 256)**2 / 8 of the value, 9.2e-7,
    and the rounding of entry, product and result at most 2**-24 each.
    """
    size = 1 << TABLE_BITS
    points = [round(2 ** (k / size) * (1 << WEIGHT_FRACTION)) for k in range(size + 1)]
    return [(here, after - here) for here, after in itertools.pairwise(points)]


@dataclass(frozen=True)
class Shape:
    """What a core is built for. lanes: elements in a beat; rows: query rows at once, a KV head's query heads;
    max_beats: beats of a token's row, head_dim / lanes; block_tokens: tokens of a block, at most."""

    lanes: int = 32
    rows: int = 8
    max_beats: int = 8
    block_tokens: int = 64

    def __post_init__(self):
        for name in ("lanes", "rows", "max_beats", "block_tokens"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} is a power of two, not {value}")
        if self.lanes < 16:
            raise ValueError(f"a beat of {self.lanes} lanes: 16 or more")
        if 2 * self.rows > self.lanes:
            raise ValueError(f"{self.rows} rows: {self.lanes} lanes have weights for {self.lanes // 2}")

    @property
    def beat_bits(self) -> int:
        return 16 * self.lanes
