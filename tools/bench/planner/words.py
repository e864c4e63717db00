"""The plan in words and rows of text, for people."""

from collections.abc import Iterator

from kvfs.sizes import format_size
from kvfs_bench.planner.planning import Compression, Plan
from kvfs_bench.planner.rates import INLINE_BYTES
from kvfs_bench.planner.verification import Verification

GB = 1e9
MIB = 1 << 20
Row = list[str]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def bandwidth(bytes_per_second: float) -> str:
    return f"{bytes_per_second / GB:,.2f} GB/s"


def measured_rows(plan: Plan) -> list[Row]:
    """What was measured of the machine, for the drives that were chosen."""
    rates, drives = plan.rates, plan.drive_rates
    kernels = 1 / drives.kernel if drives.kernel else 0.0
    rows = [
        ["link, host to drive and back", bandwidth(rates.link)],
        ["drive's media, as attention reads", bandwidth(drives.media)],
        ["drive's media, single pages", bandwidth(drives.media_random)],
        ["reading memory, all CPUs", bandwidth(rates.memory)],
        ["attention kernel, one thread", bandwidth(kernels)],
        ["command beside its bytes, cached", milliseconds(drives.cached_command)],
        ["command beside its bytes, from flash", milliseconds(drives.cold_command)],
        ["append, a token of a layer and sequence", milliseconds(drives.append)],
        ["spill, more than that", milliseconds(drives.spill)],
    ]
    if drives.sketch is not None:
        for where, costs in (
            ("from flash", drives.sketch.cold),
            ("cached", drives.sketch.kept),
        ):
            rows += [
                [f"sketches {where}: {what}, one thread", bandwidth(1 / price)]
                for what, price in (("index pages", costs.index_kernel), ("refinements", costs.refined_kernel))
                if price
            ]
            rows += [
                [f"sketches {where}: command beside its bytes", milliseconds(costs.command)],
                [
                    f"sketches {where}: more, a MiB of refinements",
                    milliseconds(MIB * costs.refined_command),
                ],
            ]
    if rates.model.seconds is not None:
        rows.append([f"model: {rates.model.how}", milliseconds(rates.model.seconds)])
    if rates.model.projection_flops:
        rows.append(["K and V of many tokens from X", f"{rates.model.projection_flops / GB:,.0f} GFLOP/s"])
    return rows


def step_rows(plan: Plan) -> list[Row]:
    """The terms of a dense step and of the chosen compression's, each alone, and what overlaps."""
    steps = [plan.step] + [one.step for one in [plan.chosen_compression] if one is not None]
    is_windowed = plan.request.layer_bytes / plan.chosen.num_drives > INLINE_BYTES
    beside = "beside the kernels" if is_windowed else "before the kernels"

    def row(term: str, name: str, what: str) -> Row:
        return [term, *(milliseconds(getattr(step, name)) for step in steps), what]

    rows = [
        ["from flash", *(format_size(step.flash_bytes) for step in steps), ""],
        row("media", "media", beside),
        row("kernels", "kernel", f"over {format_size(plan.request.kv_bytes)} of K and V"),
        row("host's tail", "tail", "beside the drive" if is_windowed else "after the drive"),
        row("commands", "commands", "Python, threads handing over, the link; alone"),
        row("appends", "appends", "alone"),
        row("spills", "spills", f"one in {plan.writeback_tokens} steps, as a share"),
        row("attention, with what overlaps", "attention", ""),
    ]
    if plan.rates.model.seconds is not None:
        rows.append(row("model", "model", "before and after each layer's attention; alone"))
    rows.append(["step", *(milliseconds(step.total) for step in steps), ""])
    rows.append(["limit", *(step.limit for step in steps), ""])
    return rows


def step_columns(plan: Plan) -> list[str]:
    compressed = [] if plan.compression is None else [f"compression {plan.compression}"]
    return ["term", "dense", *compressed, ""]


def explanation(plan: Plan) -> Iterator[str]:
    """Why it was chosen, a sentence each."""
    request, step, x_cache = plan.request, plan.step, plan.x_cache
    if request.fits:
        yield (
            f"The context fits in memory: {format_size(request.kv_bytes)} of K and V, room for"
            f" {format_size(request.cache_bytes)}. Plain attention in memory needs none of this; the drive"
            " keeps it over restarts."
        )
    else:
        yield (
            f"The context does not fit in memory: {format_size(request.kv_bytes)} of K and V, room for"
            f" {format_size(request.cache_bytes)}; a dense step reads {format_size(step.flash_bytes)} from"
            " flash."
        )
    ratio = plan.link.offload / plan.link.attention
    yield (
        f"Over the link: {format_size(plan.link.attention)} a step with attention on the drive, offloading"
        f" {format_size(plan.link.offload)}, {ratio:,.0f} times as much."
    )
    yield _drives_and_workers(plan)
    yield f"Writeback: {_writeback(plan)}"
    yield f"Compression: {_compression(plan)}"
    where = "host memory" if request.x_in_host_memory else "the drive"
    yield (
        f"X-cache: alpha {x_cache.share:.2f} (the formula's {x_cache.formula:.2f}, rho {x_cache.rho:.2g}, X on"
        f" {where}): {x_cache.why}."
    )


def _drives_and_workers(plan: Plan) -> str:
    chosen = plan.chosen
    others = "; ".join(
        f"{one.num_drives} with {one.num_workers}: {one.tokens_per_second:,.2f}"
        for one in plan.candidates
        if one is not chosen
    )
    text = (
        f"Drives and workers: {chosen.num_drives} drive(s) with {chosen.num_workers} worker(s) each,"
        f" {chosen.tokens_per_second:,.2f} tokens/s"
    )
    return f"{text}; {others}." if others else f"{text}."


def _writeback(plan: Plan) -> str:
    pages = f"a page holds {plan.writeback[0].tokens}"
    costs = ", ".join(f"{one.tokens}: {milliseconds(one.seconds)}" for one in plan.writeback)
    return f"{plan.writeback_tokens} tokens a spill ({pages}). Tails and spills of a step, by tokens: {costs}."


def _compression(plan: Plan) -> str:
    chosen = plan.chosen_compression
    if chosen is None:
        if plan.request.fits:
            return "none; nothing is read from flash."
        return "none; nothing whose quality has been measured is faster here."
    return (
        f"{chosen.compression}, {chosen.share:.3f} of the dense page bytes, {chosen.tokens_per_second:,.2f}"
        f" tokens/s instead of {plan.chosen.tokens_per_second:,.2f}. It changes answers: {_quality(chosen)} on"
        f" {chosen.quality.num_texts} stretches of text, 8k to 32k, of the shipped model; try it on yours. Its"
        f" sketches take {format_size(_sketch_bytes(plan))} more flash."
    )


def _sketch_bytes(plan: Plan) -> int:
    request = plan.request
    of_token = next(one for one in plan.storage if one.dtype == request.shape.geometry.dtype).sketch_bytes
    return round(request.batch * request.context * of_token)


def _quality(one: Compression) -> str:
    if one.quality is None:
        return "not measured"
    (low, high), (least, most) = one.quality.agreement, one.quality.perplexity
    if one.quality.num_texts == 1:
        return f"{low:.1%} of next tokens as dense, perplexity x{least:.3f}"
    return f"{low:.1%} to {high:.1%} of next tokens as dense, perplexity x{least:.3f} to x{most:.3f}"


def compression_rows(plan: Plan) -> list[Row]:
    return [
        [
            f"{one.compression}" + (" (chosen)" if one.compression == plan.compression else ""),
            f"{one.share:.3f}",
            format_size(one.step.flash_bytes),
            f"{one.tokens_per_second:,.2f}",
            _quality(one),
        ]
        for one in plan.compressions
    ]


def storage_rows(plan: Plan) -> list[Row]:
    """Of the whole context, all sequences."""
    request = plan.request
    num_tokens = request.batch * request.context
    return [
        [
            one.dtype + (" (planned)" if one.dtype == request.shape.geometry.dtype else ""),
            *(
                format_size(round(num_tokens * size))
                for size in (one.token_bytes, one.sketch_bytes, one.channel_bytes)
            ),
            "none, fits in memory" if one.fits else milliseconds(one.media_seconds),
        ]
        for one in plan.storage
    ]


def verification_rows(found: Verification) -> list[Row]:
    seconds = (found.predicted_seconds, found.beside_seconds, found.measured_seconds)
    flash, cached = format_size(found.predicted_flash_bytes), format_size(found.predicted_cached_bytes)
    return [
        ["step", *map(milliseconds, seconds)],
        ["tokens/s", *(f"{found.batch / one:,.2f}" for one in seconds)],
        ["from flash", flash, flash, format_size(found.measured_flash_bytes)],
        ["from the drives' caches", cached, cached, format_size(found.measured_cached_bytes)],
        ["error of tokens/s", f"{found.error:+.1%}", f"{found.error_beside:+.1%}", ""],
    ]


def verification_title(found: Verification) -> str:
    what = "the model" if found.with_model else "attention alone, of random K and V"
    how = "dense" if found.compression is None else f"compression {found.compression}"
    return f"run: {what}, {how}, {found.num_drives} drive(s), {found.num_workers} worker(s) each"
