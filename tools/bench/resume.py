"""Time to the first token of a prompt that another process has computed before, against computing it again.

Each measurement is a process of its own, as after a restart: it loads the model, opens the drive, and warms up
with another prompt, so that no compiler runs in the timed part. What it resumes it has never read, and the
drive's file is not in the page cache. Turns alternate, since the machine may be another's, too.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kvfs_bench.figures import Figure

PROMPT_TOKENS = 4096
WARM_UP_TOKENS = 600  # two groups and more
ANSWER_TOKENS = 16
GOAL = 5.0
DRIVE_BYTES = 1 << 30


@dataclass(frozen=True)
class Turn:
    """What one process does. session: None to do without kvfs."""

    model_dir: str
    drive: str
    prompt: list[int]
    warm_up: list[int]
    session: str | None


def measure(directory: Path, model_dir: Path, document: list[int], quick: bool = False) -> list[Figure]:
    """Figures for the beginning of a document, as the rest of it warms up.

    document: ids, PROMPT_TOKENS + WARM_UP_TOKENS of them. Raises RuntimeError if an answer differs.
    """
    num_tokens, num_turns = (1024, 1) if quick else (PROMPT_TOKENS, 3)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        turn = Turn(
            str(model_dir),
            str(Path(folder, "drive.kvfs")),
            document[:num_tokens],
            document[-WARM_UP_TOKENS:],
            None,
        )
        import kvfs

        kvfs.format(turn.drive, DRIVE_BYTES)
        _run(turn, "yesterday")
        results = {"computed": [], "same_session": [], "other_session": []}
        for number in range(num_turns):
            for way, session in (
                ("computed", None),
                ("same_session", "yesterday"),
                ("other_session", f"today-{number}"),
            ):
                results[way].append(_run(turn, session))
    answers = {tuple(result["tokens"]) for way in results.values() for result in way}
    if len(answers) != 1:
        raise RuntimeError(f"answers differ: {sorted(answers)}")
    return _figures(results, num_tokens)


def _figures(results: dict[str, list[dict]], num_tokens: int) -> list[Figure]:
    seconds = {way: statistics.median(result["first_token_s"] for result in of) for way, of in results.items()}
    figures = [Figure("resume.prompt", num_tokens, "tokens")]
    for way in ("same_session", "other_session"):
        ratio = seconds["computed"] / seconds[way]
        name = f"resume.{way}"
        figures.append(
            Figure(f"{name}.first_token", seconds[way] * 1e3, "ms", "computed again", seconds["computed"] * 1e3)
        )
        figures.append(Figure(f"{name}.speedup", ratio, "x", goal=GOAL))
        reused = statistics.median(result["reused_tokens"] for result in results[way])
        figures.append(Figure(f"{name}.reused", reused, "tokens"))
    opened = statistics.median(result["open_s"] for result in results["same_session"])
    figures.append(Figure("resume.open_drive", opened * 1e3, "ms"))
    return figures


def _run(turn: Turn, session: str | None) -> dict:
    """One turn in a process of its own."""
    with open(turn.drive, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kvfs_bench.resume"],
        input=json.dumps({**asdict(turn), "session": session}),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"bench resume: a turn has failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- in the process of a turn ----------------------------------------------------------------------------------


def _answer(model, ids: list[int]) -> tuple[float, list[int]]:
    """(seconds to the first token, tokens) of a greedy answer."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self):
            self.times = []

        def put(self, value):
            self.times.append(time.perf_counter())  # the prompt, then each token

        def end(self):
            pass

    prompt, clock, began = torch.tensor([ids]), Clock(), time.perf_counter()
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        streamer=clock,
    )
    return clock.times[1] - began, result[0, len(ids) :].tolist()


def _turn(turn: Turn) -> dict:
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(turn.model_dir, dtype="float32").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if turn.session is None:
        _answer(model, turn.warm_up)
        seconds, tokens = _answer(model, turn.prompt)
        return {"first_token_s": seconds, "tokens": tokens}

    import kvfs
    from kvfs.engines.transformers import enable

    began = time.perf_counter()
    with kvfs.open(turn.drive) as store:
        open_s = time.perf_counter() - began
        for name in ("warm-up", "warm-up", "warm-up-other"):  # computed, resumed, resumed by groups
            enable(model, store, session=name, tenant="warm-up")
            _answer(model, turn.warm_up)
        for name in ("warm-up", "warm-up-other"):
            store.delete_sequence(name)
        session = enable(model, store, session=turn.session)
        seconds, tokens = _answer(model, turn.prompt)
        reused = session.last.num_tokens
    return {"first_token_s": seconds, "tokens": tokens, "reused_tokens": reused, "open_s": open_s}


if __name__ == "__main__":
    print(json.dumps(_turn(Turn(**json.load(sys.stdin)))))
