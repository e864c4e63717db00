"""Sparse attention on real text: what it reads, how good it stays, what it finds again, how fast it is.

The shipped model reads held-out source code that has needles in it. Figures are the drive's, of commands with
one query as in decoding; what no drive does (the oracle, mean pages) is simulated, and with `simulated` all.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from kvfs_bench.figures import Figure
from kvfs_bench.sparse_model import Past, next_log_probabilities
from kvfs_bench.sparse_needle import is_found
from kvfs_bench.sparse_quality import (
    COMPRESSION,
    CURVES,
    DENSE_SETTING,
    PUBLISHED,
    QUICK_CURVES,
    Quality,
    Score,
    Setting,
    Text,
    quality,
    score,
    sketch,
    window,
)
from kvfs_bench.sparse_results import Point, Results
from kvfs_bench.sparse_schemes import Dense, Sketches
from kvfs_bench.sparse_statistics import HeadStatistics, mean_of, measure_head
from kvfs_bench.sparse_texts import Scale, Texts

BYTES_GOAL, PERPLEXITY_GOAL, AGREEMENT_GOAL = 1 / 6, 1.01, 0.97
HEADLINE = sketch(COMPRESSION)
NEEDLE_SETTINGS = (DENSE_SETTING, HEADLINE, window(1 / 6))
FULL = Scale()
QUICK = Scale(contexts=(1056,), num_texts=1, num_predicted=32, curve_predicted=32, num_needles=2)
Progress = Callable[[int, int, str], None]


class OutOfTime(Exception):
    """More is to be measured: again with the same folder."""


@dataclass(frozen=True)
class Found:
    """Needles of all texts. depths: positions of those found, as a share of the context."""

    scheme: str
    label: str
    context: int
    found: int
    of: int
    depths: list[float]


def _plan(scale: Scale, curves: list[Setting]) -> list[tuple[Point, Setting]]:
    """All that is to be measured: what was asked first for comes first."""
    found = []
    for kind, settings, num_tokens in (
        ("quality", [HEADLINE], scale.num_predicted),
        ("needles", NEEDLE_SETTINGS, 0),
        (
            "quality",
            [DENSE_SETTING, *(each for each in curves if each.label != HEADLINE.label)],
            scale.curve_predicted,
        ),
    ):
        for context in scale.contexts:
            for text in range(scale.num_texts):
                found += [
                    (Point(kind, context, text, setting.scheme, setting.label, num_tokens), setting)
                    for setting in settings
                ]
    return found


class Bench:
    """Measures points of a plan into results."""

    def __init__(
        self, texts: Texts, results: Results, drives: Path | None, progress: Callable[[int, str], None]
    ):
        """drives: folder for them; None: all is simulated; progress: points that are done, what is under way"""
        self._texts, self._results, self._drives, self._progress = texts, results, drives, progress

    def measure(self, plan: list[tuple[Point, Setting]], deadline: float) -> None:
        """Raises OutOfTime, past the deadline (of time.monotonic), before another point."""
        left = [(point, setting) for point, setting in plan if point not in self._results]
        self._num_done = len(plan) - len(left)
        for (context, number), points in groupby(left, lambda each: (each[0].context, each[0].text)):
            self._check_time(deadline)
            text = self._texts.text(context, number, lambda what: self._progress(self._num_done, what))
            with ExitStack() as stack:
                attending = None
                for point, setting in points:
                    if attending is None:
                        self._say(point, "stored and sealed")
                        attending = stack.enter_context(
                            _attending(self._drives, text.past, self._group_size(context))
                        )
                    self._check_time(deadline)
                    self._say(point, f"{point.kind} with {setting.scheme}, {setting.label}")
                    self._results.add(point, self._found(point, setting, text, attending))
                    self._num_done += 1

    @staticmethod
    def _check_time(deadline: float) -> None:
        if time.monotonic() > deadline:
            raise OutOfTime

    def _say(self, point: Point, what: str) -> None:
        self._progress(self._num_done, f"{point.context} tokens of text {point.text + 1}: {what}")

    def _group_size(self, context: int) -> int:
        config = self._texts.model(context).config
        return config.num_attention_heads // config.num_key_value_heads

    def _found(self, point: Point, setting: Setting, text: Text, attending) -> dict:
        model = self._texts.model(point.context)
        if point.kind == "quality":
            return asdict(score(model, text.first(point.num_tokens), attending(setting)))
        needles, past_attention = self._texts.needles(point.context, point.text), attending(setting)
        found = [each for each in needles if is_found(model, each, text.past, past_attention)]
        return {"of": len(needles), "depths": [each.position / point.context for each in found]}

    def head_statistics(self, context: int) -> HeadStatistics:
        """Of all heads of the first text, as queries behind it see them."""
        text = self._texts.text(context, 0, lambda what: self._progress(self._num_done, what))
        recorder = _Recorder(text.past)
        next_log_probabilities(self._texts.model(context), text.ids[:-1], recorder, text.past.num_tokens)
        return mean_of(recorder.heads)


class _Recorder(Dense):
    """Dense attention that measures the heads it meets."""

    def __init__(self, past: Past):
        super().__init__(past)
        self.heads: list[HeadStatistics] = []

    def attend(self, layer, queries):
        for head in range(queries.shape[1]):
            keys, values = (part.numpy() for part in self.keys_values(layer, head))
            self.heads.append(measure_head(keys, values, queries[:, head].flatten(0, 1).numpy()))
        return super().attend(layer, queries)


@contextmanager
def _attending(drives: Path | None, past: Past, group_size: int) -> Iterator[Callable[[Setting], object]]:
    """A function that gives a setting's PastAttention."""
    sketches = Sketches(past)
    if drives is None:
        yield lambda setting: setting.simulate(past, sketches)
        return
    from kvfs_bench.sparse_drive import OnDrive, stored

    with (
        tempfile.TemporaryDirectory(dir=drives, prefix="kvfs-bench-") as folder,
        stored(Path(folder), [past], group_size) as (store, [sequence]),
    ):

        def attending(setting: Setting):
            if setting.on_drive is None:
                return setting.simulate(past, sketches)
            return OnDrive(store, sequence, past, **setting.on_drive(past))

        yield attending


def curves_of(results: Results) -> list[Quality]:
    """A point for each setting and context."""
    scores: dict[tuple[int, str, str], list[Score]] = {}
    for point, found in results:
        if point.kind == "quality":
            scores.setdefault((point.context, point.scheme, point.label), []).append(Score(**found))
    return [quality(scheme, label, context, each) for (context, scheme, label), each in scores.items()]


def needles_of(results: Results) -> list[Found]:
    every: dict[tuple[int, str, str], list[dict]] = {}
    for point, found in results:
        if point.kind == "needles":
            every.setdefault((point.context, point.scheme, point.label), []).append(found)
    found = []
    for (context, scheme, label), parts in every.items():
        depths = [depth for part in parts for depth in part["depths"]]
        found.append(Found(scheme, label, context, len(depths), sum(part["of"] for part in parts), depths))
    return found


def _of(qualities: list[Quality], context: int, setting: Setting) -> Quality:
    wanted = (context, setting.scheme, setting.label)
    return next(each for each in qualities if (each.context, each.scheme, each.label) == wanted)


def quality_figures(curves: list[Quality]) -> Iterator[Figure]:
    """Of the sketch at COMPRESSION, beside SparF as published."""
    for context in sorted({each.context for each in curves}):
        ours, theirs = (_of(curves, context, setting) for setting in (sketch(COMPRESSION), PUBLISHED))
        for field, unit, goal, is_maximum in (
            ("bytes_share", "of dense page bytes", BYTES_GOAL, True),
            ("bytes_share_worst", "of dense page bytes, worst text", BYTES_GOAL, True),
            ("perplexity_ratio", "over dense", PERPLEXITY_GOAL, True),
            ("perplexity_ratio_worst", "over dense, worst text", PERPLEXITY_GOAL, True),
            ("agreement", "of dense next tokens", AGREEMENT_GOAL, False),
            ("agreement_worst", "of dense next tokens, worst text", AGREEMENT_GOAL, False),
            ("clear_agreement", "of those that are no near ties", None, False),
            ("kl", "nats", None, True),
        ):
            yield Figure(
                f"sparse.{context}.{field}",
                getattr(ours, field),
                unit,
                rival=f"SparF as published, {PUBLISHED.label}",
                rival_value=getattr(theirs, field),
                goal=goal,
                goal_is_maximum=is_maximum,
            )


def needle_figures(needles: list[Found]) -> Iterator[Figure]:
    """Found, of all that were asked for; the goal is what dense attention finds."""
    dense = {each.context: each for each in needles if each.scheme == DENSE_SETTING.scheme}
    for each in needles:
        of_dense = dense[each.context]
        yield Figure(
            f"sparse.{each.context}.needles.{each.scheme}",
            each.found,
            f"found of {each.of}",
            rival="dense",
            rival_value=of_dense.found,
            ratio=each.found / of_dense.found if of_dense.found else None,
            goal=of_dense.found if each.scheme == sketch(COMPRESSION).scheme else None,
        )


def measure(
    directory: Path,
    model_dir: Path,
    document: list[int],
    quick: bool = False,
    simulated: bool = False,
    speed: bool = True,
    resume: Path | None = None,
    minutes: float | None = None,
    progress: Progress = lambda done, of, text: None,
) -> tuple[list[Figure], dict, dict[str, str]]:
    """(figures, raw ones, settings in words). document: ids of held-out text, as many as the Scale wants.

    speed: also tokens/s, unless all is simulated
    resume: a folder that keeps what is measured, and half a GB of pasts; minutes: after these no other point is
    begun, and OutOfTime raised. Raises ValueError for a folder of another run.

    raw: `curves` and `needles`, a dict for each point; `heads`, what the model's heads look like
    """
    scale = QUICK if quick else FULL
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    plan = _plan(scale, QUICK_CURVES if quick else CURVES)
    about = {
        **asdict(scale),
        "simulated": simulated,
        "document": hashlib.sha256(str(document).encode()).hexdigest(),
    }
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvfs-bench-") as temporary:
        folder = Path(temporary) if resume is None else resume
        folder.mkdir(parents=True, exist_ok=True)
        results = Results(folder / "points.jsonl", about)
        texts = Texts(model_dir, document, scale, folder)
        bench = Bench(
            texts, results, None if simulated else directory, lambda done, what: progress(done, len(plan), what)
        )
        bench.measure(plan, deadline)
        heads = bench.head_statistics(scale.contexts[-1])
    raw = {"simulated": simulated, **points(results), "heads": asdict(heads)}
    figures, settings = [*quality_figures(curves_of(results)), *needle_figures(needles_of(results))], {}
    if speed and not simulated:
        from kvfs_bench import sparse_speed

        speeds, settings = sparse_speed.measure(
            directory, heads, quick, lambda text: progress(len(plan), len(plan), text)
        )
        figures += speeds
    return figures, raw, settings


def points(results: Results) -> dict:
    """`curves` and `needles`, as far as they are measured."""
    return {
        "curves": [each.as_dict() for each in curves_of(results)],
        "needles": [asdict(each) for each in needles_of(results)],
    }


_MARKS = {"dense": "k*", "sketch": "o-", "sparf": "s-", "window": "v:", "oracle": "d:", "means": "^:"}
_NAMES = {
    "sketch": "sketch (ours)",
    "sparf": "SparF as published",
    "window": "window",
    "oracle": "oracle, best pages",
    "means": "mean keys and values",
}


def plot(raw: dict, path: Path) -> None:
    """Quality over bytes for every context, into the PNG file `path`. raw: of `measure`. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = sorted({each["context"] for each in raw["curves"]})
    drawing, rows = pyplot.subplots(
        2, len(contexts), figsize=(4 * len(contexts) + 1, 7), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, context in zip(rows.T, contexts, strict=True):
        column[0].set_title(f"{context:,} tokens")
        for scheme, name in _NAMES.items():
            points = sorted(
                (each["bytes_share"], each["kl"], 1 - each["agreement"])
                for each in raw["curves"]
                if each["context"] == context and each["scheme"] == scheme
            )
            for axes, place in zip(column, (1, 2), strict=True):
                axes.plot([p[0] for p in points], [p[place] for p in points], _MARKS[scheme], label=name)
        for axes in column:
            axes.axvline(BYTES_GOAL, color="gray", linewidth=0.7)
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3)
        column[1].set_xlabel("page bytes read over dense page bytes")
    rows[0, 0].set_ylabel("KL divergence from dense, nats")
    rows[1, 0].set_ylabel("next tokens that differ, share")
    rows[0, 0].legend(loc="lower left")
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)
