"""SparF as published: channels of K of all tokens, then the token-major pages of the tokens that score highest.

A round has two stages. The first reads, of each segment and KV head, the pages of the channels that the head's
queries chose, and scores all tokens. Then k tokens are chosen for each row of an (item, KV head), and the
second stage is attention over the rows of chosen tokens, page by page. The mean of V stands for all others.
"""

from dataclasses import replace
from functools import cached_property, partial

import numpy as np

from accel.attention_job import DenseStage
from accel.attention_work import AttentionWork
from accel.merge import merge_states, merge_units
from accel.page_job import Engine, Stage
from accel.page_plan import PagePlan, plan_tokens, runs
from accel.sparf import DamagedChannels
from accel.sparf.channel_major import mean_of_values, pages_per_channel
from accel.sparf.kernels import approximate_scores, bend_scores
from accel.sparf.selection import choose_channels, choose_tokens, join_mean
from accel.sparse_job import SPARSE_WINDOW_BYTES, SparseJob
from accel.sparse_plan import SparsePlan
from accel.workers import UnitRange
from spdk_glue import dma
from spdk_glue.derived_layout import DerivedLayout

Channels = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]  # by item and KV head: see choose_channels


class ChannelStage(Stage):
    """Approximate scores of all tokens. A stage unit is a segment of one KV head: [segment][head] of a round.

    scores: float32 [num_heads, num_rows, tokens of all segments]; means: float32 [num_units, head_dim], of V
    """

    def __init__(self, plan: SparsePlan, heads: range, work: AttentionWork, channels: Channels, engine: Engine):
        self.plan, self.heads = plan, heads
        self._work, self._channels = work, channels
        own = getattr(engine.worker, "approximate_scores", None)
        self._approximate_scores = partial(own, counts=engine.counts) if own else approximate_scores
        first_lba = plan.lbas(work.layer, heads, DerivedLayout.index_lba)
        pages, counts = [], []
        for segment, layout in enumerate(plan.layouts):
            per_channel = pages_per_channel(layout)
            for number, head in enumerate(heads):
                chosen, _ = channels[int(plan.item[segment]), head]
                of_channels = runs(chosen * per_channel, np.full(len(chosen), per_channel))
                pages.append(first_lba[segment, number] + np.append(of_channels, layout.index_pages - 1))
                counts.append(len(pages[-1]))
        super().__init__(
            np.concatenate(pages)[None],
            np.concatenate([[0], np.cumsum(counts)]),
            damaged=np.zeros(len(pages), bool),
            window_bytes=SPARSE_WINDOW_BYTES,
        )
        self.first_column = np.concatenate([[0], np.cumsum(plan.num_tokens)])
        num_rows = work.tables.query_shape[1] * work.tables.group_size
        self.scores = np.empty((len(heads), num_rows, int(self.first_column[-1])), np.float32)
        self.means = np.zeros((len(pages), work.tables.head_dim), np.float32)
        self.reasons: dict[int, str] = {}

    def compute(self, units: UnitRange) -> None:
        tables, plan = self._work.tables, self.plan
        group = tables.group_size
        for unit in units:
            segment, number = divmod(unit, len(self.heads))
            head, item = self.heads[number], int(plan.item[segment])
            layout = plan.layouts[segment]
            _, weights = self._channels[item, head]
            scores = self.scores[number, :, self.first_column[segment] : self.first_column[segment + 1]]
            addresses = self.addresses[0, self.unit_first_page[unit] : self.unit_first_page[unit + 1]]
            by_channel = addresses[:-1].reshape(weights.shape[1], -1)
            self._approximate_scores(
                by_channel, layout.num_tokens, layout.page_size, layout.dtype, weights, scores
            )
            # rows are [query][member of the group]
            start, stop = (np.repeat(seen[item], group) for seen in (tables.visible_start, tables.visible_stop))
            bias = {}
            if len(tables.alibi_slopes):
                slopes = tables.alibi_slopes[head * group : (head + 1) * group]
                bias["slopes"] = np.tile(slopes, tables.query_shape[1])
                bias["position"] = np.repeat(tables.query_position[item], group)
            bend_scores(scores, int(plan.first_token[segment]), start, stop, tables.softcap, **bias)
            try:
                page = dma.view(int(addresses[-1]), layout.page_size)
                self.means[unit] = mean_of_values(page, layout, unit)
            except DamagedChannels as damage:
                self.reasons[unit] = damage.reason
                self.damaged[unit] = True


class ChosenTokens(DenseStage):
    """Attention over some rows of a plan's pages.

    rows: (page int64 [num_runs], ascending, first row, stop row: int32), runs of rows within pages
    """

    def __init__(self, engine: Engine, work: AttentionWork, plan: PagePlan, rows):
        super().__init__(engine, work, plan)
        self._page, first_row, stop_row = rows
        self._addresses = np.empty((2, len(self._page)), np.uint64)
        self._batch = replace(
            self._batch,
            key_pages=self._addresses[0],
            value_pages=self._addresses[1],
            page_first_token=plan.page_first_token[self._page],
            page_num_tokens=stop_row,
            page_first_row=first_row,
            unit_first_page=np.searchsorted(self._page, plan.unit_first_page),
        )

    def addressed(self, first_column: int, stop_column: int) -> None:
        first, stop = np.searchsorted(self._page, (first_column, stop_column))
        self._addresses[:, first:stop] = self.addresses[:, self._page[first:stop]]

    def _page_of(self, place: int) -> int:
        return int(self._page[place])


class SparfJob(SparseJob):
    """SparseMethod.SPARF."""

    def _segment_bytes(self) -> np.ndarray:
        tables = self.work.tables
        # a score, and what choosing takes beside it
        return self.work.sparse.num_tokens * (tables.query_shape[1] * tables.group_size * 16)

    @cached_property
    def _channels(self) -> Channels:
        tables = self.work.tables
        found = {}
        for item in np.unique(self.work.sparse.item).tolist():
            for head in range(tables.num_kv_heads):
                group = slice(head * tables.group_size, (head + 1) * tables.group_size)
                queries = self.work.queries[item, :, group].reshape(-1, tables.head_dim)
                found[item, head] = choose_channels(queries, tables.sparse.channels, tables.scale)
        return found

    def _begin(self, plan: SparsePlan, heads: range) -> ChannelStage | None:
        plan = self._mapped(plan, heads)
        if not len(plan):
            return None
        return self._start(ChannelStage(plan, heads, self.work, self._channels, self._engine))

    def _choose(self, stage: ChannelStage) -> tuple | None:
        self._wait(stage)
        self._count(stage, index_pages=stage.num_pages)
        plan, heads = stage.plan, stage.heads
        damaged = stage.damaged.reshape(len(plan), -1).any(axis=1)
        if damaged.any():
            why = next(iter(stage.reasons.values()), "page checksum")
            self._note_damage(plan.of(np.flatnonzero(damaged)), heads, why)
        chosen, alpha = self._tokens_to_read(stage, damaged)
        tokens = self._chosen_rows(plan.of(np.flatnonzero(~damaged)), heads, chosen)
        return None if tokens is None else (stage, damaged, self._start(tokens), alpha)

    def _complete(self, chosen: tuple) -> None:
        _, _, tokens, _ = chosen
        self._wait(tokens)
        self._count(tokens, chosen_pages=tokens.num_pages)
        self._join(*chosen)

    def _tokens_to_read(self, stage: ChannelStage, damaged: np.ndarray):
        """({(item, head): bool by token of the sequence}, {(item, head): alpha})"""
        plan, k = stage.plan, self.work.tables.sparse.tokens
        chosen, alpha = {}, {}
        for item in np.unique(plan.item[~damaged]).tolist():
            segments = np.flatnonzero((plan.item == item) & ~damaged)
            columns = runs(stage.first_column[segments], plan.num_tokens[segments])
            position = runs(plan.first_token[segments], plan.num_tokens[segments])
            for number, head in enumerate(stage.heads):
                best, alpha[item, head] = choose_tokens(stage.scores[number][:, columns], k)
                chosen[item, head] = np.zeros(int(position[-1]) + 1, bool)
                chosen[item, head][position[best]] = True
        return chosen, alpha

    def _chosen_rows(self, plan: SparsePlan, heads: range, chosen) -> ChosenTokens | None:
        """Attention over the chosen tokens of segments; None if there are none."""
        if not len(plan):
            return None
        tables = self.work.tables
        max_pages = self._engine.scattered_span_pages()
        pages = plan_tokens(tables, plan.item, plan.token_start, plan.token_stop, max_pages)
        num_rows = tables.tokens_per_page
        unit_pages = np.diff(pages.unit_first_page)
        rows = np.arange(num_rows) < pages.page_num_tokens[:, None]
        for unit in range(pages.num_units):
            key = int(pages.unit_item[unit]), int(pages.unit_kv_head[unit])
            part = slice(pages.unit_first_page[unit], pages.unit_first_page[unit + 1])
            if key not in chosen:
                rows[part] = False
                continue
            position = pages.page_first_token[part, None] + np.arange(num_rows)
            last = len(chosen[key]) - 1
            rows[part] &= chosen[key][np.minimum(position, last)] & (position <= last)
        kept = np.flatnonzero(rows.any(axis=1))
        if not len(kept):
            return None
        unit = np.repeat(np.arange(pages.num_units), unit_pages)[kept]
        units = np.unique(unit)
        plan_of_kept = PagePlan(
            lbas=pages.lbas[:, kept],
            page_first_token=pages.page_first_token[kept],
            page_num_tokens=pages.page_num_tokens[kept],
            unit_first_page=np.append(np.searchsorted(unit, units), len(kept)),
            unit_item=pages.unit_item[units],
            unit_kv_head=pages.unit_kv_head[units],
        )
        edges = np.diff(np.pad(rows[kept].astype(np.int8), ((0, 0), (1, 1))), axis=1)
        page, first_row = np.nonzero(edges == 1)
        _, stop_row = np.nonzero(edges == -1)
        runs_of_rows = page, first_row.astype(np.int32), stop_row.astype(np.int32)
        return ChosenTokens(self._engine, self.work, plan_of_kept, runs_of_rows)

    def _join(self, stage: ChannelStage, damaged: np.ndarray, tokens: ChosenTokens, alpha) -> None:
        """Add attention over chosen tokens, with the mean of V for all others."""
        plan, tables = stage.plan, self.work.tables
        group, head_dim = tables.group_size, tables.head_dim
        item, kv_head = tokens.plan.unit_item, tokens.plan.unit_kv_head
        out, lse = merge_units(tokens.out, tokens.lse, item, kv_head, len(tables.items), tables.num_kv_heads)
        means = stage.means.reshape(len(plan), len(stage.heads), head_dim)
        for key in alpha:
            number, heads = key[1] - stage.heads.start, slice(key[1] * group, (key[1] + 1) * group)
            segments = np.flatnonzero((plan.item == key[0]) & ~damaged)
            mean = np.average(means[segments, number], axis=0, weights=plan.num_tokens[segments])
            rows = out[key[0], :, heads].reshape(-1, head_dim), lse[key[0], :, heads].reshape(-1)
            joined, joined_lse = join_mean(*rows, alpha[key], mean)
            out[key[0], :, heads] = joined.reshape(-1, group, head_dim)
            lse[key[0], :, heads] = joined_lse.reshape(-1, group)
        self.out, self.lse = merge_states(self.out, self.lse, out, lse)
