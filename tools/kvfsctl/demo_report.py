"""The demo's outcome: figures in the benches' schema, and a table with units."""

from dataclasses import dataclass

from rich.table import Table

from kvfs_bench.figures import Figure
from kvfsctl.core_speed import core_line

# Less than this does not show in tokens/s.
CPUS_ELSEWHERE_WORTH_A_NOTE = 0.2


@dataclass(frozen=True)
class Outcome:
    """Results of the phases (see demo_phases), and what they were asked."""

    dtype: str
    context_tokens: int
    new_tokens: int
    more_tokens: int
    plain: dict
    reference: dict  # what the tokens are compared with: plain, or in-memory K/V rounded to the storage dtype
    kvfs: dict
    continued: dict
    offloading: dict

    @property
    def identical(self):
        """Tokens of the first process that equal the reference, up to the first difference."""
        return common_prefix(self.kvfs["tokens"], self.reference["tokens"])

    @property
    def identical_after_reopening(self):
        """The same for those generated after the drive was opened again."""
        return common_prefix(self.continued["tokens"], self.reference["tokens"][self.new_tokens :])

    @property
    def identical_to_plain(self):
        """All of them against unmodified Transformers (for float32 storage: the reference itself)."""
        return common_prefix(self.kvfs["tokens"] + self.continued["tokens"], self.plain["tokens"])

    @property
    def all_identical(self):
        """Whether the demo succeeded."""
        return self.identical == self.new_tokens and self.identical_after_reopening == self.more_tokens

    @property
    def link_bytes_ratio(self):
        """How many times fewer bytes cross the link than with offloading."""
        return self.offloading["link_bytes_per_token"] / self.kvfs["link_bytes_per_token"]

    @property
    def link_bytes_goal(self):
        """0.5 * S / (g + 1), for S tokens of context and g query heads per KV head.

        Offloading reads 2 * S * num_kv_heads * head_dim elements per layer; near-data attention moves the
        queries and the outputs, 2 * g * num_kv_heads * head_dim, and the new K/V. The half is what commands and
        pages may cost.
        """
        group = self.kvfs["num_query_heads"] // self.kvfs["num_kv_heads"]
        return 0.5 * self.context_tokens / (group + 1)

    @property
    def comparison(self):
        """What "identical" means here, for people."""
        if self.dtype == "float32":
            return "plain Transformers (SDPA, in-memory K/V, float32)"
        return f"Transformers' SDPA over in-memory K/V in {self.dtype}, as they are stored"


def common_prefix(tokens, reference):
    """Number of leading tokens that are equal."""
    for position, (token, expected) in enumerate(zip(tokens, reference, strict=False)):
        if token != expected:
            return position
    return min(len(tokens), len(reference))


# -- for machines ----------------------------------------------------------------------------------------------


def figures(outcome):
    """All figures of one run."""
    kvfs, continued, plain, offloading = outcome.kvfs, outcome.continued, outcome.plain, outcome.offloading
    flash = continued["flash"]
    return [
        Figure(
            "demo.tokens_identical",
            outcome.identical,
            "tokens",
            rival=outcome.comparison,
            rival_value=outcome.new_tokens,
            goal=outcome.new_tokens,
        ),
        Figure(
            "demo.tokens_identical_after_reopening",
            outcome.identical_after_reopening,
            "tokens",
            rival=outcome.comparison,
            rival_value=outcome.more_tokens,
            goal=outcome.more_tokens,
        ),
        Figure(
            "demo.tokens_identical_to_plain", outcome.identical_to_plain, "tokens", rival="plain Transformers"
        ),
        Figure(
            "demo.loss",
            outcome.reference["loss"],
            "nats per token",
            rival="K/V that are not rounded",
            rival_value=plain["loss"],
            ratio=outcome.reference["loss"] / plain["loss"],
        ),
        _speed("demo.tokens_per_second", kvfs, "in-memory SDPA", plain),
        _speed("demo.tokens_per_second_vs_offloading", kvfs, "offloading", offloading),
        _speed("demo.tokens_per_second_after_reopening", continued, "in-memory SDPA", plain),
        Figure(
            "demo.link_bytes_per_token",
            kvfs["link_bytes_per_token"],
            "bytes",
            rival="offloading",
            rival_value=offloading["link_bytes_per_token"],
            ratio=outcome.link_bytes_ratio,
        ),
        Figure("demo.link_bytes_ratio", outcome.link_bytes_ratio, "times fewer", goal=outcome.link_bytes_goal),
        Figure("demo.commands_per_token", kvfs["commands_per_token"], "commands"),
        Figure("demo.flash_bytes_read", kvfs["flash"]["bytes_read"] + flash["bytes_read"], "bytes"),
        Figure("demo.flash_bytes_written", kvfs["flash"]["bytes_written"] + flash["bytes_written"], "bytes"),
        Figure("demo.waf", kvfs["flash"]["waf"], "pages programmed per page written"),
        Figure(
            "demo.prefill_seconds",
            kvfs["prefill_s"],
            "s",
            rival="in-memory SDPA",
            rival_value=plain["prefill_s"],
        ),
        Figure(
            "demo.seconds_to_first_token_after_reopening", continued["open_s"] + continued["prefill_s"], "s"
        ),
        *(
            Figure(f"demo.peak_host_memory.{name}", result["peak_rss_bytes"], "bytes")
            for name, result in _by_phase(outcome).items()
        ),
        *(
            Figure(f"demo.cpus_elsewhere.{name}", result["cpus_elsewhere"], "CPUs")
            for name, result in _by_phase(outcome).items()
        ),
    ]


def _speed(name, kvfs, rival, other):
    value, rival_value = kvfs["tokens_per_second"], other["tokens_per_second"]
    ratio = value / rival_value if value and rival_value else None
    return Figure(name, value, "tokens/s", rival=rival, rival_value=rival_value, ratio=ratio)


def _by_phase(outcome):
    return {
        "kvfs": outcome.kvfs,
        "kvfs_after_reopening": outcome.continued,
        "in_memory": outcome.plain,
        "offloading": outcome.offloading,
    }


# -- for people ------------------------------------------------------------------------------------------------


def table(outcome):
    """A rich table: one row per property, one column per way to keep K/V."""
    columns = (outcome.kvfs, outcome.continued, outcome.plain, outcome.offloading)
    rows = Table(
        title=f"K/V in {outcome.dtype}, {outcome.context_tokens:,} tokens of context", title_style="bold"
    )
    rows.add_column("", no_wrap=True)
    for name in ("kvfs", "kvfs, reopened", "in-memory SDPA", "offloading"):
        rows.add_column(name, justify="right")
    for name, cell in _ROWS.items():
        rows.add_row(name, *(cell(column, outcome) for column in columns))
    return rows


def summary(outcome):
    """The outcome in a few lines below the table."""
    reached = "reached" if outcome.link_bytes_ratio >= outcome.link_bytes_goal else "missed"
    total = outcome.new_tokens + outcome.more_tokens
    yield f"Tokens identical to {outcome.comparison}: {_identical(outcome.identical, outcome.new_tokens)}"
    after = _identical(outcome.identical_after_reopening, outcome.more_tokens)
    stored = outcome.continued["tokens_from_flash"]
    yield f"  after reopening in a new process, with {stored:,} tokens from flash: {after}"
    if outcome.dtype != "float32":
        yield f"  to SDPA over K/V that are not rounded: {_identical(outcome.identical_to_plain, total)}"
        exact, stored = outcome.plain["loss"], outcome.reference["loss"]
        yield (
            f"Text quality: the document's next tokens cost {stored:.4f} nats each over K/V in "
            f"{outcome.dtype}, {exact:.4f} over K/V that are not rounded ({100 * (stored / exact - 1):+.2f}%)"
        )
    yield (
        f"Link bytes per token: {outcome.link_bytes_ratio:,.0f} times fewer than offloading "
        f"(goal 0.5 S / (g + 1) = {outcome.link_bytes_goal:,.0f}: {reached})"
    )
    for name, column in (("", outcome.kvfs), (" after reopening", outcome.continued)):
        if (line := core_line(column["attention"])) is not None:
            yield line.replace("cores", f"cores{name}", 1)
    for name, column in _by_phase(outcome).items():
        if column["cpus_elsewhere"] > CPUS_ELSEWHERE_WORTH_A_NOTE:
            yield (
                f"Note: other processes kept {column['cpus_elsewhere']:.1f} CPUs busy during {name}: "
                "its tokens/s would be higher on a quiet machine"
            )
    yield "Each column is a process of its own, warmed up (kernels compiled) before anything was timed."


def _identical(count, total):
    return f"yes, {count} of {total}" if count == total else f"NO, the first {count} of {total}"


def _number(value, spec):
    return "" if value is None else format(value, spec)


def _bytes(count):
    """123 B; 12.3 KiB; 1.2 GiB; nothing for None."""
    if count is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024


def _prefilled(column, outcome):
    return "1" if "tokens_from_flash" in column else f"{outcome.context_tokens:,}"


_ROWS = {
    "prompt computed": _prefilled,
    "open drive, s": lambda column, _: _number(column.get("open_s"), ".2f"),
    "first token, s": lambda column, _: _number(column["prefill_s"], ".2f"),
    "decode, tokens/s": lambda column, _: _number(column["tokens_per_second"], ".1f"),
    "link, bytes/token": lambda column, _: _bytes(column.get("link_bytes_per_token")),
    "flash read": lambda column, _: _bytes(column.get("flash", {}).get("bytes_read")),
    "flash written": lambda column, _: _bytes(column.get("flash", {}).get("bytes_written")),
    "WAF": lambda column, _: _number(column.get("flash", {}).get("waf"), ".3f"),
    "peak host memory": lambda column, _: _bytes(column["peak_rss_bytes"]),
}
