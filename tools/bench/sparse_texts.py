"""Long texts with needles, and what the model makes of them: computed once, and kept in a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from kvfs_bench.sparse_model import Past, load_model, next_log_probabilities, prefill
from kvfs_bench.sparse_needle import Needle, haystack, make_needles
from kvfs_bench.sparse_quality import Text
from kvfs_bench.sparse_schemes import Dense


@dataclass(frozen=True)
class Scale:
    """contexts: tokens, with those that are predicted at their end; num_predicted, num_needles: of each text,
    needles in the longest context; curve_predicted: tokens for all but the headline's setting"""

    contexts: tuple[int, ...] = (8192, 16_384, 32_768)
    num_texts: int = 3
    num_predicted: int = 512
    curve_predicted: int = 128
    num_needles: int = 24

    @property
    def text_tokens(self) -> int:
        return self.contexts[-1] + 1

    @property
    def document_tokens(self) -> int:
        return self.num_texts * self.text_tokens


class Texts:
    """All contexts of a text begin like it. Each has a past of its own: rotary embeddings differ by length."""

    def __init__(self, model_dir: Path, document: list[int], scale: Scale, folder: Path):
        """document: ids, at least scale.document_tokens of them; folder: for pasts"""
        self._model_dir, self._scale, self._folder = model_dir, scale, folder
        self._models: dict[int, torch.nn.Module] = {}
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
        self._texts: list[tuple[torch.Tensor, list[Needle]]] = []
        for number in range(scale.num_texts):
            part = document[number * scale.text_tokens : (number + 1) * scale.text_tokens]
            needles = make_needles(tokenizer, scale.num_needles, number)
            ids, needles = haystack(tokenizer, part, scale.text_tokens, needles)
            self._texts.append((torch.tensor(ids), needles))

    def model(self, context: int) -> torch.nn.Module:
        if context not in self._models:
            self._models[context] = load_model(self._model_dir, context)
        return self._models[context]

    def needles(self, context: int, number: int) -> list[Needle]:
        """Those that a text's past holds."""
        last = context - self._scale.num_predicted
        return [each for each in self._texts[number][1] if each.position + len(each.definition) <= last]

    def text(self, context: int, number: int, status: Callable[[str], None]) -> Text:
        path = self._folder / f"past-{context}-{number}.safetensors"
        ids = self._texts[number][0][: context + 1]
        behind = context - self._scale.num_predicted
        if not path.exists():
            status(f"{context} tokens of text {number + 1} are read by the model")
            past = prefill(self.model(context), ids[:behind])
            expected = next_log_probabilities(self.model(context), ids[behind:-1], Dense(past), behind)
            part = path.with_suffix(".part")
            halves = {
                f"{name}.{layer}": each.half().contiguous()
                for name in ("keys", "values")
                for layer, each in enumerate(getattr(past, name))
            }
            save_file({**halves, "expected": expected.contiguous()}, part)
            part.rename(path)
        saved = load_file(path)
        num_layers = len(saved) // 2
        past = Past(*([saved[f"{name}.{n}"].float() for n in range(num_layers)] for name in ("keys", "values")))
        return Text(past, ids[behind:], saved["expected"])
