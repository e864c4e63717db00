"""Results as PNG: throughput over batch, context or drives; where the time goes; which numbers matter."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from machine_model.result import CATEGORIES, Result
from machine_model.sensitivity import Sensitivity

MOST_BARS = 15
SWEPT = {
    "batch": ("sequences in a batch", lambda one: one.workload.batch),
    "context": ("tokens of the input", lambda one: one.workload.input_tokens),
    "output": ("tokens of the output", lambda one: one.workload.output_tokens),
    "drives": ("drives", lambda one: one.num_drives),
}


def draw_sweep(found: list[Result], over: str, title: str, path: Path) -> None:
    """Tokens/s of each system, and the time of one token of the last value, stacked."""
    label, value_of = SWEPT[over]
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(3, 2))
    drawing.suptitle(title)
    systems = list(dict.fromkeys(one.system for one in found))
    for system in systems:
        own = [one for one in found if one.system == system and one.fits]
        if own:
            left.plot(
                [value_of(one) for one in own], [one.tokens_per_second for one in own], "o-", label=system
            )
    ticks = sorted({value_of(one) for one in found})
    left.set(
        xscale="log", yscale="log", xlabel=label, ylabel="tokens/s", title="throughput; missing: does not fit"
    )
    left.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    left.minorticks_off()
    left.grid(alpha=0.3)
    if left.lines:
        left.legend(fontsize="small")
    _draw_breakdown(right, [_last_that_fits(found, system) for system in systems], value_of)
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)


def _last_that_fits(found: list[Result], system: str) -> Result | None:
    own = [one for one in found if one.system == system and one.fits]
    return own[-1] if own else None


def _draw_breakdown(axes, found: list[Result | None], value_of) -> None:
    found = [one for one in found if one is not None]
    names = [f"{one.system}\n({value_of(one):,})" for one in found]
    left = [0.0] * len(found)
    for number, category in enumerate(CATEGORIES):
        parts = [one.breakdown.get(category, 0.0) / one.decode_seconds for one in found]
        if any(parts):
            axes.barh(names, parts, left=left, label=category, color=f"C{number}")
            left = [start + part for start, part in zip(left, parts, strict=True)]
    axes.set(xlim=(0, 1), xlabel="share of decode", title="on the critical path, at the largest that fits")
    axes.invert_yaxis()
    if found:
        axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def draw_sensitivity(found: list[Sensitivity], step: float, title: str, path: Path) -> None:
    """A bar to each side of every number that matters."""
    shown = found[:MOST_BARS]
    drawing, axes = pyplot.subplots(figsize=(9, 1.4 + 0.36 * max(1, len(shown))), layout="constrained")
    names = [f"{one.path} (assumed)" if one.assumed else one.path for one in shown]
    for changes, label in (
        ([one.less or 0.0 for one in shown], f"{step:.0%} less of it"),
        ([one.more or 0.0 for one in shown], f"{step:.0%} more of it"),
    ):
        axes.barh(names, [100 * change for change in changes], label=label, alpha=0.85)
    axes.set(xlabel="change of tokens/s, percent", title=title)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)
