"""TOML files of machines and models: those shipped load, impossible ones are refused by field and unit."""

import shutil

import pytest

from machine_model import BadMachine, Workload, load_machine, load_model, machine_names, model_names
from machine_model.catalogue import MACHINES

MODEL = """
layers = 40
query_heads = 40
kv_heads = 40
head_dim = 128
hidden_size = 5120
intermediate_size = 20480
vocab_size = 50272
source = "made up"
"""


@pytest.fixture
def edited(tmp_path):
    """A shipped machine with a line of one of its files replaced: a function of (file, number, the line)."""
    shutil.copytree(MACHINES, tmp_path / "machines")

    def edit(file: str, number: str, text: str):
        path = tmp_path / "machines" / file
        lines = path.read_text().splitlines()
        found = [i for i, line in enumerate(lines) if line.startswith(f"{number} =")]
        assert found, number
        lines[found[0]] = text
        path.write_text("\n".join(lines))
        return load_machine(tmp_path / "machines" / "instinfer.toml")

    return edit


GPU, DRIVE, MACHINE = "gpus/a6000.toml", "drives/instinfer.toml", "instinfer.toml"
SOURCE = 'source = "made up"'


@pytest.mark.parametrize(
    ("file", "number", "value", "told"),
    [
        (GPU, "memory_bandwidth", '"768 GB"', "gpu.memory_bandwidth is in B/s, as '768 GB/s', not '768 GB'"),
        (GPU, "memory_bandwidth", '"768 Gb/s"', "gpu.memory_bandwidth is in B/s"),  # bits
        (GPU, "memory_bandwidth", '"768 Gbit/s"', "gpu.memory_bandwidth is in B/s"),
        (GPU, "memory_bandwidth", '"768 MB/s"', "gpu.memory_bandwidth is 1e+10 to 1e+14 (B/s)"),  # a prefix off
        (
            GPU,
            "memory_bandwidth",
            "768",
            "in B/s, as '768 GB/s', not 768 without a unit",
        ),
        (
            GPU,
            "memory_bandwidth",
            '"-768 GB/s"',
            "is 1e+10 to 1e+14 (B/s), not '-768 GB/s'",
        ),
        (GPU, "memory_bytes", '"48 GB/s"', "gpu.memory_bytes is in B, as '48 GB', not '48 GB/s'"),
        (GPU, "flops", '"154.8 TFLOP"', "gpu.flops is in FLOP/s"),
        (GPU, "flops_share", "50", "gpu.flops_share is 0.01 to 1 (no unit), not 50"),
        (GPU, "flops_share", '"50%"', "gpu.flops_share is a number without a unit, as 0.85, not '50%'"),
        (GPU, "count", "1.5", "gpu.count is a whole number without a unit, as 8, not 1.5"),
        (GPU, "count", "0", "gpu.count is 1 to 4096 (no unit), not 0"),
        (GPU, "count", "inf", "gpu.count is a whole number without a unit, as 8, not inf"),
        (GPU, "flops_share", "nan", "gpu.flops_share is 0.01 to 1 (no unit), not nan"),
        (GPU, "flops_share", "0", "gpu.flops_share is 0.01 to 1 (no unit), not 0"),
        (DRIVE, "channels", "4096", "drive: 262,144 planes, channels x dies x planes, are more than 16,384"),
        (DRIVE, "read_seconds", '"45 ms"', "drive.read_seconds is 1e-07 to 0.002 (s), not '45 ms'"),
        (DRIVE, "read_seconds", '"45"', "drive.read_seconds is in s, as '50 us', not '45'"),
        (DRIVE, "channels", "-8", "drive.channels is 1 to 4096 (no unit), not -8"),
        (DRIVE, "page_bytes", '"5000 B"', "drive.page_bytes is a power of two (B), not '5000 B'"),
        (DRIVE, "capacity_bytes", '"two TB"', "drive.capacity_bytes is in B, as '48 GB', not 'two TB'"),
        (DRIVE, "price_usd", '"1500 EUR"', "drive.price_usd is in USD, as '4650 USD', not '1500 EUR'"),
        (MACHINE, "free_bytes", '"97 GB"', "host.free_bytes is more than host.memory_bytes (B)"),
        (MACHINE, "weights_bandwidth", '"64 GB/s"', "software.weights_bandwidth is more than links.gpu (B/s)"),
        (MACHINE, "num_drives", "0", "num_drives is 1 to 1e+09 (no unit), not 0"),
    ],
)
def test_impossible_numbers(edited, file, number, value, told):
    """A wrong number would be bought by."""
    with pytest.raises(BadMachine) as error:
        edited(file, number, f"{number} = {{ value = {value}, {SOURCE} }}")
    assert told in str(error.value)
    assert str(error.value).startswith("instinfer.toml: ")


@pytest.mark.parametrize(
    ("file", "number", "text", "told"),
    [
        (GPU, "flops", "", "gpu.flops is missing: in FLOP/s, as '154.8 TFLOP/s'"),
        (DRIVE, "channels", "", "drive.channels is missing: a number without a unit, as 8"),
        (MACHINE, "num_drives", "", "num_drives is missing: a whole number without a unit, as 8"),
        (GPU, "flops", 'flops = "154.8 TFLOP/s"', "gpu.flops is { value = "),
        (GPU, "flops", 'flops = { value = "154.8 TFLOP/s" }', "gpu.flops lacks its source"),
        (GPU, "flops", f"flops = {{ {SOURCE} }}", 'gpu.flops lacks its value, as "154.8 TFLOP/s"'),
        (GPU, "flops", 'flopps = { value = "1 TFLOP/s", source = "x" }', "gpu.flopps is none of"),
        (
            GPU,
            "flops",
            f'flops = {{ value = "1 TFLOP/s", unit = 1, {SOURCE} }}',
            "gpu.flops: unit is none of",
        ),
        (MACHINE, "file", 'file = "b6000"', "file = 'b6000': no such file in gpus/; shipped are a100-40"),
        (GPU, "flops", "flops = [", "is no TOML"),
    ],
)
def test_files_that_say_too_little(edited, file, number, text, told):
    """A default in place of what was forgotten would look like a measurement."""
    with pytest.raises(BadMachine) as error:
        edited(file, number, text)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("layers = 0", "layers is 1 to 1e+09 (no unit), not 0"),
        ("layers = -40", "layers is 1 to 1e+09 (no unit), not -40"),
        ("layers = '40'", "layers is a whole number without a unit, as 8, not '40'"),
        ("kv_heads = 7", "num_query_heads (40) is a multiple of num_kv_heads (7)"),
        ("head_dim = 100", "head_dim is a multiple of 8 from 32 to 256, not 100"),
        ("mlp_matrices = 4", "mlp_matrices is 2 or 3 (no unit), not 4"),
        ("dtype = 'float64'", "dtype is one of"),
        ("dtype = [1]", "dtype is a name"),
        ("width = 3", "width is none of"),
        ("source = ''", "source is missing"),
    ],
)
def test_impossible_models(tmp_path, line, told):
    """As machines."""
    name = line.split(" =")[0]
    lines = [one for one in MODEL.splitlines() if not one.startswith(f"{name} =")]
    path = tmp_path / "odd.toml"
    path.write_text("\n".join([*lines, line]))
    with pytest.raises(BadMachine) as error:
        load_model(path)
    assert told in str(error.value)


def test_model_without_a_field(tmp_path):
    """As above."""
    path = tmp_path / "short.toml"
    path.write_text(MODEL.replace("layers = 40\n", ""))
    with pytest.raises(BadMachine, match="layers is missing: a whole number without a unit"):
        load_model(path)


def test_unknown_names():
    """A list of what there is saves a search."""
    with pytest.raises(BadMachine, match=r"machine 'a7000' is no \.toml file and none of .*instinfer"):
        load_machine("a7000")
    with pytest.raises(BadMachine, match=r"model 'opt-13c' is no \.toml file and none of .*opt-13b"):
        load_model("opt-13c")
    with pytest.raises(BadMachine, match="No such file"):
        load_machine("nowhere.toml")


def test_shipped_machines_load_and_have_sources():
    """A number without a source is a guess nobody can check."""
    assert {"instinfer", "inf2", "flexgen-t4", "a100-pm9a3", "h100-pm9a3"} <= set(machine_names())
    for name in machine_names():
        machine = load_machine(name)
        assert len(machine.numbers()) > 40
        assert all(len(number.source) > 3 for number in machine.numbers())


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-13b", 12.9),
        ("opt-30b", 30.0),
        ("opt-66b", 65.7),
        ("opt-175b", 174.6),
        ("llama-2-13b", 13.0),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("qwen2.5-32b", 32.8),
    ],
)
def test_models_are_as_large_as_their_names_say(name, billions):
    """A wrong shape gives wrong bytes everywhere."""
    assert load_model(name).weights_bytes / 2e9 == pytest.approx(billions, rel=0.02)
    assert name in model_names()


def test_changing_numbers():
    """Sensitivity is measured so."""
    machine = load_machine("instinfer")
    changed = machine.with_changed("drive.channel_bandwidth", 1.5)
    assert changed.drive.channel_bandwidth == pytest.approx(1.5 * machine.drive.channel_bandwidth)
    assert machine.with_changed("drive.read_share", 2.0).drive.read_share == 1.0
    assert machine.with_changed("drive.channels", 2.0).drive.channels == 16
    assert machine.with_changed("num_drives", 3.0).num_drives == 3
    assert machine.with_changed("drive.page_bytes", 1.9).drive.page_bytes == 2 * machine.drive.page_bytes
    for number in machine.numbers():
        machine.with_changed(number.path, 1.1)
    with pytest.raises(BadMachine, match=r"'gpu\.speed' is no number of the machine instinfer"):
        machine.with_changed("gpu.speed", 2.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch": 0}, "batch is 1 to"),
        ({"batch": 1.5}, "batch is a whole number, not 1.5"),
        ({"input_tokens": -1}, "input_tokens is 1 to"),
        ({"compression": 0.5}, "compression is 1 to 64, not 0.5"),
        ({"x_share": 2}, "x_share is 0 to 1, not 2"),
    ],
)
def test_impossible_workloads(options, told):
    """As machines."""
    with pytest.raises(BadMachine) as error:
        Workload(**{"batch": 1, "input_tokens": 1, "output_tokens": 1} | options)
    assert told in str(error.value)
