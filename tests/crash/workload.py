"""Random use of a whole store: every operation of its interface, told to the oracle before it is done.

A refusal for want of space is part of the workload: the oracle takes the change back, and the store has to be
as it was. Any other error is the store's fault and ends the run.
"""

from collections import deque

import numpy as np

from kvfs import errors
from kvfs.sequence import Sequence
from kvfs.store import Store

from .file_workload import FileWorkload
from .invariants import check_space
from .oracle import Lost, Oracle, SequenceState
from .token_content import MODEL_SHAPES, ModelShape, attention

MAX_SEQUENCES = 6
ATTENTION_TOLERANCE = 2e-3


class Workload:
    """Operations on whatever store is open, drawn from one source of randomness.

    done: what was done last, for the report of a failure.
    """

    def __init__(self, random: np.random.Generator, oracle: Oracle):
        self.random = random
        self.oracle = oracle
        self.store: Store | None = None
        self.done: deque[str] = deque(maxlen=40)
        self.steps = 0
        self.refusals = 0
        self.files = FileWorkload(random, oracle.files, self._note)
        self._next_name = 0
        self._shrinking = False  # the drive was full not long ago
        self._operations = {
            self._append_pass: 30,
            self._append_layer: 10,
            self._append_token_ids: 6,
            self._create: 8,
            self._truncate: 6,
            self._fork: 7,
            self._rename: 4,
            self._delete: 2,
            self._flush_sequence: 12,
            self._flush_store: 5,
            self._attend: 5,
            self._read: 6,
            self._compact: 1,
            self._add_model: 1,
            **self.files.operations,
        }

    def use(self, store: Store) -> None:
        """What was done to the one before is the oracle's."""
        self.store = store
        self.files.use(store)

    def step(self) -> None:
        """One operation."""
        weights = np.array(list(self._operations.values()), float)
        if self._shrinking:
            names = [operation.__name__ for operation in self._operations]
            weights[names.index("_delete")] *= 12
            weights[names.index("_truncate")] *= 4
            self._shrinking = self.random.random() < 0.95
        choice = self.random.choice(len(weights), p=weights / weights.sum())
        self.steps += 1
        try:
            list(self._operations)[choice]()
        except errors.OutOfSpace as error:
            self.refusals += 1
            self._shrinking = True
            self._note(f"  refused: {error}")
            check_space(self.store)

    def _note(self, text: str) -> None:
        self.done.append(text)

    # choosing

    def _count(self, shape: ModelShape) -> int:
        """Tokens to append: one, some, or groups."""
        kind = self.random.random()
        if kind < 0.35:
            return 1
        if kind < 0.75:
            return int(self.random.integers(1, shape.group_tokens + 1))
        return int(self.random.integers(1, 8 * shape.group_tokens))

    def _pick(self) -> tuple[str, SequenceState, Sequence] | None:
        """An existing sequence; one is made when there is none."""
        names = sorted(self.oracle.sequences)
        if not names:
            self._create()
            names = sorted(self.oracle.sequences)
        name = names[self.random.integers(len(names))]
        return name, self.oracle.sequences[name], self.store.sequence(name)

    def _new_name(self) -> str:
        """A name not in use: new, or one that was deleted not long ago."""
        self._next_name += 1
        name = f"s{self._next_name}"
        old = f"s{self.random.integers(1, self._next_name + 1)}"
        return name if old in self.oracle.sequences or self.random.random() < 0.5 else old

    # operations

    def _add_model(self) -> None:
        shape = MODEL_SHAPES[self.random.integers(len(MODEL_SHAPES))]
        self._note(f"add_model {shape.name}")
        with self.oracle.attempt(models=self.oracle.now.models | {shape.name}):
            self.store.add_model(shape.name, **shape.arguments)

    def _create(self) -> None:
        if len(self.oracle.sequences) >= MAX_SEQUENCES:
            return self._delete()
        if not self.oracle.now.models:
            self._add_model()
        models = sorted(self.oracle.now.models)
        model = models[self.random.integers(len(models))]
        shape = next(shape for shape in MODEL_SHAPES if shape.name == model)
        name = self._new_name()
        self._note(f"create {name} of {model}")
        with self.oracle.attempt({**self.oracle.sequences, name: SequenceState.empty(shape)}):
            self.store.create_sequence(self.store.model(model), name)

    def _append(self, state: SequenceState, sequence: Sequence, layer: int, count: int) -> None:
        stamps = self.oracle.new_stamps(count)
        with state.attempt():
            state.append(layer, stamps)
            sequence.append(layer, *state.shape.rows(layer, stamps))

    def _append_pass(self) -> None:
        """All layers, as a forward pass does; those that are behind catch up."""
        name, state, sequence = self._pick()
        goal = max(len(stamps) for stamps in state.layers) + self._count(state.shape)
        self._note(f"append {name} to {goal} tokens")
        for layer, stamps in enumerate(list(state.layers)):
            if goal > len(stamps):
                self._append(state, sequence, layer, goal - len(stamps))

    def _append_layer(self) -> None:
        name, state, sequence = self._pick()
        layer, count = int(self.random.integers(state.shape.num_layers)), self._count(state.shape)
        self._note(f"append {name} layer {layer} {count}")
        self._append(state, sequence, layer, count)

    def _append_token_ids(self) -> None:
        name, state, sequence = self._pick()
        count = int(self.random.integers(1, 40 if self.random.random() < 0.9 else 1500))
        token_ids = self._new_token_ids(state, count)
        self._note(f"append_tokens {name} {count}")
        with state.attempt():
            state.append_token_ids(token_ids)
            sequence.append_tokens(token_ids)

    def _new_token_ids(self, state, count: int) -> np.ndarray:
        """uint32 [count], to be appended to a sequence's."""
        return self.random.integers(0, 1 << 32, count, dtype=np.uint32)

    def _truncate(self) -> None:
        name, state, sequence = self._pick()
        keep = int(self.random.integers(0, state.num_tokens + 1))
        self._note(f"truncate {name} to {keep} of {state.num_tokens}")
        with state.attempt():
            state.truncate(keep)
            sequence.truncate(keep)

    def _fork(self) -> None:
        if len(self.oracle.sequences) >= MAX_SEQUENCES:
            return self._delete()
        name, state, sequence = self._pick()
        child = self._new_name()
        self._note(f"fork {name} as {child}")
        with self.oracle.attempt({**self.oracle.sequences, child: state.fork()}):
            sequence.fork(child)

    def _rename(self) -> None:
        name, state, _ = self._pick()
        new_name = self._new_name()
        self._note(f"rename {name} to {new_name}")
        others = {other: kept for other, kept in self.oracle.sequences.items() if other != name}
        with self.oracle.attempt({**others, new_name: state}):
            self.store.rename_sequence(name, new_name)

    def _delete(self) -> None:
        name, _, _ = self._pick()
        self._note(f"delete {name}")
        with self.oracle.attempt({n: kept for n, kept in self.oracle.sequences.items() if n != name}):
            self.store.delete_sequence(name)

    def _flush_sequence(self) -> None:
        name, _, sequence = self._pick()
        self._note(f"flush {name}")
        sequence.flush()
        self.oracle.promise(name)

    def _flush_store(self) -> None:
        self._note("flush")
        self.store.flush()
        self.oracle.promise(*self.oracle.sequences)
        check_space(self.store)

    def _compact(self) -> None:
        name, _, sequence = self._pick()
        self._note(f"compact {name}")
        sequence.compact()

    def _read(self) -> None:
        name, state, sequence = self._pick()
        layer = int(self.random.integers(state.shape.num_layers))
        have = len(state.layers[layer])
        start = int(self.random.integers(0, have + 1))
        stop = int(self.random.integers(start, have + 1))
        self._note(f"read {name} layer {layer} [{start}, {stop})")
        expected = state.shape.words(layer, state.layers[layer][start:stop])
        for kind, rows in enumerate(sequence.read(layer, start, stop)):
            if not np.array_equal(rows.view(state.shape.word), expected[kind]):
                raise Lost(f"read of {name!r} layer {layer} [{start}, {stop}) is wrong")
        if not np.array_equal(sequence.tokens, state.token_ids):
            raise Lost(f"token ids of {name!r} are wrong")

    def _attend(self) -> None:
        """Queries over some sequences of one model, against the textbook over what the oracle holds."""
        _, state, _ = self._pick()
        shape = state.shape
        layer = int(self.random.integers(shape.num_layers))
        names = [
            n for n, s in sorted(self.oracle.sequences.items()) if s.shape == shape and len(s.layers[layer])
        ]
        names = names[: self.random.integers(1, 4)]
        if not names:
            return
        states = [self.oracle.sequences[n] for n in names]
        lengths = np.array([len(s.layers[layer]) for s in states])
        num_queries = int(self.random.integers(1, 1 + min(3, lengths.min())))
        self._note(f"attend {names} layer {layer}")
        size = (len(names), num_queries, shape.num_query_heads, shape.head_dim)
        queries = self.random.standard_normal(size, np.float32)
        starts = np.zeros((len(names), num_queries), np.int64)
        stops = lengths[:, None] - np.arange(num_queries - 1, -1, -1)
        ranges = None
        if self.random.random() < 0.4:
            starts = self.random.integers(0, lengths[:, None] + 1, starts.shape)
            stops = self.random.integers(starts, lengths[:, None] + 1)
            ranges = np.stack([starts, stops], axis=2)
        sequences = [self.store.sequence(n) for n in names]
        out, lse = self.store.attend(layer, queries, sequences, token_ranges=ranges)
        for item, item_state in enumerate(states):
            rows = shape.rows(layer, item_state.layers[layer])
            expected = attention(queries[item], *rows, starts[item], stops[item])
            for found, wanted in zip((out[item], lse[item]), expected, strict=True):
                if not np.allclose(found, wanted, atol=ATTENTION_TOLERANCE, rtol=ATTENTION_TOLERANCE):
                    raise Lost(f"attention over {names[item]!r} layer {layer} is wrong")
