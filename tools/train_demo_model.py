"""Train a model like the one that ships with `kvfsctl demo`, from scratch, on this machine's standard library.

    python tools/train_demo_model.py --out my-model            # one to three hours on two CPU cores
    kvfsctl demo --model my-model

Text: the sources of the Python that runs this (Copyright Python Software Foundation, PSF licence), except the
modules that serve as prompts. Two stages: most tokens at a short context, some at the demo's. The result (fp16
safetensors, tokenizer, configuration) loads with Transformers' `from_pretrained`. A run depends on the seed,
the Python version (its sources are the text) and the machine's arithmetic: losses repeat, bytes do not.
"""

import importlib.util
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvfsctl.demo_document import HELD_OUT_MODULES

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"

# Tokens in one optimizer step, at every context length.
TOKENS_PER_STEP = 8192

# Held-out loss is measured over this many tokens of context, on the beginning of each held-out module.
EVALUATED_TOKENS = 2048


@dataclass(frozen=True)
class Stage:
    """A part of the training at one context length."""

    name: str
    context_tokens: int
    num_steps: int
    learning_rate: float  # relative to MUON_LEARNING_RATE and ADAM_LEARNING_RATE
    constant_share: float  # of the steps, before the rate falls linearly to zero


MUON_LEARNING_RATE = 0.02  # matrices inside the layers
ADAM_LEARNING_RATE = 2.5e-3  # embeddings and norms


def training_files():
    """Paths of the standard library's sources, without installed packages and the held-out modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = {Path(path).resolve() for path in held_out_files()}
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return [path for path in files if path.resolve() not in held_out]


def held_out_files():
    """Paths of the sources that are prompts and measure the held-out loss."""
    return [Path(importlib.util.find_spec(name).origin) for name in HELD_OUT_MODULES]


def read(path):
    """Text of a source file; the few that are no UTF-8 (tests of encodings) count as empty."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def train_tokenizer(texts):
    """Byte-level BPE over the training text, as Transformers' fast tokenizer."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def encode(tokenizer, texts):
    """All texts, one after the other, an end-of-text token after each: uint16 [num_tokens]."""
    parts = []
    for ids in tokenizer(texts)["input_ids"]:
        parts += [np.array(ids, np.uint16), np.array([tokenizer.eos_token_id], np.uint16)]
    return np.concatenate(parts)


def new_model(longest_context):
    """The demo's architecture with fresh weights: 5.97 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2 * longest_context,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal: all directions of the matrix learn at one pace.

    In float32 throughout: torch's own computes in bfloat16, which CPUs without its instructions do ten times
    slower.
    Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    # A quintic whose fifth iterate maps singular values in (0, 1] to about 1.
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    NUM_ITERATIONS = 5
    MOMENTUM = 0.95

    def __init__(self, matrices, lr):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self):
        """Apply the gradients of all matrices."""
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1.0 - self.MOMENTUM)
                update = self.orthogonal(matrix.grad.lerp(momentum, self.MOMENTUM))
                # Keeps the size of an entry's change the same for wide and tall matrices.
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.add_(update, alpha=-group["lr"] * scale)

    @classmethod
    def orthogonal(cls, matrix):
        """The nearest matrix with all singular values about 1 (Newton-Schulz iteration)."""
        a, b, c = cls.COEFFICIENTS
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        wide = wide / (wide.norm() + 1e-7)
        for _ in range(cls.NUM_ITERATIONS):
            square = wide @ wide.T
            wide = a * wide + (b * square + c * square @ square) @ wide
        return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def optimizers(model):
    """Muon for the layers' matrices, AdamW for everything else (tied embeddings, norms)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        (Muon(matrices, lr=MUON_LEARNING_RATE), MUON_LEARNING_RATE),
        (
            torch.optim.AdamW(others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
            ADAM_LEARNING_RATE,
        ),
    ]


def batch(tokens, stage, generator):
    """Random windows of the text: int64 [windows, context_tokens]."""
    windows = max(1, TOKENS_PER_STEP // stage.context_tokens)
    starts = generator.integers(0, len(tokens) - stage.context_tokens, windows)
    return torch.from_numpy(
        np.stack([tokens[at : at + stage.context_tokens] for at in starts]).astype(np.int64)
    )


def rate(stage, step):
    """Learning rate of a step, relative: constant, then linearly to zero."""
    done = step / stage.num_steps
    return stage.learning_rate * min(1.0, (1.0 - done) / (1.0 - stage.constant_share))


def train(model, tokens, stage, generator):
    """Run one stage; prints the loss (nats per token) now and then."""
    model.train()
    steppers = optimizers(model)
    began, losses = time.perf_counter(), []
    for step in range(stage.num_steps):
        ids = batch(tokens, stage, generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, base_rate in steppers:
            for group in optimizer.param_groups:
                group["lr"] = base_rate * rate(stage, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == stage.num_steps:
            minutes = (time.perf_counter() - began) / 60
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(
                f"{stage.name}: step {step + 1}/{stage.num_steps}, loss {mean:.3f}, {minutes:.1f} min",
                flush=True,
            )


@torch.inference_mode()
def held_out_loss(model, tokenizer):
    """Mean loss, nats per token, over the beginning of every held-out module."""
    model.eval()
    losses = []
    for path in held_out_files():
        ids = torch.tensor([tokenizer(read(path))["input_ids"][:EVALUATED_TOKENS]])
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def main(
    out: Annotated[Path, typer.Option(help="Directory for the model.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps at the short context.")] = 1720,
    long_steps: Annotated[int, typer.Option(min=0, help="Steps at the long context.")] = 214,
    short_context: Annotated[int, typer.Option(min=16)] = 1024,
    long_context: Annotated[int, typer.Option(min=16)] = 4096,
    max_files: Annotated[int | None, typer.Option(min=1, help="Use only so many files (for a trial).")] = None,
    seed: int = 0,
):
    """Train a model like kvfsctl demo's on this machine's standard library."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    texts = [text for path in training_files()[:max_files] if (text := read(path))]
    tokenizer = train_tokenizer(texts)
    tokens = encode(tokenizer, texts)
    print(f"{len(texts):,} files, {len(tokens):,} tokens, seed {seed}", flush=True)
    if len(tokens) <= max(short_context, long_context):
        raise typer.BadParameter(f"{len(tokens)} tokens of text are too few for the context")

    model = new_model(long_context)
    train(model, tokens, Stage("short context", short_context, steps, 1.0, 0.6), generator)
    if long_steps:
        # Lower: the first stage has annealed already, this one only teaches longer distances.
        train(model, tokens, Stage("long context", long_context, long_steps, 0.2, 0.2), generator)
    print(f"held-out loss {held_out_loss(model, tokenizer):.3f} nats per token", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
