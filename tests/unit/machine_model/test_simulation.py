"""The model as a whole: nothing is busier than all the time, limits are closed forms, drives never hurt."""

import json
from itertools import pairwise

import pytest

from kvfs.engines.x_cache.share import share_of
from machine_model import (
    CATEGORIES,
    SYSTEMS,
    BadMachine,
    Workload,
    load_machine,
    load_model,
    machine_names,
    simulate,
    simulation,
    sweep,
)
from machine_model.flash_time import read_time
from machine_model.layout_bytes import dense_pages

OPT_13B, LLAMA_70B = load_model("opt-13b"), load_model("llama-3-70b")
WORK = Workload(batch=16, input_tokens=2048, output_tokens=64)
NEAR_DATA = [name for name, system in SYSTEMS.items() if system.needs_drive and name.startswith("kvfs")]


def only(machine, **values):
    """A machine in which nothing else costs anything: everything out of the way but what is named."""
    fast = {
        "gpu.flops": 1e17,
        "gpu.memory_bandwidth": 1e14,
        "gpu.memory_bytes": 1e13,
        "gpu.layer_seconds": 0.0,
        "host.memory_bandwidth": 1e14,
        "host.attention_bandwidth": 1e14,
        "host.tail_seconds": 0.0,
        "links.drives": 1e14,
        "links.latency": 0.0,
        "drive.accelerator_bandwidth": 1e14,
        "drive.internal_bandwidth": 1e14,
        "drive.channel_bandwidth": 1e13,
        "drive.command_seconds": 0.0,
        "drive.program_seconds": 1e-6,
        "software.weights_resident": 1,
    }
    for path, value in (fast | {path.replace("__", "."): value for path, value in values.items()}).items():
        machine = machine.with_value(path, value)
    return machine


@pytest.mark.parametrize("name", machine_names())
def test_nothing_is_busier_than_all_the_time(name):
    """Work done twice, or by nobody, would show here."""
    machine = load_machine(name)
    for system in SYSTEMS:
        for model in (OPT_13B, LLAMA_70B):
            found = simulate(machine, model, system, WORK)
            if not found.fits:
                assert found.why_not and found.tokens_per_second == 0.0
                continue
            assert max(found.utilisation.values()) <= 1 + 1e-9, (system, model.name)
            assert set(found.breakdown) <= set(CATEGORIES)
            assert sum(found.breakdown.values()) == pytest.approx(found.decode_seconds)
            steps = WORK.output_tokens * sum(one.seconds * one.weight for one in found.steps)
            assert steps == pytest.approx(found.decode_seconds)
            assert sum(one.weight for one in found.steps) == pytest.approx(1.0)


def test_flash_alone():
    """With one bottleneck a step takes its bytes over its bandwidth."""
    machine = only(load_machine("instinfer"), drive__channel_bandwidth=1.4e9)
    found = simulate(machine, OPT_13B, "kvfs-dense", WORK)
    assert found.bottleneck == "drive0.flash"
    for step in found.steps:
        tokens = step.context - step.context % 16
        pages = dense_pages(OPT_13B.geometry, tokens, 4096).total * 16 * 40 * 40
        assert step.seconds == pytest.approx(pages * read_time(machine.drive).page, rel=0.03)


def test_the_accelerator_alone():
    """As above."""
    machine = only(load_machine("instinfer"), drive__accelerator_bandwidth=2e9)
    found = simulate(machine, OPT_13B, "kvfs-dense", WORK)
    assert found.bottleneck == "drive0.accelerator"
    step = found.steps[0]
    kv_bytes = 16 * (step.context - step.context % 16) * OPT_13B.token_bytes
    assert step.seconds == pytest.approx(kv_bytes / 2e9, rel=0.03)


def test_the_link_alone():
    """Drives without accelerators behind one link: as many as there are, they share it."""
    machine = load_machine("a100-pm9a3")
    for path in ("gpu.layer_seconds", "host.tail_seconds", "links.latency", "drive.command_seconds"):
        machine = machine.with_value(path, 0.0)
    for path, value in (
        ("links.drives", 5e9),
        ("drive.link_bandwidth", 1e13),
        ("drive.channel_bandwidth", 1e13),
    ):
        machine = machine.with_value(path, value)
    for drives in (1, 4):
        found = simulate(machine, OPT_13B, "kvfs-dense", WORK, drives)
        step = found.steps[0]
        assert found.bottleneck == "drives_link"
        kv_bytes = 16 * (step.context - step.context % 16) * OPT_13B.token_bytes
        assert step.seconds == pytest.approx(kv_bytes / 5e9, rel=0.05)


def test_the_host_alone():
    """K and V in host memory: bytes over the CPUs' rate."""
    machine = only(load_machine("inf2"), host__attention_bandwidth=10e9)
    found = simulate(machine, OPT_13B, "flexgen-dram", WORK)
    step = found.steps[0]
    assert step.seconds == pytest.approx(16 * step.context * OPT_13B.token_bytes / 10e9, rel=0.01)


def test_the_gpu_alone():
    """The roofline: at small batches weights and K and V over memory bandwidth."""
    machine = only(load_machine("a100-pm9a3"), gpu__memory_bandwidth=1e12)
    found = simulate(machine, OPT_13B, "gpu-resident", Workload(1, 2048, 64))
    step = found.steps[0]
    moved = OPT_13B.geometry.num_layers * OPT_13B.layer_bytes + step.context * OPT_13B.token_bytes
    moved += 2 * OPT_13B.vocab_size * OPT_13B.hidden_size
    assert step.seconds == pytest.approx(moved / (1e12 * machine.gpu.bandwidth_share), rel=0.01)


def test_x_cache_gains_what_its_formula_says():
    """Drives read less, the link carries X, both end together: 1 / (1 - alpha + alpha * rho)."""
    machine = only(load_machine("inf2"), links__drives=8e9, drive__internal_bandwidth=3e9)
    work = Workload(16, 16_384, 16)
    dense, mixed = (simulate(machine, OPT_13B, name, work, 8) for name in ("kvfs-dense", "kvfs-x-cache"))
    alpha = share_of(0.5, 8e9, 24e9)
    gain = mixed.decode_tokens_per_second / dense.decode_tokens_per_second
    assert gain == pytest.approx(1 / (1 - alpha / 2), rel=0.03)


@pytest.mark.parametrize("system", NEAR_DATA)
def test_more_drives_never_hurt(system):
    """Nor is anything gained beyond what is not on the drives."""
    machine = load_machine("h100-instinfer")
    speeds = [simulate(machine, LLAMA_70B, system, WORK, drives).decode_tokens_per_second for drives in DRIVES]
    assert all(later >= 0.999 * earlier for earlier, later in pairwise(speeds))
    assert all(speed <= drives * speeds[0] for drives, speed in zip(DRIVES, speeds, strict=True))


DRIVES = (1, 2, 3, 4, 8, 16, 64)


def test_longer_contexts_take_longer():
    """Also over a million tokens."""
    machine = load_machine("h100-instinfer")
    values = [1 << power for power in range(10, 21)]
    found = sweep(machine, LLAMA_70B, ["kvfs-dense"], Workload(4, 1, 16), "context", values, 8)
    speeds = [one.decode_tokens_per_second for one in found]
    assert all(one.fits for one in found)
    assert speeds == sorted(speeds, reverse=True)
    assert [one.workload.input_tokens for one in found] == values


def test_some_layers_stand_for_all(monkeypatch):
    """What is not simulated goes on evenly."""
    machine = load_machine("instinfer")
    for system in ("kvfs-dense", "kvfs-sparf", "flexgen-ssd", "deepspeed-dram"):
        few = simulate(machine, OPT_13B, system, WORK, 2)
        monkeypatch.setattr(simulation, "SIMULATED_LAYERS", 40)
        every = simulate(machine, OPT_13B, system, WORK, 2)
        monkeypatch.undo()
        assert few.decode_seconds == pytest.approx(every.decode_seconds, rel=0.01)
        assert few.prefill_seconds == pytest.approx(every.prefill_seconds, rel=0.02)


def test_what_does_not_fit_says_so():
    """A speed of something that cannot run would be believed."""
    machine = load_machine("instinfer")
    found = simulate(machine, OPT_13B, "gpu-resident", Workload(64, 1024, 1024))
    assert not found.fits
    assert found.why_not.startswith("107 GB of K and V and 26 GB of weights, room for 38 GB in the GPU")
    found = simulate(machine, OPT_13B, "kvfs-dense", Workload(4096, 1024, 1024))
    assert found.why_not == "6.87 TB of K and V, room for 1.86 TB on 1 drive(s)"
    assert simulate(machine, OPT_13B, "kvfs-dense", Workload(4096, 1024, 1024), 4).fits


def test_written_bytes_and_amplification():
    """What endurance is worked out from: every token's K and V once, and what garbage collection copies."""
    machine = load_machine("instinfer")
    found = simulate(machine, OPT_13B, "kvfs-dense", WORK)
    assert found.bytes.flash_written_per_token == pytest.approx(OPT_13B.token_bytes)
    assert 1.0 <= found.waf < 1.2
    small = simulate(machine, OPT_13B, "kvfs-immediate", WORK)
    assert small.bytes.flash_written_per_token == pytest.approx(16 * OPT_13B.token_bytes)
    assert simulate(machine, OPT_13B, "gpu-resident", Workload(1, 128, 16)).waf is None


def test_delayed_writeback_and_sparse_systems_are_faster():
    """Else they would not be there."""
    machine = load_machine("inf2")
    work = Workload(16, 16_384, 64)
    names = ("kvfs-immediate", "kvfs-dense", "kvfs-sparf", "kvfs-sketch", "sparf-ideal")
    speeds = [simulate(machine, OPT_13B, name, work).decode_tokens_per_second for name in names]
    assert speeds == sorted(speeds)


def test_bad_requests():
    """One line that names what is wrong."""
    machine = load_machine("instinfer")
    with pytest.raises(BadMachine, match="system 'flexgen' is none of gpu-resident, flexgen-ssd"):
        simulate(machine, OPT_13B, "flexgen", WORK)
    with pytest.raises(BadMachine, match="num_drives is 1 to 65,536"):
        simulate(machine, OPT_13B, "kvfs-dense", WORK, 0)
    with pytest.raises(BadMachine, match="a sweep is over batch, context, output, drives, not 'time'"):
        sweep(machine, OPT_13B, ["kvfs-dense"], WORK, "time", [1])


def test_results_are_json():
    """`--json` prints them."""
    found = simulate(load_machine("instinfer"), OPT_13B, "kvfs-dense", WORK).as_dict()
    assert json.loads(json.dumps(found))["workload"]["batch"] == 16
