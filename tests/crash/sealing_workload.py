"""Sealing in the simulated store: segments are made, replaced, shared, given up, beside everything else.

Whatever happens: a segment that has a name is whole and of its sequence's tokens, and all else is free space.
What is derived need not be there after a power cut; it can be made again. Pages are made by a stand-in for the
encoders that copies bytes, since what matters here is whose they are.
"""

from unittest.mock import patch

import numpy as np

from kvfs.sealing.policy import DERIVES
from kvfs.sealing.sealing import Outcome
from kvfs.store import Store
from spdk_glue.derived_layout import DerivedLayout
from tests.unit.kvfs.sealing.content import check_content

from .oracle import Lost
from .simulator import Simulation
from .workload import Workload


def stand_in(keys: np.ndarray, values: np.ndarray, layout: DerivedLayout) -> np.ndarray:
    """Pages that tell the tokens, the layout and the place of each page."""
    shape = (layout.index_pages + layout.refinement_pages, layout.page_size)
    words = np.concatenate([keys.ravel(), values.ravel()]).view(np.uint8)
    pages = np.resize(words, shape)
    return pages ^ (np.arange(len(pages)) + layout.derive).astype(np.uint8)[:, None]


def encoder(derive):
    return stand_in


class SealingWorkload(Workload):
    def __init__(self, random: np.random.Generator, oracle):
        super().__init__(random, oracle)
        more = {self._seal: 10, self._seal_some: 14, self._drop: 2, self._reseal: 2, self._set_sealing: 2}
        self._operations |= more

    def _derive(self):
        return [*DERIVES][self.random.integers(len(DERIVES))]

    def _seal(self) -> None:
        name, _, sequence = self._pick()
        derive = self._derive()
        self._note(f"seal {name} {derive}")
        found = sequence.seal(derive)
        group_tokens = sequence.model.geometry.group_tokens
        if found > sequence.num_tokens or found % group_tokens:
            raise Lost(f"{found} of {sequence.num_tokens} tokens of {name!r} are said to be sealed")

    def _seal_some(self) -> None:
        """As in the background, a few steps."""
        name, _, sequence = self._pick()
        derive = DERIVES[self._derive()]
        self._note(f"seal some of {name}")
        for _ in range(int(self.random.integers(1, 4))):
            if self.store._sealing.seal_next(sequence, derive, False) is not Outcome.MADE:
                break

    def _drop(self) -> None:
        derive = self._derive() if self.random.random() < 0.5 else None
        self._note(f"drop derived data {derive}")
        self.store.drop_derived(derive=derive)

    def _reseal(self) -> None:
        name, _, sequence = self._pick()
        self._note(f"reseal {name}")
        if sequence.reseal():
            raise Lost(f"derived data of {name!r} are damaged")

    def _set_sealing(self) -> None:
        models = self.store.models()
        if models:
            model = models[self.random.integers(len(models))]
            self.store.set_sealing(model, [self._derive()] if self.random.random() < 0.7 else [])


class SealingSimulation(Simulation):
    """A Simulation whose workload seals."""

    new_workload = SealingWorkload

    def run(self, num_crash_points: int):
        with patch("accel.sealing._encoder", encoder):
            return super().run(num_crash_points)

    def settle(self) -> None:
        super().settle()
        check_segments(self.store)

    def check_recovered(self, store: Store) -> None:
        super().check_recovered(store)
        check_segments(store)


def check_segments(store: Store) -> None:
    """Raises Lost unless rows fit their groups and every segment is whole."""
    problems = store._catalogue.derived.problems()
    if problems:
        raise Lost("; ".join(problems))
    for sequence in store.sequences():
        try:
            check_content(store, sequence, encoder)
        except AssertionError as error:
            raise Lost(str(error)) from error
