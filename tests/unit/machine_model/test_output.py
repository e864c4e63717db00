"""What users see of the machine model: costs, sensitivity, tables, pictures, the report, the fleet."""

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvfsctl.machine import app
from machine_model import SYSTEMS, BadMachine, Workload, load_machine, load_model, simulate, sweep, tables
from machine_model.economics import YEAR, Use, economics
from machine_model.fleet import fleet
from machine_model.sensitivity import sensitivity

ROOT = Path(__file__).resolve().parents[3]
WORK = Workload(batch=8, input_tokens=2048, output_tokens=64)


@pytest.fixture(scope="module")
def machine():
    priced = load_machine("instinfer")
    for path, value in (("host.price_usd", 5000.0), ("host.watts", 200.0)):
        priced = priced.with_value(path, value)
    return priced


@pytest.fixture(scope="module")
def model():
    return load_model("opt-13b")


@pytest.fixture(scope="module")
def result(machine, model):
    return simulate(machine, model, "kvfs-dense", WORK)


def kvfsctl(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kvfsctl", "machine", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_costs_by_hand(machine, result):
    """A price counted once too often, power at the wrong load, wear of one drive instead of all."""
    usd = machine.gpu.price_usd * machine.gpu.count + 5000 + machine.drive.price_usd
    watts = machine.gpu.watts * machine.gpu.count + 200 + machine.drive.watts
    found = economics(machine, result, Use(years=2, load=0.25, usd_per_kwh=0.2))
    assert (found.machine_usd, found.watts, found.unknown) == (usd, watts, ())
    tokens = 2 * YEAR * 0.25 * result.tokens_per_second
    power_usd = 2 * YEAR * 0.25 * watts / 3.6e6 * 0.2
    assert found.usd_per_million == pytest.approx((usd + power_usd) / tokens * 1e6)
    assert found.joules_per_token == pytest.approx(watts / result.tokens_per_second)
    drive = machine.drive
    erased = found.written_per_day * result.waf * 365.25 * found.endurance_years
    assert erased == pytest.approx(drive.capacity_bytes * (1 + drive.spare_share) * drive.rated_cycles)


def test_what_is_not_known_is_not_made_up(model):
    """A cost that looks like one."""
    machine = load_machine("instinfer")
    found = economics(machine, simulate(machine, model, "kvfs-dense", WORK))
    assert "host.price_usd" in found.unknown and found.usd_per_million is None
    assert ["a million tokens", "unknown"] in tables.costs(found)[1]


def test_a_system_without_drives_pays_none(machine, model):
    result = simulate(machine, model, "deepspeed-dram", WORK)
    found = economics(machine, result)
    assert found.machine_usd == machine.gpu.price_usd * machine.gpu.count + 5000
    assert not found.written_per_day and found.endurance_years is None


@pytest.mark.parametrize(("field", "value"), [("years", 0), ("load", 1.5), ("usd_per_kwh", -1)])
def test_impossible_use(field, value):
    with pytest.raises(BadMachine, match=field):
        replace(Use(), **{field: value})


def test_sensitivity_names_the_bottleneck(machine, model, result):
    """A drive that is the limit: its channels first; what is far from a limit not at all."""
    found = sensitivity(machine, model, "kvfs-dense", Workload(64, 2048, 64))
    assert found[0].path.startswith("drive.") and found[0].less < -0.1
    assert "host.price_usd" not in {one.path for one in found}
    assert all(one.less is None or one.less < 1e-9 for one in found if "bandwidth" in one.path)
    with pytest.raises(BadMachine, match="room"):
        sensitivity(machine, model, "gpu-resident", Workload(64, 1 << 20, 64))


def test_tables_say_all(machine, model):
    """Rows with fewer cells than columns; a system that fits nowhere takes one row."""
    found = sweep(machine, model, list(SYSTEMS), WORK, "drives", [1, 2, 4])
    for columns, rows in (tables.results(found, "drives"), tables.numbers(machine.numbers())):
        assert rows and {len(row) for row in rows} == {len(columns)}
    big = sweep(machine, model, ["gpu-resident"], Workload(64, 4096, 64), "drives", [1, 2, 4])
    assert [row[1] for row in tables.results(big, "drives")[1]] == ["1 to 4"]
    assert tables.quantity(768e9, "B/s") == "768 GB/s" and tables.quantity(45e-6, "s") == "45 us"


def test_fleet_bytes(machine, model):
    """Twice the drives on twice the hosts: the same for each host; on the wire a little more than the data."""
    small, large = (fleet(machine, model, "kvfs-dense", WORK, count, 4) for count in (100, 200))
    assert large.num_hosts == 2 * small.num_hosts == 50
    assert large.tokens_per_second == pytest.approx(2 * small.tokens_per_second)
    one = simulate(machine, model, "kvfs-dense", WORK, 4)
    data = one.bytes.link_per_token * one.decode_tokens_per_second
    assert data < small.decode_network < 1.2 * data
    with pytest.raises(BadMachine, match="drives_per_host"):
        fleet(machine, model, "kvfs-dense", WORK, 2, 4)


def test_scale_quotes_the_command():
    """A document whose numbers nobody computes any more."""
    result = kvfsctl("fleet", "-m", "h100-instinfer", "--model", "llama-3-70b", "--gpus", "4", "--json")
    assert result.returncode == 0, result.stderr
    text = (ROOT / "tools" / "machine_model" / "SCALE.md").read_text()
    for one in json.loads(result.stdout)["fleets"]:
        numbers = (one[name] for name in ("drives_per_host", "num_hosts", "tokens_per_second"))
        assert f"| {one['system']} | {' | '.join(f'{number:,.0f}' for number in numbers)} |" in text


class Sources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_report_and_picture(tmp_path):
    """One file that needs no other, and a PNG."""
    pytest.importorskip("matplotlib")
    picture, report = tmp_path / "sweep.png", tmp_path / "sweep.html"
    options = (
        "--model",
        "opt-13b",
        "--over",
        "drives",
        "--values",
        "1,4",
        "--systems",
        "kvfs-dense,flexgen-ssd",
    )
    result = kvfsctl("sweep", "-m", "instinfer", *options, "--plot", picture, "--report", report)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    sources = Sources()
    sources.feed(report.read_text())
    assert len(sources.found) == 1 and sources.found[0].startswith("data:image/png;base64,")
    assert "drive.channel_bandwidth" in report.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "-m", "nowhere", "--model", "opt-13b"), "machine 'nowhere'"),
        (("run", "-m", "instinfer", "--model", "gpt-9"), "gpt-9"),
        (("run", "-m", "instinfer", "--model", "opt-13b", "--system", "magic"), "system 'magic'"),
        (("run", "-m", "instinfer", "--model", "opt-13b", "--batch", "0"), "batch"),
        (
            ("run", "-m", "instinfer", "--model", "opt-13b", "--system", "gpu-resident", "--batch", "4096"),
            "room",
        ),
        (("run", "-m", "instinfer", "--model", "opt-13b", "--load", "2"), "load"),
        (("sweep", "-m", "instinfer", "--model", "opt-13b", "--over", "size"), "size"),
        (("sweep", "-m", "instinfer", "--model", "opt-13b", "--over", "batch", "--values", "1,x"), "1,x"),
        (("fleet", "-m", "instinfer", "--model", "opt-13b", "--drives", "2"), "drives_per_host"),
        (
            ("run", "-m", "instinfer", "--model", "opt-13b", "--plot", "/no/such/folder/x.png"),
            "nothing was drawn",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    """What is raised is kvfsctl's to print; anything else would be a traceback."""
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, SystemExit):
        assert result.exit_code in (1, 2) and words in result.stderr
    else:
        assert isinstance(result.exception, BadMachine) and words in str(result.exception)


def test_kvfsctl_prints_it():
    result = kvfsctl("show", "nowhere")
    assert result.returncode != 0 and len(result.stderr.splitlines()) == 1 and "'nowhere'" in result.stderr
