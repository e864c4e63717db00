"""What error the output of one (item, KV head) is expected to have, and which units to refine for less.

Two parts add up. The variance that the kernels say codes cause, token by token, is that of errors which have
nothing to do with each other. But rows that are alike are coded alike: the values of a token that comes a
thousand times in a text are all wrong by the same, most of all in a first layer, which spreads its weights over
them. So once some units are refined, what this changed says two things of those that are not: by how much the
variances are too small, and what errors of different units have in common. That grows with the share that is
not refined, and not with its root.
"""

import numpy as np

from accel.sketch.codebook import DISTORTION, REFINED_DISTORTION
from accel.sketch.selection import shares

# Over the heads of a trained model (8,192 tokens of three texts) 100% of single outputs met a target of 0.02
# with this to spare, 99.6% 0.05, 99.3% 0.1, 98.6% 0.2; with 1.3 99.7%, 99.3%, 97.9%, 98.4%. Without what
# errors have in common, of those that were not left to dense pages: 41%, 65%, 88%, 93%.
MARGIN = 1.5
FIRST_UNITS = 12  # refined at least, to learn from
PRIOR_UNITS = 8  # the variances are believed like so many refined units of the average size
REFINED_SHARE = REFINED_DISTORTION / DISTORTION  # of squared errors, what refining leaves


class ErrorTarget:
    """out: float32 [num_units, num_rows, head_dim]; lse: float32 [num_units, num_rows]; noise: float32
    [num_units, num_rows, 2]: of sketches, as the kernels give them; num_rows = num_queries * group_size. The
    arrays are kept, and not changed.
    target_error: of the output's L2 norm over all rows
    other_out, other_lse: [num_rows, head_dim], [num_rows]: of tokens that are read without loss, or None

    refined: bool [num_units]
    """

    def __init__(self, out, lse, noise, target_error: float, other_out=None, other_lse=None):
        self._sketched, self._sketched_lse, self._noise = out, lse, noise
        self._out, self._lse = out, lse  # with what is refined
        self._target_error = target_error
        self._other_out, self._other_lse = other_out, other_lse
        self.refined = np.zeros(len(lse), bool)

    def take(self, units: np.ndarray, out: np.ndarray, lse: np.ndarray) -> None:
        """Units, int64, were refined to this."""
        if not self.refined.any():
            self._out, self._lse = self._out.copy(), self._lse.copy()
        self.refined[units] = True
        self._out[units], self._lse[units] = out, lse

    def choose(self) -> np.ndarray | None:
        """int64, ascending: units to be refined next, none if the target is met; None: all would not do."""
        order, errors = self._expected()
        enough = np.flatnonzero(MARGIN * errors <= self._target_error)
        if not len(enough):
            return None
        count = int(enough[0])
        if not self.refined.any():
            count = max(count, FIRST_UNITS)
        elif count:  # few rounds
            count = max(count, np.count_nonzero(self.refined) // 4)
        return np.sort(order[:count])

    @property
    def error(self) -> float:
        """Expected, of the output as it is."""
        return float(self._expected()[1][0])

    def _expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [n]: units that are not refined and weigh something, those that gain most first; float64
        [n + 1]: the relative error that is expected when the first i of them are refined, too)."""
        part = shares(self._lse, self._other_lse)
        merged = np.einsum("un,und->nd", part, self._out)
        if self._other_out is not None:
            merged += (1 - part.sum(axis=0))[:, None] * self._other_out
        variance = self._variance(part, merged)
        scale, common = self._learnt(part, merged, variance) if self.refined.any() else (1.0, 0.0)
        gains = np.where(self.refined, 0, variance)
        order = np.argsort(-gains, kind="stable")[: np.count_nonzero(gains)]

        total = variance.sum()
        rest = gains.sum() - np.cumsum(np.append(0, gains[order]))
        squares = scale * (rest + REFINED_SHARE * (total - rest))
        every = part.sum(axis=0)
        left = every - part[self.refined].sum(axis=0) - np.cumsum(np.insert(part[order], 0, 0, axis=0), axis=0)
        left = left.clip(0)
        squares = squares + ((left**2 + REFINED_SHARE * (every - left) ** 2) * common).sum(axis=1)
        size = (merged**2).sum()
        return order, np.sqrt(squares.clip(0) / size) if size > 0 else np.zeros(len(squares))

    def _variance(self, part: np.ndarray, merged: np.ndarray) -> np.ndarray:
        """float64 [num_units]: of the output, summed over rows, by what sketches of these units lose."""
        away = np.einsum("und,und->un", self._out, self._out, dtype=np.float64)
        away += (merged**2).sum(axis=1) - 2 * np.einsum("und,nd->un", self._out, merged)
        return (part**2 * (self._noise[..., 0] + self._noise[..., 1] * away.clip(0))).sum(axis=1)

    def _learnt(self, part, merged, variance) -> tuple[float, np.ndarray]:
        """(by how much variances are too small, at least 1; float64 [num_rows]: what errors have in common, for
        a share of 1, squared)."""
        seen = self.refined
        part, out = part[seen], self._out[seen]
        lse, before = self._lse[seen], self._sketched_lse[seen]
        grown = np.subtract(before, lse, out=np.zeros_like(lse), where=np.isfinite(lse) & np.isfinite(before))
        moved = self._sketched[seen] - out + grown[..., None] * (out - merged)
        moved *= part[..., None]
        own = (moved**2).sum(axis=(0, 2))
        prior = PRIOR_UNITS * variance[seen].mean()
        expected = variance[seen].sum() + prior
        scale = max(1.0, (own.sum() + prior) / expected) if expected > 0 else 1.0
        together = ((moved.sum(axis=0) ** 2).sum(axis=1) - own).clip(0)  # products of different units' errors
        weight = part.sum(axis=0)
        return scale, together / np.where(weight > 0, weight, 1) ** 2
