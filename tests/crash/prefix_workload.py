"""Prefix reuse in the simulated store: publish, find, restore, beside everything else.

Sequences that may be published have token ids that tell their keys and values: the stamps of all layers are the
token ids. So whatever a look-up finds can be checked against the prompt alone, whoever published it and
whatever became of that sequence since.
"""

from dataclasses import dataclass, field

import numpy as np

from kvfs.store import Store

from .oracle import Lost, SequenceState, Version
from .simulator import Simulation
from .token_content import MODEL_SHAPES
from .workload import MAX_SEQUENCES, Workload

TENANTS = ("", "red")
NOBODY = "nobody"  # publishes nothing
TOLD_CHANCE = 0.8  # of a new sequence
ALMOST_FULL_BYTES = 64 << 10  # of the catalogue: entries may wait then


@dataclass(eq=False)
class ToldState(SequenceState):
    """plan: uint32, token ids and stamps of all layers, as far as any of them has come and further."""

    plan: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))

    def fork(self) -> "ToldState":
        child = super().fork()
        return ToldState(child.shape, child.layers, child.token_ids, plan=self.plan)

    def settle(self, version: Version) -> None:
        super().settle(version)
        self.plan = max(version.token_ids, version.stamps[0], key=len)


class PrefixWorkload(Workload):
    def __init__(self, random: np.random.Generator, oracle):
        super().__init__(random, oracle)
        self._operations |= {self._publish: 8, self._find: 10, self._restore: 10}

    def _create(self) -> None:
        before = set(self.oracle.sequences)
        super()._create()
        for name in set(self.oracle.sequences) - before:
            state = self.oracle.sequences[name]
            if self.random.random() < TOLD_CHANCE:
                told = ToldState(state.shape, state.layers)
                for moment in (self.oracle.now, *self.oracle.history):
                    if moment.sequences.get(name) is state:
                        moment.sequences[name] = told

    def _planned(self, state: ToldState, start: int, count: int) -> np.ndarray:
        missing = start + count - len(state.plan)
        if missing > 0:
            state.plan = np.concatenate([state.plan, self.oracle.new_stamps(missing)])
        return state.plan[start : start + count]

    def _append(self, state, sequence, layer: int, count: int) -> None:
        if not isinstance(state, ToldState):
            return super()._append(state, sequence, layer, count)
        stamps = self._planned(state, len(state.layers[layer]), count)
        with state.attempt():
            state.append(layer, stamps)
            sequence.append(layer, *state.shape.rows(layer, stamps))

    def _append_pass(self) -> None:
        """Of half of the told sequences token ids as well: what a prefill does."""
        super()._append_pass()
        told = [(n, s) for n, s in sorted(self.oracle.sequences.items()) if isinstance(s, ToldState)]
        for name, state in told:
            if len(state.token_ids) < state.num_tokens and self.random.random() < 0.5:
                self._tell(name, state, state.num_tokens - len(state.token_ids))

    def _new_token_ids(self, state, count: int) -> np.ndarray:
        if not isinstance(state, ToldState):
            return super()._new_token_ids(state, count)
        return self._planned(state, len(state.token_ids), count)

    def _tell(self, name: str, state: ToldState, count: int) -> None:
        token_ids = self._planned(state, len(state.token_ids), count)
        self._note(f"tell {name} {count}")
        with state.attempt():
            state.append_token_ids(token_ids)
            self.store.sequence(name).append_tokens(token_ids)

    def _truncate(self) -> None:
        super()._truncate()
        for state in self.oracle.sequences.values():
            if isinstance(state, ToldState) and self.random.random() < 0.3:  # or the same tokens come once more
                used = max(len(state.token_ids), *(len(stamps) for stamps in state.layers))
                state.plan = state.plan[:used]

    # prefix reuse

    def _told(self) -> tuple[str, ToldState] | None:
        names = sorted(n for n, s in self.oracle.sequences.items() if isinstance(s, ToldState))
        if not names:
            return None
        name = names[self.random.integers(len(names))]
        return name, self.oracle.sequences[name]

    def _publish(self) -> None:
        told = self._told()
        if told is None:
            return
        name, state = told
        tenant = TENANTS[self.random.integers(len(TENANTS))]
        self._note(f"publish {name} for {tenant!r}")
        found = self.store.sequence(name).publish(tenant)
        if found > min(state.num_tokens, len(state.token_ids)):
            raise Lost(f"{name!r} publishes {found} tokens")

    def _look_up(self, verify: bool):
        """(match, prompt) of a told sequence's tokens, now and then with others behind."""
        told = self._told()
        if told is None:
            return None
        name, state = told
        prompt = state.plan.copy()
        if len(prompt) and self.random.random() < 0.3:
            prompt[self.random.integers(len(prompt)) :] += np.uint32(1 << 31)
        tenant = (*TENANTS, NOBODY)[self.random.integers(len(TENANTS) + 1)]
        self._note(f"find {name}'s {len(prompt)} tokens for {tenant!r}")
        model = self.store.model(state.shape.name)
        match = self.store.find_prefix(model, prompt, tenant, verify=verify)
        if tenant == NOBODY and match.num_tokens:
            raise Lost(f"{match} of a tenant that has published nothing")
        if not np.array_equal(match.token_ids, prompt[: match.num_tokens]):
            raise Lost(f"{match} is no prefix of the prompt")
        return match, prompt

    def _find(self) -> None:
        self._look_up(verify=bool(self.random.random() < 0.2))

    def _restore(self) -> None:
        if len(self.oracle.sequences) >= MAX_SEQUENCES:
            return self._delete()
        looked_up = self._look_up(verify=True)  # or forks whose tokens nobody knows could be found
        if looked_up is None:
            return
        match, prompt = looked_up
        shape = next(shape for shape in MODEL_SHAPES if shape.name == match.model.name)
        name = self._new_name()
        self._note(f"restore {match.num_tokens} tokens as {name}")
        found = prompt[: match.num_tokens]
        state = ToldState(shape, [found] * shape.num_layers, found, plan=found)
        with self.oracle.attempt({**self.oracle.sequences, name: state}):
            sequence = self.store.restore_prefix(match, name)
        if sequence.num_tokens != match.num_tokens:
            raise Lost(f"{match} was found, {sequence.num_tokens} tokens were restored")


class PrefixSimulation(Simulation):
    """A Simulation whose workload publishes and restores."""

    new_workload = PrefixWorkload

    def settle(self) -> None:
        super().settle()
        check_prefixes(self.store)


def check_prefixes(store: Store) -> None:
    """Raises Lost unless entries fit their groups, and all that is published and stored is found."""
    prefixes = store._catalogue.prefixes
    problems = prefixes.problems()
    if problems:
        raise Lost("; ".join(problems))
    if store._catalogue.batch.free_bytes < ALMOST_FULL_BYTES:
        return
    for name, tenant in store._catalogue._db.execute(
        "SELECT name, tenant FROM prefix_publication JOIN sequence ON sequence.id = sequence_id"
        " JOIN prefix_scope ON prefix_scope.id = scope_id"
    ):
        sequence = store.sequence(name)
        tokens = sequence.tokens[: sequence._row.num_spilled]
        found = store.find_prefix(sequence.model, tokens, tenant).num_tokens
        if found != len(tokens) // sequence.model.group_tokens * sequence.model.group_tokens:
            raise Lost(f"of {len(tokens)} tokens of {name!r}, which is published, {found} are found")
