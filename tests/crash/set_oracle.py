"""What a set of drives must hold. Each sequence has a history of its own, for each is on drives of its own.

Between two flushes the names of different sequences are in no order: what is found must be, for every sequence
by itself, one of its moments since the last flush. A flush promises all names, and the tokens of what was
flushed.
"""

from .oracle import FoundSequence, Lost, Moment, Oracle, SequenceState

ABSENT = None


class SetOracle(Oracle):
    def check(self, found: dict[str, FoundSequence], models: frozenset[str], files=None) -> Moment:
        """The names and states that a reopened set has come back to. Raises Lost."""
        if not self.history[0].models <= models <= self.now.models:
            raise Lost(f"models {sorted(models)}, promised {sorted(self.history[0].models)}")
        matched = self._match(found)
        if matched is None:
            raise Lost(self._explain(found))
        return Moment(matched, models)

    def _possible(self) -> dict[SequenceState, set]:
        """Every name that a sequence may have, ABSENT where it may be gone or not there yet."""
        names: dict[SequenceState, set] = {}
        for moment in self.history:
            for name, state in moment.sequences.items():
                names.setdefault(state, set()).add(name)
        for state, possible in names.items():
            if any(state not in moment.sequences.values() for moment in self.history):
                possible.add(ABSENT)
        return names

    def _match(self, found: dict[str, FoundSequence]) -> dict[str, SequenceState] | None:
        """A state for each name, each once, so that no state is left that had to be there."""
        possible = self._possible()
        choices = {
            name: [s for s, names in possible.items() if name in names and sequence.version_of(s) is not None]
            for name, sequence in found.items()
        }
        needed = {state for state, names in possible.items() if ABSENT not in names}
        order = sorted(found, key=lambda name: len(choices[name]))

        def assign(position: int, taken: dict[str, SequenceState]):
            if position == len(order):
                return taken if needed <= set(taken.values()) else None
            for state in choices[order[position]]:
                if state not in taken.values():
                    result = assign(position + 1, {**taken, order[position]: state})
                    if result is not None:
                        return result
            return None

        return assign(0, {})

    def _explain(self, found: dict[str, FoundSequence]) -> str:
        lines = [f"found {name!r}: {sequence}" for name, sequence in found.items()]
        for state, names in self._possible().items():
            versions = ", ".join(map(str, state.versions[-8:]))
            lines.append(f"a sequence that may be {sorted(map(str, names))}: {versions}")
        return "what is there is no moment since the last flush:\n  " + "\n  ".join(lines)

    def settle(self, found: dict[str, FoundSequence], models: frozenset[str], files=None) -> None:
        self.now = self.check(found, models)
        self.history = [self.now]
        for name, sequence in found.items():
            state = self.sequences[name]
            state.settle(sequence.version_of(state))
