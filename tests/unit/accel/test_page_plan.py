"""Which pages an attention reads."""

import numpy as np
import pytest

from accel.page_plan import plan_units

GROUP_TOKENS, PER_PAGE, PER_HEAD, HEADS, LAYER_OFFSET = 8, 4, 2, 2, 100
GROUP_PAGES = 1000


def plan(starts, stops, first_extents, first_groups, extents):
    bases, counts = (np.array(column, np.int64) for column in zip(*extents, strict=True))
    return plan_units(
        np.array(starts, np.int64),
        np.array(stops, np.int64),
        np.array(first_extents, np.int64),
        np.array(first_groups, np.int64),
        bases,
        counts,
        group_pages=GROUP_PAGES,
        layer_offset=LAYER_OFFSET,
        num_kv_heads=HEADS,
        pages_per_head=PER_HEAD,
        tokens_per_page=PER_PAGE,
        group_tokens=GROUP_TOKENS,
        max_unit_pages=2 * PER_HEAD * 3,  # three groups
    )


def expected(start, stop, first_group, bases):
    """Of one item, by KV head: {first token of a page: (LBA of K, of V, tokens)}; bases: of its groups."""
    found = {head: {} for head in range(HEADS)}
    for head in range(HEADS):
        for token in range(start - start % PER_PAGE, stop, PER_PAGE):
            group, row = divmod(token, GROUP_TOKENS)
            keys = bases[group - first_group] + LAYER_OFFSET + 2 * head * PER_HEAD + row // PER_PAGE
            found[head][token] = (keys, keys + PER_HEAD, min(PER_PAGE, stop - token))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_pages_of_scattered_groups(seed):
    """Groups of sequences that grow together lie in many extents: each page comes from its own, once."""
    random = np.random.default_rng(seed)
    extents, items, wanted = [], [], []
    for _ in range(3):
        counts = [*random.integers(0, 4, 6).tolist(), 1]  # empty extents are allowed
        bases = (GROUP_PAGES * random.permutation(1000)[:7]).tolist()
        first_group = int(random.integers(3))
        items.append((len(extents), first_group))
        extents += zip(bases, counts, strict=True)
        groups = [
            base + i * GROUP_PAGES for base, count in zip(bases, counts, strict=True) for i in range(count)
        ]
        first, last = first_group * GROUP_TOKENS, (first_group + len(groups)) * GROUP_TOKENS
        start, stop = sorted(random.choice(np.arange(first, last + 1), 2, replace=False).tolist())
        wanted.append((start, stop, expected(start, stop, first_group, groups)))
    found = plan([w[0] for w in wanted], [w[1] for w in wanted], *zip(*items, strict=True), extents)
    pages = [{head: {} for head in range(HEADS)} for _ in wanted]
    for unit in range(found.num_units):
        assert 0 < found.unit_first_page[unit + 1] - found.unit_first_page[unit] <= PER_HEAD * 3
        for page in range(found.unit_first_page[unit], found.unit_first_page[unit + 1]):
            of_head = pages[found.unit_item[unit]][found.unit_kv_head[unit]]
            token = found.page_first_token[page]
            assert token not in of_head
            of_head[token] = (*found.lbas[:, page], found.page_num_tokens[page])
    assert pages == [w[2] for w in wanted]
