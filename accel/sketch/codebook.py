"""What codes stand for: levels of normally distributed values, and the rotation that makes values so.

Lloyd-Max quantisers (Max 1960, Lloyd 1982): a level is the mean of its cell, a cell's border lies half way
between levels. Refinement codes divide the two cells of each sign once more, by the same rule. Random
rotations before scalar quantisation: QuIP# (arXiv:2402.04396), QuaRot (arXiv:2404.00456).
"""

from functools import cache

import numpy as np

# A 2-bit code is a sign (bit 1: negative) and a magnitude (bit 0); 4 more bits choose one of 16 in its cell.
LEVELS = np.array([0.45278003, 1.51041761], np.float32)
BORDER = np.float32(0.98159882)
DISTORTION = 0.11748185  # expected squared error of 2-bit codes
# Where levels are 3 and 10 of something, this is it: products with normally distributed values stay right.
LEVEL_STEP = np.float32(0.151024)
REFINED_LEVELS = np.array(
    [
        *(0.029106, 0.08735, 0.145693, 0.204201, 0.262944, 0.321991, 0.381415, 0.441291),
        *(0.501699, 0.562724, 0.624455, 0.68699, 0.750434, 0.814902, 0.880518, 0.947424),
        *(1.02574, 1.11677, 1.210995, 1.308949, 1.411278, 1.518787, 1.632491, 1.753702),
        *(1.884171, 2.026305, 2.18357, 2.361229, 2.567908, 2.819357, 3.149802, 3.663427),
    ],
    np.float32,
)
REFINED_DISTORTION = 0.00067538
# q . code overestimates nothing and underestimates by 1 - DISTORTION: keys are scaled up by the inverse
KEY_FACTOR = np.float32(1 / (1 - DISTORTION))
SCORE_VARIANCE = DISTORTION / (1 - DISTORTION)  # of a score, by |scale * q|**2 * token scale**2
# Half the variance comes off a score, since exp of a noisy one is too large by as much. Far out there are not
# enough tokens for that: from this standard deviation on the correction grows linearly.
CORRECTED_DEVIATION = 3.0


def refined_borders() -> np.ndarray:
    """float32 [31]: between the magnitudes of REFINED_LEVELS; the 16th is BORDER."""
    borders = (REFINED_LEVELS[1:] + REFINED_LEVELS[:-1]) / 2
    borders[15] = BORDER
    return borders


def table_2() -> np.ndarray:
    """float32 [4]: level of a 2-bit code."""
    return np.concatenate([LEVELS, -LEVELS])


def table_6() -> np.ndarray:
    """float32 [64]: level of (2-bit code) * 16 + 4-bit code."""
    return np.concatenate([REFINED_LEVELS, -REFINED_LEVELS])


def _signs(head_dim: int) -> np.ndarray:
    """float64 [head_dim] of 1 and -1: the low bits of splitmix64 (Steele et al. 2014) from seed 0."""
    with np.errstate(over="ignore"):
        x = np.arange(1, head_dim + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return 1.0 - 2.0 * ((x ^ (x >> np.uint64(31))) & np.uint64(1)).astype(np.float64)


# Multiplications of a product that OpenBLAS leaves on the calling thread. Its own threads would run beside
# attention, at a priority of theirs, and start for each product.
ONE_THREAD = 1 << 18


@cache
def rotation(head_dim: int) -> np.ndarray:
    """float32 [head_dim, head_dim], orthonormal: a row r becomes r @ rotation(head_dim).

    Random signs, then a Hadamard matrix of the largest power of two that divides head_dim (Kronecker) DCT-II
    of what is left.
    """
    power = head_dim & -head_dim
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    rest = head_dim // power
    k, n = np.arange(rest)[:, None], np.arange(rest)[None, :]
    dct = np.cos(np.pi * k * (2 * n + 1) / (2 * rest)) * np.sqrt(2 / rest)
    dct[0] /= np.sqrt(2)
    mixed = np.kron(hadamard / np.sqrt(power), dct)
    matrix = np.ascontiguousarray((mixed * _signs(head_dim)).T.astype(np.float32))
    matrix.setflags(write=False)
    return matrix


def rotate(vectors: np.ndarray) -> np.ndarray:
    """float32 [..., head_dim] of vectors [..., head_dim]: their coordinates in rotated space."""
    return _product(vectors, rotation(vectors.shape[-1]))


def unrotate(vectors: np.ndarray) -> np.ndarray:
    """What `rotate` made of vectors, undone."""
    return _product(vectors, rotation(vectors.shape[-1]).T)


def _product(vectors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    head_dim = len(matrix)
    rows = np.ascontiguousarray(vectors, np.float32).reshape(-1, head_dim)
    out = np.empty_like(rows)
    step = max(1, ONE_THREAD // head_dim**2)
    whole = len(rows) - len(rows) % step
    shape = (-1, step, head_dim)
    np.matmul(rows[:whole].reshape(shape), matrix, out=out[:whole].reshape(shape))
    np.matmul(rows[whole:], matrix, out=out[whole:])
    return out.reshape(vectors.shape)
