"""What the demo compares kvfs with: right tokens, and link bytes counted as they are."""

import pytest

pytest.importorskip("torch", reason="the demo needs torch: pip install torch transformers")
pytest.importorskip("transformers", reason="the demo needs transformers: pip install torch transformers")

import torch

from kvfsctl.demo_document import HELD_OUT_MODULES, MODEL_DIR, DemoError, document_ids, load_model
from kvfsctl.demo_rivals import FileCache, RoundedCache

CONTEXT, NEW = 200, 5


@pytest.fixture(scope="module")
def model_and_tokenizer():
    """The model that ships with the demo."""
    return load_model(MODEL_DIR)


def generate(model, ids, cache):
    return model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
    )


def test_offloading_computes_the_right_tokens_and_counts_its_bytes(model_and_tokenizer, tmp_path):
    """Without it: kvfs is compared with a rival that cheats or is crippled."""
    model, tokenizer = model_and_tokenizer
    ids = document_ids(tokenizer, CONTEXT)
    cache = FileCache(tmp_path / "kv", model.config.num_hidden_layers, CONTEXT + NEW, torch.float16)
    tokens = generate(model, ids, cache)
    assert torch.equal(tokens, generate(model, ids, RoundedCache(torch.float16)))
    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    written = (CONTEXT + NEW - 1) * token_bytes
    read = sum(CONTEXT + step for step in range(1, NEW)) * token_bytes
    assert cache.link_bytes() == written + read
    cache.close()


def test_the_document_is_real_and_long_enough(model_and_tokenizer):
    """Without it: the demo's prompt is shorter than it says."""
    _, tokenizer = model_and_tokenizer
    ids = document_ids(tokenizer, 4096)
    assert len(ids) == 4096
    assert (
        tokenizer.decode(ids[:400]).startswith("# Author: Steven J. Bethard")
        or HELD_OUT_MODULES[0] != "argparse"
    )
    with pytest.raises(DemoError, match="the document has"):
        document_ids(tokenizer, 10**7)
