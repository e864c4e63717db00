"""The simulator's short run: at least 5,000 crash points of the whole store and of the flash layer alone.

`make sim SEEDS=1000:2000` runs as many more as wanted.
"""

import numpy as np
import pytest

from .fault_schedule import FAULTS
from .ftl_simulator import FtlSimulation
from .oracle import FoundSequence, Lost, Oracle, SequenceState
from .set_oracle import SetOracle
from .set_simulator import SetSimulation
from .simulator import Simulation
from .token_content import MODEL_SHAPES, attention

BLOCK_FAULTS = ("program", "erase", "bad-blocks")
STORE_SEEDS, STORE_CRASH_POINTS = range(12), 100
FTL_SEEDS, FTL_CRASH_POINTS = range(26), 150


@pytest.mark.parametrize("seed", STORE_SEEDS)
def test_store(seed):
    """Whatever of flushed tokens, names or free space a power cut or a flipped bit could take."""
    print(f"seed {seed}")
    report = Simulation(seed).run(STORE_CRASH_POINTS)
    assert len(report.crash_points) >= STORE_CRASH_POINTS


@pytest.mark.parametrize("seed", FTL_SEEDS)
def test_ftl(seed):
    """Flushed blocks: an older version, a torn page or another block's would be lost data."""
    print(f"seed {seed}")
    report = FtlSimulation(seed).run(FTL_CRASH_POINTS)
    assert len(report.crash_points) >= FTL_CRASH_POINTS


@pytest.mark.parametrize("seed", range(6))
def test_set_of_drives(seed):
    """Several drives and one power cut: parts at different lengths, half moved, half deleted."""
    print(f"seed {seed}")
    report = SetSimulation(seed).run(40)
    assert len(report.crash_points) >= 40


def test_enough_crash_points():
    """What the two tests above add up to."""
    assert len(STORE_SEEDS) * STORE_CRASH_POINTS + len(FTL_SEEDS) * FTL_CRASH_POINTS >= 5000


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(300, 303))
def test_faults_of_flash(seed, fault):
    """Blocks, pages or a die that fail, and power cuts: losses with parity; without it, silent ones."""
    print(f"seed {seed}")
    FtlSimulation(seed, [fault]).run(50)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_under_the_store(fault):
    """The same through the whole store: wrong tokens, a loss with parity, an error nobody can read."""
    for seed in (300, 301):
        print(f"seed {seed}")
        Simulation(seed, [fault]).run(30)


# Seeds that found something, and what: parity with members of another life (17, 9, 20690), out of flash with a
# checkpoint to give up (27), erasing a superblock without a good block (30110), data beside an old log (50116).
@pytest.mark.parametrize(
    ("seed", "faults"),
    [(9, ()), (17, ()), (27, ()), (20690, ()), (30110, BLOCK_FAULTS), (50116, BLOCK_FAULTS)],
)
def test_found_seeds(seed, faults):
    FtlSimulation(seed, faults).run(100)


# A row that a power cut left with a torn member or without parity, and then a flipped bit (40028).
@pytest.mark.parametrize("seed", [40028])
def test_found_seeds_of_the_store(seed):
    Simulation(seed).run(60)


@pytest.mark.parametrize("simulation", [Simulation, FtlSimulation, SetSimulation])
def test_a_seed_replays(simulation):
    """A failure that its seed does not bring back cannot be mended."""
    first, second = (simulation(2).run(40) for _ in range(2))
    assert first.digest == second.digest
    assert first.crash_points == second.crash_points
    assert first.digest != simulation(3).run(40).digest


# the simulator's own parts: an oracle that takes anything proves nothing


def found(state: SequenceState, num_tokens: int, layer_shift: int = 0) -> FoundSequence:
    words = [
        state.shape.words(layer, state.layers[(layer + layer_shift) % state.shape.num_layers][:num_tokens])
        for layer in range(state.shape.num_layers)
    ]
    return FoundSequence(state.shape.name, words, state.token_ids)


@pytest.fixture
def oracle() -> Oracle:
    """One sequence with 10 promised tokens and 5 more."""
    oracle = Oracle()
    shape = MODEL_SHAPES[0]
    state = SequenceState.empty(shape)
    with oracle.attempt({"s": state}, frozenset({shape.name})):
        pass
    for count in (10, 5):
        for layer in range(shape.num_layers):
            state.append(layer, oracle.new_stamps(count))
        if count == 10:
            oracle.promise("s")
    return oracle


def test_oracle_takes_what_may_be(oracle):
    """States that the sequence passed through since the flush would be called losses."""
    state = oracle.sequences["s"]
    for num_tokens in (10, 15):
        oracle.check({"s": found(state, num_tokens)}, oracle.now.models, {})


@pytest.mark.parametrize("num_tokens", [0, 9, 14])
def test_oracle_refuses_other_lengths(oracle, num_tokens):
    """A promised token that is missing, or a state that never was."""
    with pytest.raises(Lost):
        oracle.check({"s": found(oracle.sequences["s"], num_tokens)}, oracle.now.models, {})


def test_oracle_refuses_wrong_rows(oracle):
    """Another layer's tokens, a single wrong bit, a sequence that is gone or back, a model that is gone."""
    state, models = oracle.sequences["s"], oracle.now.models
    right = found(state, 10)
    wrong_bit = found(state, 10)
    wrong_bit.words[1][1, 3, 0, 7] ^= 1
    for sequences in ({"s": found(state, 10, 1)}, {"s": wrong_bit}, {}, {"s": right, "t": right}):
        with pytest.raises(Lost):
            oracle.check(sequences, models, {})
    with pytest.raises(Lost):
        oracle.check({"s": right}, frozenset(), {})


def test_names_are_one_history(oracle):
    """Two changes of names of which only the second has survived."""
    state, models = oracle.sequences["s"], oracle.now.models
    with oracle.attempt({"t": state}):
        pass
    with oracle.attempt({"t": state, "u": SequenceState.empty(state.shape)}):
        pass
    empty = FoundSequence(state.shape.name, [words[:, :0] for words in found(state, 10).words], state.token_ids)
    oracle.check({"t": found(state, 10), "u": empty}, models, {})
    with pytest.raises(Lost):
        oracle.check({"s": found(state, 10), "u": empty}, models, {})


def test_set_oracle():
    """Sequences of a set have histories of their own; each is still one of its moments."""
    oracle, shape = SetOracle(), MODEL_SHAPES[0]
    models = frozenset({shape.name})
    first, second = SequenceState.empty(shape), SequenceState.empty(shape)
    with oracle.attempt({"a": first}, models):
        pass
    for layer in range(shape.num_layers):
        first.append(layer, oracle.new_stamps(5))
    oracle.promise("a")
    with oracle.attempt({"b": first}):
        pass
    with oracle.attempt({"b": first, "a": second}):
        pass
    old, empty = found(first, 5), found(second, 0)
    oracle.check({"a": old}, models)  # neither the rename nor the new sequence has survived
    oracle.check({"b": old, "a": empty}, models)
    for wrong in ({"a": empty}, {"c": old}, {"a": old, "b": old}, {}, {"b": found(first, 4)}):
        with pytest.raises(Lost):
            oracle.check(wrong, models)


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=lambda shape: shape.name)
def test_rows_tell_tokens_apart(shape):
    """Two tokens, layers, or K and V with equal rows could be swapped unseen."""
    stamps = np.arange(1, 300, dtype=np.uint32)
    rows = np.concatenate(
        [words for layer in range(shape.num_layers) for words in shape.words(layer, stamps)]
    ).reshape(-1, shape.num_kv_heads * shape.head_dim)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert np.isfinite(shape.rows(0, stamps).astype(np.float32)).all()


def test_reference_attention():
    """The reference that the store is compared with: two equal keys weigh alike, an unseen token not at all."""
    keys = np.ones((3, 1, 8), np.float32)
    values = np.arange(3, dtype=np.float32)[:, None, None] * keys
    queries = np.ones((2, 1, 8), np.float32)
    out, lse = attention(queries, keys, values, np.array([0, 2]), np.array([2, 2]))
    np.testing.assert_allclose(out[0], 0.5)
    np.testing.assert_allclose(lse[0], 8**0.5 + np.log(2))
    assert (out[1] == 0).all() and np.isneginf(lse[1]).all()
