"""vLLM on the CPU with kvfs's connector and without: what it costs when nothing is found, and what it saves.

Both engines are open at once, each in a process of its own, and take turns with the same prompts, new ones in
each round: the machine's moods meet both. Then the one with the connector is ended and started again, and gets
prompts that it has seen.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvfs
from kvfs_bench.figures import Figure

MOST_OVERHEAD = 1.03
LEAST_SPEEDUP = 5.0


class VllmMissing(RuntimeError):
    pass


@dataclass(frozen=True)
class Sizes:
    prompt_tokens: int
    new_tokens: int
    num_rounds: int
    long_tokens: int
    num_long: int


FULL = Sizes(1024, 64, 15, 4096, 3)
QUICK = Sizes(256, 8, 2, 512, 1)


class Engine:
    """A process of vllm_engine."""

    def __init__(self, model: Path, drive: Path | None):
        settings = {"model": str(model), "dtype": "float32", "drive": drive and str(drive)}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvfs_bench.vllm_engine", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> "Engine":
        self._read()
        return self

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"vLLM ended: {self._log.read()[-2000:]}")
        return json.loads(line)

    def ask(self, tokens: list[int], num_new: int) -> dict:
        print(json.dumps({"tokens": tokens, "num_new": num_new}), file=self._process.stdin, flush=True)
        return self._read()

    def __exit__(self, *exception) -> None:
        self._process.communicate()
        self._log.close()


def _prompt(seed: int, num_tokens: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 4000, num_tokens).tolist()


def measure(directory: Path, model: Path, quick: bool = False) -> list[Figure]:
    """model: a folder that vLLM can read. Raises VllmMissing; RuntimeError if outputs differ."""
    if importlib.util.find_spec("vllm") is None:
        raise VllmMissing("vLLM is missing: pip install 'kvfs[vllm]'")
    sizes = QUICK if quick else FULL
    long = [_prompt(1000 + number, sizes.long_tokens) for number in range(sizes.num_long)]
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        drive = Path(folder, "drive.kvfs")
        kvfs.format(drive, size="2GiB")
        plain, storing = Engine(model, None), Engine(model, drive)
        with plain, storing:
            pairs = [_round(number, plain, storing, sizes) for number in range(-1, sizes.num_rounds)][1:]
            computed = [plain.ask(prompt, 1) for prompt in long]
            for prompt in long:
                storing.ask(prompt, 1)
        with Engine(model, drive) as restarted:
            restarted.ask(_prompt(2000, sizes.long_tokens), 1)  # what a first request of any kind costs
            found = [restarted.ask(prompt, 1) for prompt in long]
    if [one["tokens"] for one in found] != [one["tokens"] for one in computed]:
        raise RuntimeError("a prompt that was found goes on with other tokens")
    if any(one["cached"] < sizes.long_tokens - 128 for one in found):
        raise RuntimeError(
            f"of {sizes.long_tokens} tokens only {min(one['cached'] for one in found)} were found"
        )
    return _figures(pairs, computed, found, sizes)


def _round(number: int, plain: Engine, storing: Engine, sizes: Sizes) -> tuple[float, float]:
    """Seconds without and with the connector, in turns the one or the other first."""
    prompt = _prompt(number + 1, sizes.prompt_tokens)
    order = [plain, storing] if number % 2 else [storing, plain]
    answers = {engine: engine.ask(prompt, sizes.new_tokens) for engine in order}
    if answers[plain]["tokens"] != answers[storing]["tokens"]:
        raise RuntimeError("tokens differ with the connector")
    if answers[storing]["cached"]:
        raise RuntimeError("a new prompt was found")
    return answers[plain]["seconds"], answers[storing]["seconds"]


def _figures(pairs, computed, found, sizes: Sizes) -> list[Figure]:
    plain, storing = (statistics.median(column) for column in zip(*pairs, strict=True))
    overhead = statistics.median(after / before for before, after in pairs)
    first, again = (statistics.median(one["seconds"] for one in answers) * 1e3 for answers in (computed, found))
    return [
        Figure(
            f"vllm.request_{sizes.prompt_tokens}_{sizes.new_tokens}",
            storing,
            "s",
            rival="without connector",
            rival_value=plain,
            ratio=storing / plain,
        ),
        Figure("vllm.overhead_without_hits", overhead, "ratio", goal=MOST_OVERHEAD, goal_is_maximum=True),
        Figure(
            f"vllm.first_token_{sizes.long_tokens}_after_restart",
            again,
            "ms",
            rival="computed",
            rival_value=first,
            ratio=again / first,
        ),
        Figure("vllm.first_token_speedup", first / again, "ratio", goal=LEAST_SPEEDUP),
    ]
