"""The demo's model and document: weights that ship with the package, sources that every Python has."""

import importlib.util
from pathlib import Path

MODEL_DIR = Path(__file__).parent / "demo_model"

# Held out of the model's training text, longest first, so that one module is enough for the usual contexts.
HELD_OUT_MODULES = ("argparse", "zipfile", "difflib", "asyncio.tasks", "statistics", "heapq")


class DemoError(Exception):
    """A reason, in one line, why the demo cannot run."""


def check_prerequisites(model_dir):
    """Raise DemoError, saying what to do, when a library or the model is missing."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (Path(model_dir) / name).is_file():
            raise DemoError(f"no model in {model_dir}: {name} is missing")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"{' and '.join(missing)} not installed: pip install torch transformers")


def load_model(model_dir):
    """(model, tokenizer); computes in float32, with Transformers' default attention, and never stops early."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, PreTrainedTokenizerFast.from_pretrained(model_dir)


def document_ids(tokenizer, num_tokens, num_more=0):
    """The first `num_tokens` ids of the held-out modules' sources on this machine, one after the other.

    Behind them come up to num_more, as far as the document goes.
    """
    ids = []
    for name in HELD_OUT_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        ids += tokenizer(Path(spec.origin).read_text(encoding="utf-8"))["input_ids"]
        if len(ids) >= num_tokens + num_more:
            return ids[: num_tokens + num_more]
    if len(ids) >= num_tokens:
        return ids
    raise DemoError(f"--context {num_tokens}: the document has {len(ids)} tokens")
