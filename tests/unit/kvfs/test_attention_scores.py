"""Windows, soft caps, linear biases and sinks of Store.attend, over flash and tail together."""

import numpy as np
import pytest

from kvfs.errors import InvalidArgument
from tests.unit.kvfs.conftest import GROUP_SIZE, HEAD_DIM, add_model, random_kv, random_queries

NUM_TOKENS = 300  # a group on flash and a tail
NUM_HEADS = 8


@pytest.fixture
def sequence(store):
    sequence = store.create_sequence(add_model(store, "float32"), "a")
    sequence.append(0, *random_kv(NUM_TOKENS))
    return sequence


def textbook(
    queries, stops, *, starts=None, hidden=None, softcap=None, slopes=None, positions=None, sinks=None
):
    """Attention of queries [num_queries, NUM_HEADS, HEAD_DIM] in float64, mask and scores written down."""
    keys, values = (array.astype(np.float64) for array in random_kv(NUM_TOKENS))
    place = np.arange(NUM_TOKENS)
    out, lse = np.zeros(queries.shape), np.zeros(queries.shape[:2])
    for query, stop in enumerate(stops):
        seen = place < stop
        if starts is not None:
            seen &= place >= starts[query]
        if hidden is not None:
            seen &= ~hidden[query]
        for head in range(NUM_HEADS):
            scores = keys[:, head // GROUP_SIZE] @ queries[query, head].astype(np.float64) * HEAD_DIM**-0.5
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            if slopes is not None:
                origin = stop - 1 if positions is None else positions[query]
                scores = scores - slopes[head] * (origin - place)
            weights = np.where(seen, np.exp(scores), 0)
            total = weights.sum() + (np.exp(sinks[head]) if sinks is not None else 0)
            out[query, head] = weights @ values[:, head // GROUP_SIZE] / total
            lse[query, head] = np.log(total)
    return out, lse


SLOPES = 2.0 ** -np.arange(1, NUM_HEADS + 1)
SINKS = np.linspace(-2, 6, NUM_HEADS)
CASES = {
    "softcap": {"softcap": 1.5},
    "wide cap": {"softcap": 50.0},
    "bias": {"alibi_slopes": SLOPES},
    "bias from elsewhere": {"alibi_slopes": SLOPES, "query_positions": np.array([[400, 410, 420, 430]])},
    "sinks": {"sinks": SINKS},
    "all": {"softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_scores(store, sequence, options):
    queries = random_queries(1, 4)
    out, lse = store.attend(0, queries, sequence, **options)
    stops = NUM_TOKENS - np.arange(4)[::-1]
    known = {"alibi_slopes": "slopes", "query_positions": "positions"}
    wanted = {known.get(name, name): value for name, value in options.items()}
    if "positions" in wanted:
        wanted["positions"] = wanted["positions"][0]
    expected, expected_lse = textbook(queries[0], stops, **wanted)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)
    np.testing.assert_allclose(lse[0], expected_lse, atol=1e-5)


@pytest.mark.parametrize(("window", "sink_tokens"), [(40, 0), (40, 4), (100, 30), (1, 1), (299, 5), (1000, 10)])
def test_windows(store, sequence, window, sink_tokens):
    queries = random_queries(1, 4)
    stops = NUM_TOKENS - np.arange(4)[::-1]
    place = np.arange(NUM_TOKENS)
    hidden = np.array([(place < stop - window) & (place >= sink_tokens) for stop in stops])
    out, lse = store.attend(0, queries, sequence, window=window, sink_tokens=sink_tokens, alibi_slopes=SLOPES)
    expected, expected_lse = textbook(queries[0], stops, hidden=hidden, slopes=SLOPES)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)
    np.testing.assert_allclose(lse[0], expected_lse, atol=1e-5)


def test_a_window_reads_no_more_than_it_sees(store, sequence):
    sequence.flush()  # nothing is on its way to flash any more
    before = store.counters()["attention"]
    store.attend(0, random_queries(), sequence, window=60, sink_tokens=4)
    after = store.counters()["attention"]
    read = sum(after[name] - before[name] for name in ("pages_from_flash", "pages_from_cache"))
    assert read == 2 * 2 * (1 + 1)  # K and V of two heads: the last page of the group, and the first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is a whole number from 1 on, not 0"),
        ({"window": 2.5}, "window is a whole number"),
        ({"window": 5, "sink_tokens": -1}, "sink_tokens is a whole number from 0 on"),
        ({"softcap": -1}, "softcap is above zero"),
        ({"softcap": "much"}, "softcap is a number, not 'much'"),
        ({"softcap": np.inf}, "softcap is a finite number"),
        ({"scale": np.nan}, "scale is a finite number"),
        ({"alibi_slopes": SLOPES[:3]}, "alibi_slopes are 8 finite numbers, one for each query head"),
        ({"alibi_slopes": [np.nan] * 8}, "alibi_slopes are 8 finite numbers"),
        ({"alibi_slopes": SLOPES, "query_positions": [[1, 2]]}, "query_positions is integers of shape"),
        ({"alibi_slopes": SLOPES, "query_positions": [[-5]]}, "query_positions lie within 0"),
        ({"query_positions": [[5]]}, "query_positions are of use with alibi_slopes only"),
        ({"sinks": [1, 2]}, "sinks are 8 finite numbers"),
    ],
)
def test_bad_options(store, sequence, options, message):
    with pytest.raises(InvalidArgument, match=message):
        store.attend(0, random_queries(), sequence, **options)
