"""SparF as published (InstInfer, arXiv:2409.04992): channels of K, then tokens, the mean of V for the rest.

| module | idea |
|---|---|
| `channel_major` | the copy of K by channels: its pages, made and read |
| `selection` | channels, tokens, what stands for the rest |
| `kernels` | approximate scores over channel pages; runs of chosen tokens for the attention workers |

The steps of one (item, KV head), whose rows are its num_rows = num_queries * group_size queries:

1. `choose_channels`: the r channels largest in |q|, per row; all rows' are read
2. `approximate_scores`: over the pages of these channels, of all segments
3. `choose_tokens`: the k tokens of the largest scores, per row; all rows' are read, and alpha is their mass
4. `chosen_runs`: as an AttentionBatch, computed by the attention workers
5. `join_mean`: the mean of V stands for the tokens that are not read
"""


class DamagedChannels(Exception):
    """Channel-major pages that are not what the layout says. segment: of those given; 0 of a lone one."""

    def __init__(self, segment: int, reason: str):
        super().__init__(f"channel-major keys of segment {segment}: {reason}")
        self.segment = segment
        self.reason = reason
