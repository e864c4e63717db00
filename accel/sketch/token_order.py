"""The order of a segment's tokens in its sketch: tokens with keys alike lie together.

A unit of tokens that are alike is worth its refinement page for all of them or for none, and means of like
tokens leave less to code. So tokens are halved across the direction in which their keys differ most, and the
halves again, until parts are units (principal direction divisive partitioning, Boley 1998; with equal halves,
since all units but the last are full).

Attention does not depend on the order of tokens. Windows and distances do: the sketch says which unit each
token is in, and within a unit they keep their order.
"""

import numpy as np
from numba import njit

from accel.sketch.format import SKETCH_VERSION

ITERATIONS = 6  # of the power method: the direction need not be exact
ROUNDS = 6  # of k-means
_MAX_PARTS = 64  # waiting to be halved: more than the logarithm of any number of units


@njit(nogil=True, cache=True, boundscheck=False, fastmath={"reassoc", "contract"})
def _centre(rows, order, first, stop, centre):
    centre[:] = 0
    for place in range(first, stop):
        row = rows[order[place]]
        for channel in range(len(centre)):
            centre[channel] += row[channel]
    for channel in range(len(centre)):
        centre[channel] /= stop - first


@njit(nogil=True, cache=True, boundscheck=False, fastmath={"reassoc", "contract"})
def _project(rows, order, first, stop, direction, moved):
    """moved[place] = row . direction"""
    for place in range(first, stop):
        row = rows[order[place]]
        product = np.float32(0)
        for channel in range(len(direction)):
            product += row[channel] * direction[channel]
        moved[place] = product


@njit(nogil=True, cache=True, boundscheck=False, fastmath={"reassoc", "contract"})
def _farthest(rows, order, first, stop, centre, direction):
    """Towards the row farthest from the centre."""
    largest = np.float32(-1)
    for place in range(first, stop):
        row = rows[order[place]]
        square = np.float32(0)
        for channel in range(len(centre)):
            difference = row[channel] - centre[channel]
            square += difference * difference
        if square > largest:
            largest = square
            for channel in range(len(centre)):
                direction[channel] = row[channel] - centre[channel]
    size = np.sqrt(largest)
    for channel in range(len(centre)):
        direction[channel] /= max(size, np.float32(1e-30))


@njit(nogil=True, cache=True, boundscheck=False, fastmath={"reassoc", "contract"})
def _turn(rows, order, first, stop, centre, direction, moved):
    """A step of the power method. False if the rows do not differ along the direction."""
    _project(rows, order, first, stop, direction, moved)
    of_centre = np.float32(0)
    for channel in range(len(centre)):
        of_centre += centre[channel] * direction[channel]
    direction[:] = 0
    for place in range(first, stop):
        row, weight = rows[order[place]], moved[place] - of_centre
        for channel in range(len(centre)):
            direction[channel] += weight * (row[channel] - centre[channel])
    largest = np.float32(0)
    for channel in range(len(centre)):
        largest = max(largest, abs(direction[channel]))
    if largest == 0:
        return False
    for channel in range(len(centre)):
        direction[channel] /= largest
    return True


@njit(nogil=True, cache=True, boundscheck=False)
def _halve(rows, unit_tokens, order):
    """Parts of order, int64 [num_tokens], become units."""
    num_tokens, head_dim = rows.shape
    centre, direction = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    moved = np.empty(num_tokens, np.float32)
    parts = np.empty((_MAX_PARTS, 2), np.int64)
    parts[0] = 0, num_tokens
    num_parts = 1
    while num_parts:
        num_parts -= 1
        first, stop = parts[num_parts]
        num_units = -(-(stop - first) // unit_tokens)
        if num_units <= 1:
            continue
        _centre(rows, order, first, stop, centre)
        _farthest(rows, order, first, stop, centre, direction)
        for _ in range(ITERATIONS):
            if not _turn(rows, order, first, stop, centre, direction, moved):
                break
        _project(rows, order, first, stop, direction, moved)
        by_score = np.argsort(moved[first:stop], kind="mergesort")
        order[first:stop] = order[first:stop][by_score]
        middle = first + (num_units + 1) // 2 * unit_tokens
        parts[num_parts] = first, middle
        parts[num_parts + 1] = middle, stop
        num_parts += 2


@njit(nogil=True, cache=True, boundscheck=False, fastmath={"reassoc", "contract"})
def _nearness(rows, order, unit_tokens, centres, nearness):
    """Fill in the units' centres, float32 [num_units, head_dim], and how near rows are to them, float32
    [num_tokens, num_units]: half the square of a row, less half that of its distance."""
    num_units = len(centres)
    for unit in range(num_units):
        first = unit * unit_tokens
        _centre(rows, order, first, min(first + unit_tokens, len(rows)), centres[unit])
    for unit in range(num_units):
        centre = centres[unit]
        square = np.float32(0)
        for channel in range(len(centre)):
            square += centre[channel] * centre[channel]
        for token in range(len(rows)):
            row = rows[token]
            product = np.float32(0)
            for channel in range(len(centre)):
                product += row[channel] * centre[channel]
            nearness[token, unit] = product - square / 2


@njit(nogil=True, cache=True, boundscheck=False)
def _exchange(rows, unit_tokens, order):
    """A round of k-means with units of fixed sizes; returns False, and leaves order, if that is no better.

    Tokens choose their units one after the other, those first that lose most by their second choice.
    """
    num_tokens, head_dim = rows.shape
    num_units = -(-num_tokens // unit_tokens)
    centres = np.empty((num_units, head_dim), np.float32)
    nearness = np.empty((num_tokens, num_units), np.float32)
    _nearness(rows, order, unit_tokens, centres, nearness)
    before = 0.0
    for place in range(num_tokens):
        before += nearness[order[place], place // unit_tokens]
    loss = np.empty(num_tokens, np.float32)
    for token in range(num_tokens):
        best = second = np.float32(-np.inf)
        for unit in range(num_units):
            if nearness[token, unit] > best:
                best, second = nearness[token, unit], best
            elif nearness[token, unit] > second:
                second = nearness[token, unit]
        loss[token] = second - best
    found = np.empty(num_tokens, np.int64)
    taken = np.zeros(num_units, np.int64)
    after = 0.0
    for token in np.argsort(loss, kind="mergesort"):
        unit = -1
        for other in range(num_units):
            room = min(unit_tokens, num_tokens - other * unit_tokens)
            if taken[other] < room and (unit < 0 or nearness[token, other] > nearness[token, unit]):
                unit = other
        found[unit * unit_tokens + taken[unit]] = token
        taken[unit] += 1
        after += nearness[token, unit]
    if not after > before:
        return False
    order[:] = found
    return True


@njit(nogil=True, cache=True, boundscheck=False)
def like_tokens_together(rows, unit_tokens):
    """int64 [num_tokens]: the token at each place of a sketch. rows: float32 [num_tokens, head_dim], of K"""
    num_tokens = len(rows)
    order = np.arange(num_tokens)
    _halve(rows, unit_tokens, order)
    for _ in range(ROUNDS):
        if not _exchange(rows, unit_tokens, order):
            break
    for first in range(0, num_tokens, unit_tokens):
        order[first : first + unit_tokens].sort()
    return order


@njit(nogil=True, cache=True, boundscheck=False)
def pack_units(order, unit_tokens, packed):
    """Write which unit each token is in, 4 bits a token. packed: uint8 [(num_tokens + 1) // 2], zero"""
    for place in range(len(order)):
        token = order[place]
        packed[token >> 1] |= np.uint8((place // unit_tokens) << 4 * (token & 1))


@njit(nogil=True, cache=True, boundscheck=False)
def read_order(version, packed, num_tokens, unit_tokens, order):
    """Fill in order, int64 [>= num_tokens], as like_tokens_together has returned it.

    version: of the sketch. Returns False if the bits are not of units that hold what they have to.
    """
    if version == SKETCH_VERSION:
        for token in range(num_tokens):
            order[token] = token
        return True
    found = np.zeros(16, np.int64)
    for token in range(num_tokens):
        unit = (packed[token >> 1] >> 4 * (token & 1)) & 15
        place = unit * unit_tokens + found[unit]
        if found[unit] == unit_tokens or place >= num_tokens:
            return False
        order[place] = token
        found[unit] += 1
    return True


@njit(nogil=True, cache=True, boundscheck=False)
def sees_all(start, stop, first_position, num_tokens):
    """Whether every query sees these tokens, all of them. start, stop: int64 [num_queries], positions"""
    for query in range(len(start)):
        if start[query] > first_position or stop[query] < first_position + num_tokens:
            return False
    return True
