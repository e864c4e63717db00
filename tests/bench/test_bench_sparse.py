"""The benchmark of sparse attention at its smallest: what it says about schemes, never how fast they are."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="bench sparse needs torch: pip install kvfs[transformers]")
pytest.importorskip("transformers", reason="bench sparse needs transformers: pip install kvfs[transformers]")

import torch
from transformers import PreTrainedTokenizerFast

from kvfs import Store
from kvfs_bench import sparse, sparse_speed
from kvfs_bench.figures import report
from kvfs_bench.sparse_model import Past, load_model, next_log_probabilities, prefill
from kvfs_bench.sparse_needle import haystack, make_needles
from kvfs_bench.sparse_quality import CURVES, DENSE_SETTING, PUBLISHED, sketch
from kvfs_bench.sparse_schemes import Dense, MeanPages, Oracle, Sketch, Sketches, SparF, Window
from kvfs_bench.sparse_statistics import HeadSource, HeadStatistics, measure_head
from kvfsctl.demo_document import MODEL_DIR, document_ids

HAS_SPARSE = "compression" in inspect.signature(Store.attend).parameters


@pytest.fixture(scope="module")
def past():
    """Two layers of normal rows, head_dim 64: 1,024 tokens are one segment of a sketch."""
    random = torch.Generator().manual_seed(5)
    layers = [[torch.randn(2, 1024, 64, generator=random).half().float() for _ in range(2)] for _ in range(2)]
    return Past(*(list(part) for part in zip(*layers, strict=True)))


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(MODEL_DIR)


def _exact(past, layer, queries):
    keys, values = past.keys[layer].double(), past.values[layer].double()
    scores = torch.einsum("thgd,hnd->thgn", queries.double(), keys)
    return torch.einsum("thgn,hnd->thgd", scores.softmax(-1), values), scores.logsumexp(-1)


def _queries(scale=0.125):
    return scale * torch.randn(3, 2, 4, 64, generator=torch.Generator().manual_seed(6))


def test_all_pages_are_exact(past):
    """Schemes that may read everything are dense attention: whatever they lose elsewhere is their choice's."""
    queries = _queries()
    out, lse = _exact(past, 1, queries)
    whole = (Dense(past), Oracle(past, 1), SparF(past, 64, 1024))
    for scheme in whole:
        found, found_lse = scheme.attend(1, queries)
        torch.testing.assert_close(found.double(), out, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found_lse.double(), lse, atol=1e-4, rtol=1e-5)
    assert whole[0].pages.share == whole[1].pages.share == 1
    assert whole[2].pages.share > 1.9  # all of K twice, all of V
    found, _ = Sketch(past, Sketches(past), 1.0).attend(1, queries)
    assert (found - out).norm() < 0.05 * out.norm()  # 6 bits


def test_pages_are_counted(past):
    """Bytes that nobody counts would make any method look good."""
    layer_pages = 2 * 1024 // 32  # of a head: K and V, 32 tokens a page
    for scheme, pages in (
        (Sketch(past, Sketches(past), 8), 10),  # 9 of the sketch and one of refinements
        (Window(past, 1 / 4), layer_pages // 4),
        (Oracle(past, 1 / 8), layer_pages // 8),
        (MeanPages(past, 1 / 4), 2 + 2 * 7),  # of 16: means take two
    ):
        scheme.attend(0, _queries())
        assert scheme.pages.read == 3 * 2 * pages, scheme
        assert scheme.pages.dense == 3 * 2 * layer_pages
    sparf = SparF(past, 8, 64)
    sparf.attend(0, _queries())
    per_query = sparf.pages.read / 6
    assert 8 + 1 <= per_query <= 4 * 8 + 1 + layer_pages


def test_past_and_new_tokens_are_one_context(tokenizer):
    """A model over a past by other means predicts what it predicts over the whole text."""
    model = load_model(MODEL_DIR)
    ids = torch.tensor(document_ids(tokenizer, 96))
    past = prefill(model, ids[:64])
    found = next_log_probabilities(model, ids[64:], Dense(past), 64)
    expected = torch.log_softmax(model(ids[None], use_cache=False).logits[0, 64:], -1)
    assert (found - expected).abs().max() < 0.05  # K and V are rounded to float16


def test_needles_are_in_the_haystack(tokenizer):
    """A question whose answer is nowhere would find nothing with any method."""
    needles = make_needles(tokenizer, 5, 1)
    ids, placed = haystack(tokenizer, document_ids(tokenizer, 2000), 2000, needles)
    assert len(ids) == 2000 and len(placed) == 5
    for needle in placed:
        there = ids[needle.position : needle.position + len(needle.definition)]
        asked = needle.question + needle.answer
        assert there == needle.definition and there[: len(asked)] == asked


def test_generated_heads_have_the_statistics(tmp_path):
    """Speeds on keys that look like nothing real would say nothing."""
    spectrum = (0.9 ** np.arange(64)).tolist()
    wanted = HeadStatistics(spectrum, spectrum, spectrum, 0.3, 0.1, 0.2, 0.1, 0.3, 2.0, 5.0)
    wanted.save(tmp_path / "heads.json")
    assert HeadStatistics.load(tmp_path / "heads.json") == wanted
    source = HeadSource(wanted, 128, 1)
    keys, values = source.keys_values(8192)
    found = measure_head(keys, values, source.queries(2000, 2) / 128**0.5)
    assert found.key_drift == pytest.approx(0.3, abs=0.06)
    assert found.key_mean == pytest.approx(0.2, abs=0.05)
    assert found.query_mean == pytest.approx(0.3, abs=0.05)
    assert found.score_std == pytest.approx(2.0, rel=0.2)
    assert found.sink == pytest.approx(5.0, abs=1.5)
    assert sum(found.key_spectrum[:32]) == pytest.approx(
        sum(spectrum[:16]) / sum(spectrum), abs=0.05
    )  # as much in a quarter of the channels


def _measured(tmp_path, simulated):
    document = document_ids(PreTrainedTokenizerFast.from_pretrained(MODEL_DIR), sparse.QUICK.document_tokens)
    figures, raw, settings = sparse.measure(tmp_path, MODEL_DIR, document, quick=True, simulated=simulated)
    json.dumps(raw)
    return {figure["name"]: figure for figure in report("sparse", figures)["figures"]}, raw, settings


def _check(figures, raw):
    assert figures["sparse.1056.bytes_share"]["met"]
    assert figures["sparse.1056.agreement"]["value"] > 0.8
    assert figures["sparse.1056.perplexity_ratio"]["value"] < 1.1
    assert figures["sparse.1056.needles.sketch"]["goal"] == figures["sparse.1056.needles.dense"]["value"]
    dense = next(each for each in raw["curves"] if each["scheme"] == DENSE_SETTING.scheme)
    assert dense["bytes_share"] == dense["agreement"] == dense["clear_agreement"] == 1


def test_simulated(tmp_path):
    """The curves that need no drive."""
    figures, raw, _ = _measured(tmp_path, simulated=True)
    _check(figures, raw)
    sparse.plot(raw, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.skipif(not HAS_SPARSE, reason="Store.attend has no compression")
def test_drive_does_what_is_simulated(tmp_path, past):
    """A drive that reads other pages than the method says, or computes something else, is quoted wrongly."""
    from kvfs_bench.sparse_drive import OnDrive, stored

    sketches = Sketches(past)
    with stored(tmp_path, [past], 4) as (store, [sequence]):
        for setting in (DENSE_SETTING, sketch(8.0), sketch(4.0), PUBLISHED):
            simulated, there = (
                setting.simulate(past, sketches),
                OnDrive(store, sequence, past, **setting.on_drive(past)),
            )
            (out, lse), (expected, expected_lse) = there.attend(1, _queries()), simulated.attend(1, _queries())
            # the drive rounds queries and weights to bytes where it reads 2-bit codes
            assert (out - expected).norm() <= 1e-2 * expected.norm(), setting.label
            torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=1e-3)
            assert there.pages.share == pytest.approx(simulated.pages.share, abs=0.02), setting.label
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not HAS_SPARSE, reason="Store.attend has no compression")
def test_drive(tmp_path, monkeypatch):
    """Names of figures: one that vanishes breaks every comparison."""
    monkeypatch.setattr(sparse_speed, "QUICK", replace(sparse_speed.QUICK, num_layers=6))
    figures, raw, settings = _measured(tmp_path, simulated=False)
    _check(figures, raw)
    assert figures["sparse.speed.ratio_vs_flexgen"]["goal"] == 11.1
    assert figures["sparse.speed.kvfs.relative_error"]["value"] < 1e-3
    assert settings["kvfs_sketch"] and settings["memory cap"]
    assert list(tmp_path.iterdir()) == []


def test_every_setting_can_be_simulated(past):
    """A curve without points."""
    sketches = Sketches(past)
    for setting in CURVES:
        out, lse = setting.simulate(past, sketches).attend(0, _queries())
        assert torch.isfinite(out).all() and torch.isfinite(lse).all(), setting.label


def test_a_stopped_run_goes_on(tmp_path, tokenizer):
    """An hour of measuring would be lost with the machine, or be mixed with another run's."""
    document = document_ids(tokenizer, sparse.QUICK.document_tokens)
    options = {"quick": True, "simulated": True, "resume": tmp_path / "kept"}
    with pytest.raises(sparse.OutOfTime):
        sparse.measure(tmp_path, MODEL_DIR, document, minutes=1e-9, **options)
    path = tmp_path / "kept" / "points.jsonl"
    _, raw, _ = sparse.measure(tmp_path, MODEL_DIR, document, **options)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])  # cut off while it was written
    begun = []
    _, again, _ = sparse.measure(
        tmp_path, MODEL_DIR, document, **options, progress=lambda done, of, what: begun.append((done, of))
    )
    assert begun[0] == (len(lines) - 3, len(lines) - 1)
    assert again == raw
    with pytest.raises(ValueError, match="another run"):
        sparse.measure(tmp_path, MODEL_DIR, [*document[1:], 5], **options)
