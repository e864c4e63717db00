"""Tokens/s and link bytes per token against context length, as a PNG."""

from kvfs_bench.figures import Figure

# New tokens per point: enough for a mean, few enough for the context to stay what the axis says.
NEW_TOKENS_PER_POINT = 32

WAYS = {"kvfs_generate": "kvfs", "in_memory": "in-memory SDPA", "offloading": "offloading"}
_STYLE = {"kvfs": "o-", "in-memory SDPA": "s--", "offloading": "^:"}


def contexts_around(context_tokens):
    """Context lengths to measure: an eighth of the demo's to twice it."""
    return [max(64, int(context_tokens * factor)) for factor in (0.125, 0.25, 0.5, 1, 2)]


def plot(points, path):
    """Draw `points`, {(way, context_tokens): result of its phase}, into the PNG file `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (speed, link) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, field, label in (
        (speed, "tokens_per_second", "decode, tokens/s"),
        (link, "link_bytes_per_token", "link bytes per generated token"),
    ):
        for way, name in WAYS.items():
            line = sorted(
                (context, result[field])
                for (w, context), result in points.items()
                if w == way and result.get(field)
            )
            if line:
                axes.plot(*zip(*line, strict=True), _STYLE[name], label=name)
        axes.set(xscale="log", xlabel="context, tokens", ylabel=label)
        contexts = sorted({context for _, context in points})
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    speed.set_ylim(bottom=0)
    link.set_yscale("log")
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)


def point_figures(points):
    """The same points in the benches' schema."""
    named = []
    for (way, context), result in sorted(points.items()):
        name = f"demo.context_{context}.{way.removesuffix('_generate')}"
        named.append(Figure(f"{name}.tokens_per_second", result["tokens_per_second"], "tokens/s"))
        if result.get("link_bytes_per_token") is not None:
            named.append(Figure(f"{name}.link_bytes_per_token", result["link_bytes_per_token"], "bytes"))
    return named
