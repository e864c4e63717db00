"""The script that trains the demo's model."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "tools" / "train_demo_model.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_gives_a_model_that_loads(tmp_path):
    """Without it: the shipped weights cannot be reproduced or replaced by better ones."""
    pytest.importorskip("torch", reason="training needs torch: pip install torch transformers")
    transformers = pytest.importorskip(
        "transformers", reason="training needs transformers: pip install transformers"
    )
    sizes = ("--steps", 1, "--long-steps", 1, "--short-context", 64, "--long-context", 128, "--max-files", 20)
    command = [sys.executable, SCRIPT, "--out", tmp_path, *sizes]
    output = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert "held-out loss" in output.stdout
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert model.config.num_attention_heads == 4 * model.config.num_key_value_heads
    text = "def main():\n    return 1\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
