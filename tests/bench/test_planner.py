"""The planner's arithmetic: formulas against numbers worked out by hand, and what no prediction may say."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.engines.x_cache.share import DRIVE, HOST, rho_of, seconds_of, share_of
from kvfs.errors import InvalidArgument
from kvfs.layout import GroupLayout
from kvfs_bench.planner import formulas
from kvfs_bench.planner.measured_quality import MEASURED, quality_of
from kvfs_bench.planner.model_shape import read_model
from kvfs_bench.planner.planning import Request, as_dict, compressed_workload, make_plan, workload
from kvfs_bench.planner.prediction import Command, command_seconds, predict
from kvfs_bench.planner.probe_sketch import SketchCommand, command_prices, kernel_prices
from kvfs_bench.planner.rates import DriveRates, ModelRates, Rates, SketchCosts, SketchRates

MIB = 1 << 20
GEOMETRY = "layers=8,heads=32,kv_heads=8,head_dim=128"
RATES = DriveRates(
    num_drives=1,
    num_workers=2,
    media=1e9,
    media_around_cached=0.8e9,
    media_random=2e8,
    read_cpu=1e-10,
    kernel=1e-10,
    cached_command=1e-3,
    cold_command=2e-3,
    append=1e-4,
    spill=1e-3,
    tail=1e-6,
    sketch=SketchRates(
        cold=SketchCosts(1e-9, 2e-9, 3e-3, 0),
        kept=SketchCosts(8e-10, 1.5e-9, 4e-3, 1e-10),
    ),
)
BANDWIDTHS = ("media", "media_around_cached", "media_random")
SECONDS = ("read_cpu", "kernel", "cached_command", "cold_command", "append", "spill", "tail")


def shape(**sizes):
    return read_model(GEOMETRY + "".join(f",{key}={value}" for key, value in sizes.items()), [])


def request(memory=200 * MIB, context=16_384, batch=1, **options) -> Request:
    return Request(shape(), memory, context, batch, **options)


def rates(**changes) -> Rates:
    model = ModelRates(None, "", None)
    return Rates(2, 1e10, 2e10, (replace(RATES, **changes),), model)


# formulas


@pytest.mark.parametrize(
    ("group_size", "placement", "expected"),
    [
        (1, DRIVE, 0.5),  # 2 * 2 / (6 + 2)
        (1, HOST, 0.4),  # 2 * 2 / (6 + 2 * 2)
        (2, DRIVE, 0.0),
        (4, DRIVE, 0.0),
        (8, DRIVE, 0.0),
        (2, HOST, 2 / 8),
        (4, HOST, 2 / 14),
    ],
)
def test_x_cache_share_and_the_gqa_rule(group_size, placement, expected):
    """A share where X is no smaller than K and V would add reads instead of saving them."""
    rho = rho_of(group_size)
    share = share_of(rho, link=2.0, drives=6.0, placement=placement)
    assert share == pytest.approx(expected)
    if share:
        on_drives, on_link = seconds_of(share, rho, 1.0, 2.0, 6.0, placement)
        assert on_drives == pytest.approx(on_link)


def test_x_cache_share_is_one_at_most():
    """Where the link is faster than the drives all of K and V may be X."""
    assert share_of(0.5, link=10.0, drives=1.0) == 1.0


def test_rho_of_a_model_narrower_than_its_heads():
    """rho is g / 2 only where the query heads are as wide as the model."""
    assert shape().rho == 2.0
    assert shape(hidden=1024).rho == 1024 / (2 * 8 * 128)


def test_writeback_tokens_that_fill_a_page():
    assert formulas.page_writeback_tokens(4096, 128) == 16


def test_link_bytes():
    """Per layer: 32 queries and 2 * 8 rows of 128 float16, 32 outputs of 128 float32 with an lse each."""
    found = formulas.link_bytes(shape().geometry, batch=2, num_tokens=1024)
    assert found.attention == 8 * 2 * (8192 + 4096 + 4 * 32 * 129)
    assert found.offload == 8 * 2 * 1024 * 4096


def test_pages_of_a_context():
    """16 tokens a page: 16,384 tokens of 8 KV heads are 64 MiB a layer; 255 tokens are 15 whole pages."""
    layout = GroupLayout(shape().geometry, 4096)
    assert formulas.flash_pages(layout, 16_384) * 4096 == 64 * MIB
    assert formulas.flash_pages(layout, 255) == 8 * 2 * 15
    assert request().kv_bytes == 512 * MIB


def test_sketch_pages():
    """512 tokens: 9 index pages, 16 of refinements, 64 dense; compression 8 may read a sixth of these."""
    dense = 16 * 64
    found = formulas.sketch_pages(shape().geometry, 8192, 8, 4096)
    assert (found.index, found.refinement, found.dense) == (16 * 9, 27, dense)  # 1024 / 6 - 144 = 26.7
    everything = formulas.sketch_pages(shape().geometry, 8192, 1, 4096)
    assert everything.refinement == 16 * 16
    assert formulas.sketch_pages(shape().geometry, 8192, 9.5, 4096).refinement == 0


def test_what_a_cache_keeps_of_a_loop():
    """All that fits; else all but a sixteenth, or what one command pins."""
    assert formulas.cached_bytes(100, 100, 50) == 100
    assert formulas.cached_bytes(1000, 160, 5) == 150
    assert formulas.cached_bytes(1000, 160, 80) == 80
    assert formulas.cached_bytes(1000, 150, 800) == 50


# prediction


def test_command_from_the_cache():
    """2 workers, 8 MiB at 1e-10 s a byte and thread, then the tail."""
    found = command_seconds(RATES, 2, Command(8 * MIB, 0, tail=1e-4))
    assert found.total == pytest.approx(1e-3 + 8 * MIB * 1e-10 / 2 + 1e-4)


def test_command_from_flash():
    """64 MiB: the media, and the last of eight windows computed; 2 MiB: read, then computed by one thread."""
    found = command_seconds(RATES, 2, Command(64 * MIB, 64 * MIB))
    assert found.limit == "media"
    assert found.total == pytest.approx(2e-3 + 64 * MIB / 1e9 + 8 * MIB * 1e-10 / 2)
    small = command_seconds(RATES, 2, Command(2 * MIB, 2 * MIB, tail=1e-4))
    assert small.total == pytest.approx(2e-3 + 2 * MIB / 1e9 + 2 * MIB * 1e-10 + 1e-4)


def test_command_of_two_drives():
    """Media and kernels of both, but no more threads than CPUs."""
    two = replace(RATES, num_drives=2, num_workers=1, media=2e9)
    found = command_seconds(two, 2, Command(64 * MIB, 64 * MIB))
    assert found.total == pytest.approx(2e-3 + 64 * MIB / 2e9 + 16 * MIB * 1e-10 / 2)


def test_kernels_may_be_the_limit():
    found = command_seconds(replace(RATES, kernel=1e-8), 2, Command(64 * MIB, 64 * MIB))
    assert found.limit == "kernel"
    assert found.total == pytest.approx(2e-3 + 8 * MIB / 1e9 + 64 * MIB * 1e-8 / 2)


@given(
    better=st.sampled_from([*BANDWIDTHS, *SECONDS]),
    factor=st.floats(1, 100),
    memory=st.integers(150, 700),
    context=st.integers(256, 32_768),
    slow=st.floats(0.1, 10),
)
def test_more_bandwidth_never_predicts_slower(better, factor, memory, context, slow):
    """A plan that got slower on a faster machine would be nonsense."""
    work = workload(request(memory * MIB, context), 256)
    before = replace(RATES, kernel=RATES.kernel * slow)
    scale = factor if better in BANDWIDTHS else 1 / factor
    after = replace(before, **{better: getattr(before, better) * scale})
    assert predict(after, 2, work).total <= predict(before, 2, work).total * (1 + 1e-9)


@given(
    memory=st.integers(100, 900),
    more=st.integers(0, 500),
    context=st.integers(256, 32_768),
    around=st.floats(0.1, 2),
    slow=st.floats(0.1, 100),
)
def test_more_memory_never_predicts_slower(memory, more, context, around, slow):
    """Nor with a larger cache."""
    found = replace(RATES, media_around_cached=around * 1e9, kernel=RATES.kernel * slow)
    less, larger = (
        predict(found, 2, workload(request(m * MIB, context), 256)) for m in (memory, memory + more)
    )
    assert larger.total <= less.total * (1 + 1e-9)
    assert larger.flash_bytes <= less.flash_bytes


# choices


def test_context_that_fits():
    """Then nothing is read from flash, and neither X-cache nor compression is advised."""
    made = make_plan(request(memory=1 << 30), rates())
    assert made.request.fits
    assert made.step.flash_bytes == made.step.media == 0
    assert made.compression is None
    assert made.x_cache.share == 0


def test_compressed_command():
    """16 MiB of index pages read beside their kernels, then 4 MiB of refinements likewise. What is cached has
    prices of its own, as kernels beside readers are slower than alone."""
    whole = {"refined_bytes": 4 * MIB, "refined_from_flash": 4 * MIB}
    found = command_seconds(RATES, 2, Command(20 * MIB, 20 * MIB, 1e-4, **whole))
    assert found.total == pytest.approx(3e-3 + 1e-4 + 16 * MIB / 1e9 + 4 * MIB / 2e8)
    slow = replace(RATES, media_random=2e9)
    found = command_seconds(slow, 2, Command(20 * MIB, 20 * MIB, **whole))
    assert found.total == pytest.approx(3e-3 + 16 * MIB / 1e9 + 4 * MIB * 2e-9 / 2)
    kept = command_seconds(RATES, 2, Command(20 * MIB, 4 * MIB, **whole))
    assert kept.total == pytest.approx(4e-3 + 4 * MIB * 1e-10 + 16 * MIB * 8e-10 / 2 + 4 * MIB / 2e8)
    half = command_seconds(RATES, 2, Command(20 * MIB, 8 * MIB, refined_bytes=4 * MIB))
    assert half.command == pytest.approx((4e-3 + 4 * MIB * 1e-10 + 3e-3) / 2)  # of index pages


def test_what_a_compressed_step_finds_in_a_cache():
    """Of 72 MiB of index pages all, before any of the refinements, of which what a step chooses is anywhere."""
    few, many = (
        compressed_workload(of, workload(of, 256, 0), 8)
        for of in (request(memory=90 * MIB), request(memory=200 * MIB))
    )
    assert few.refined_cached_bytes == 0 < many.refined_cached_bytes < 8 * many.refined_bytes
    assert 0 < few.cached_bytes < 72 * MIB
    index_bytes = 8 * (many.layer_bytes - many.refined_bytes)
    assert index_bytes == 72 * MIB
    assert many.cached_bytes == index_bytes + many.refined_cached_bytes
    step = predict(RATES, 2, many)
    assert step.flash_bytes == pytest.approx(8 * many.refined_bytes - many.refined_cached_bytes)
    assert step.limit != "model" and step.commands == pytest.approx(8 * 4e-3 + 8 * many.refined_bytes * 1e-10)


def test_compression_only_where_it_is_faster_and_its_quality_known():
    made = make_plan(request(), rates())
    assert made.compression == 8
    assert made.tokens_per_second == made.chosen_compression.tokens_per_second > made.chosen.tokens_per_second
    assert {one.compression for one in made.compressions if one.quality} == {
        one.compression for one in MEASURED
    }
    slow = SketchCosts(1e-7, 1e-7, 0, 0)
    assert make_plan(request(), rates(sketch=SketchRates(slow, slow))).compression is None
    assert make_plan(request(), rates(sketch=None)).compressions == ()


def test_measured_quality():
    """The worst and the best of all texts, so that nobody takes one lucky text for the rule."""
    found = quality_of(8)
    assert found.num_texts == 9
    assert found.agreement == (0.941, 0.988) and found.perplexity == (0.993, 1.012)
    assert quality_of(9) is None


def test_prices_of_sketches():
    """From commands of many and of few refinements; noise that explains nothing is no negative price."""
    commands = [SketchCommand(0, i * 3e-9 + r * 5e-9, i, r, 0) for i, r in ((100, 10), (100, 90), (50, 30))]
    assert kernel_prices(commands) == pytest.approx((3e-9, 5e-9))
    assert min(kernel_prices([SketchCommand(0, 1, 100, 10, 0), SketchCommand(0, 0.1, 100, 90, 0)])) > 0


def test_prices_of_compressed_commands():
    """A line through the medians of few and of many refinements; noise makes neither negative."""
    assert command_prices({100: [3.0, 2.0, 9.0], 300: [7.0]}) == pytest.approx((1.0, 0.02))
    assert command_prices({100: [3.0], 300: [1.0]}) == (3.0, 0.0)
    assert command_prices({100: [1.0], 300: [9.0]}) == (0.0, pytest.approx(0.01))
    assert command_prices({0: [-1.0]}) == (0.0, 0.0)


def test_x_cache_is_dropped_where_recomputing_costs_more():
    """A multi-head model and flash at 1 GB/s: projections keep up at 10 PFLOP/s, hardly at 1 TFLOP/s."""
    multi_head = read_model("layers=8,heads=32,head_dim=128,hidden=4096", [])
    wanted = Request(multi_head, 300 * MIB, 4096, 1)
    found = {}
    for flops in (1e10, 1e12, 1e16):
        measured = replace(rates(), model=ModelRates(0.0, "", flops), link=1e9)
        found[flops] = make_plan(wanted, measured).x_cache
    assert {one.formula for one in found.values()} == {1.0}
    assert found[1e10].share == 0.0
    assert 0 < found[1e12].share < 0.3
    assert found[1e16].share == 1.0


def test_a_faster_set_is_chosen():
    two = replace(RATES, num_drives=2, num_workers=1, media=2e9, media_around_cached=1.6e9)
    made = make_plan(request(num_drives=2), replace(rates(), drives=(RATES, two)))
    assert made.chosen.num_drives == 2
    no_faster = replace(two, media=1e9, media_around_cached=0.8e9)
    made = make_plan(request(num_drives=2), replace(rates(), drives=(RATES, no_faster)))
    assert made.chosen.num_drives == 1


def test_plan_as_json():
    """Every number of the plan, and all rates that it rests on."""
    found = json.loads(json.dumps(as_dict(make_plan(request(), rates()))))
    assert found["fits_in_memory"] is False
    assert set(found["measured"]["drives"][0]) == {field.name for field in fields(DriveRates)}
    assert [one["compression"] for one in found["compressions"]] == list(range(1, 10))
    storage = {one["dtype"]: one["token_bytes"] for one in found["storage"]}
    assert storage["float16"] == 8 * 4096
    assert storage["int4"] < storage["int8"] < storage["float16"] < storage["float32"]
    half = next(one for one in found["storage"] if one["dtype"] == "float16")
    assert half["sketch_bytes"] == half["token_bytes"] * 25 / 64  # 9 index pages and 16 of refinements of 64
    assert half["channel_bytes"] == half["token_bytes"] * (128 + 1) / 256  # K once more, and a page of means


# which model


def test_models_by_config(tmp_path):
    """A config alone is enough; text models inside others are found; no torch is needed."""
    config = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    found = read_model(str(tmp_path), [])
    assert (found.geometry.head_dim, found.geometry.dtype, found.weights_dtype) == (64, "bfloat16", "bfloat16")
    assert found.folder == tmp_path
    (tmp_path / "nested.json").write_text(json.dumps({"text_config": config}))
    assert read_model(str(tmp_path / "nested.json"), []).geometry.num_kv_heads == 2
    assert read_model(str(tmp_path), [], "int8").geometry.dtype == "int8"


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ("layers=2,heads=8", "head_dim"),
        ("heads=8,head_dim=64", "num_hidden_layers"),
        ("layers=2,heads=8,head_dim=60", "head_dim"),
        ("layers=2,heads=8,kv_heads=3,head_dim=64", "num_kv_heads"),
        ("layers=-2,heads=8,head_dim=64", "num_layers"),
        ("layers=two,heads=8,head_dim=64", "layers"),
        ("layers=2,heads=8,head_dim=64,hidden=0", "hidden_size"),
        ("layers=2,heads=8,head_dim=64,dtype=float17", "dtype"),
        ("layers=2,brains=8,head_dim=64", "brains"),
        ("no-such-model", "no-such-model"),
        ("no-such-file.json", "no-such-file.json"),
    ],
)
def test_impossible_models_name_the_field(model, field):
    with pytest.raises(InvalidArgument, match=field):
        read_model(model, [])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"context": 0}, "context"),
        ({"batch": 0}, "batch"),
        ({"batch": 1 << 20}, "batch"),
        ({"num_drives": 0}, "num_drives"),
        ({"memory": 10 * MIB}, "memory"),
        ({"memory": 200 * MIB, "batch": 64}, "memory"),
    ],
)
def test_impossible_requests_name_the_field(options, field):
    with pytest.raises(InvalidArgument, match=field):
        request(**options)
