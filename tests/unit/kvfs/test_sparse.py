"""Store.attend by compression, target error and SparF: the host's part of it, on every kind of store."""

import asyncio

import numpy as np
import pytest

import kvfs
import kvfs.aio
from kvfs.errors import DriveLacks, InvalidArgument
from tests.unit.kvfs.conftest import add_model, random_kv, random_queries

EVERYTHING = {"sparf": (64, 1 << 20)}


def sealed(store, name="sealed", num_tokens=2700, derive=("sketch", "channel_major_keys")):
    """A sequence whose complete groups have derived data; the rest is in the tail."""
    sequence = store.create_sequence(add_model(store), name)
    for layer in (0, 1):
        sequence.append(layer, *random_kv(num_tokens, seed=layer))
    for each in derive:
        assert sequence.seal(each) == num_tokens // 256 * 256
    return sequence


def error_of(found, wanted):
    return np.linalg.norm(found[0] - wanted[0]) / np.linalg.norm(wanted[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 1500, "sink_tokens": 4},
        {"softcap": 5.0},
        {"alibi_slopes": np.linspace(0.001, 0.01, 8)},
        {"sinks": np.linspace(-1, 1, 8)},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_what_is_left_out_is_little(store, options):
    """Batches of sealed, unsealed and short sequences, several queries, all ways of scoring."""
    first = sealed(store)
    second = store.create_sequence(first.model, "plain")
    for layer in (0, 1):
        second.append(layer, *random_kv(900, seed=5))
    queries = random_queries(2, 3)
    dense = store.attend(1, queries, [first, second], **options)
    everything = store.attend(1, queries, [first, second], **options, **EVERYTHING)
    np.testing.assert_allclose(everything[0], dense[0], atol=1e-5)
    np.testing.assert_allclose(everything[1], dense[1], atol=1e-5)
    refined = store.attend(1, queries, [first, second], **options, compression=1, exact_if_cached=False)
    assert 0 < error_of(refined, dense) < 0.06
    np.testing.assert_allclose(refined[0][1], dense[0][1], atol=1e-5)
    met = store.attend(1, queries, [first, second], **options, target_error=0.02, exact_if_cached=False)
    assert error_of(met, dense) <= 0.02


def test_left_padding_and_ranges(store):
    """A query that sees a part of the segments, one that sees none of them, one that sees nothing."""
    sequence = sealed(store)
    ranges = np.array([[[300, 2600], [2570, 2690], [40, 40]]])
    queries = random_queries(1, 3)
    dense = store.attend(0, queries, sequence, token_ranges=ranges)
    for options in (EVERYTHING, {"target_error": 1e-4}, {"target_error": 1e-4, "exact_if_cached": False}):
        found = store.attend(0, queries, sequence, token_ranges=ranges, **options)
        np.testing.assert_allclose(found[0], dense[0], atol=1e-5)
        np.testing.assert_allclose(found[1], dense[1], atol=1e-5)


def test_pages_are_counted(store):
    """Of a call and of the drive: at compression 8 a sixth of the sealed tokens' pages."""
    sequence = sealed(store, num_tokens=2048 + 100)
    queries = random_queries()
    dense, counts = kvfs.PageCounts(), kvfs.PageCounts()
    store.attend(0, queries, sequence, counts=dense)
    assert (dense.commands, dense.num_pages, dense.index_pages) == (1, 2 * 2 * 64, 0)
    before = store.counters()["attention"]
    store.attend(0, queries, sequence, counts=counts, compression=8, exact_if_cached=False)
    assert (
        counts.num_pages == counts.index_pages + counts.chosen_pages + counts.dense_pages <= dense.num_pages / 6
    )
    assert counts.dense_pages == counts.damaged_segments == 0 < counts.chosen_pages
    after = store.counters()["attention"]
    assert after["sparse_commands"] - before["sparse_commands"] == 1
    assert after["index_pages"] - before["index_pages"] == counts.index_pages
    store.attend(0, queries, sequence, counts=counts)
    assert counts.commands == 2 and counts.num_pages > dense.num_pages


def test_without_derived_data_all_is_read(store):
    """Nothing is sealed, or it was given up: the dense answer, bit for bit."""
    sequence = sealed(store, derive=("sketch",))
    queries = random_queries()
    dense = store.attend(0, queries, sequence)
    assert error_of(store.attend(0, queries, sequence, sparf=(1, 1)), dense) == 0
    sketched = store.attend(0, queries, sequence, compression=8, exact_if_cached=False)
    assert error_of(sketched, dense) > 0
    store.drop_derived()
    assert error_of(store.attend(0, queries, sequence, compression=8), dense) == 0


@pytest.mark.parametrize("options", [{"compression": 8}, {"target_error": 0.2}], ids=str)
def test_exact_if_cached(store, options):
    """Once the tokens' pages are in the cache: the dense answer, and its pages counted; or not if told so."""
    sequence = sealed(store, num_tokens=2048 + 100)
    queries = random_queries()
    sketched = store.attend(0, queries, sequence, **options)
    dense = store.attend(0, queries, sequence)
    counts = kvfs.PageCounts()
    for found, wanted in zip(store.attend(0, queries, sequence, **options, counts=counts), dense, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert (counts.pages_from_flash, counts.pages_from_cache) == (0, 2 * 2 * 64)
    assert (counts.index_pages, counts.chosen_pages, counts.dense_pages) == (0, 0, 2 * 2 * 64)
    again = store.attend(0, queries, sequence, **options, exact_if_cached=False)
    for found, wanted in zip(again, sketched, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert error_of(again, dense) > 0


def test_an_older_drive_is_not_asked_to_be_exact(store):
    """It would refuse the flag."""
    sequence = sealed(store, num_tokens=2048, derive=("sketch",))
    queries = random_queries()
    dense = store.attend(0, queries, sequence)
    store._attention._takes_exact = False
    assert error_of(store.attend(0, queries, sequence, compression=8), dense) > 0


def test_a_damaged_segment_is_given_up(store, caplog):
    """The drive reads its tokens' own pages and says so; the host does not name it again."""
    sequence = sealed(store, derive=("sketch",))
    segments = list(sequence.derived_segments("sketch"))
    store._namespace.write(segments[1].base_lba, np.zeros(4096, np.uint8))
    counts = kvfs.PageCounts()
    with caplog.at_level("WARNING"):
        store.attend(0, random_queries(), sequence, compression=8, counts=counts)
    assert counts.damaged_segments == 1
    assert [record for record in caplog.records if "damaged" in record.getMessage()]
    caplog.clear()
    assert segments[1] not in sequence.derived_segments("sketch")
    again = kvfs.PageCounts()
    store.attend(0, random_queries(), sequence, compression=8, counts=again)
    assert again.damaged_segments == 0


BAD = [
    ({"compression": 0.9}, "compression is a number from 1 to 64"),
    ({"compression": 64.1}, "compression is a number from 1 to 64"),
    ({"compression": float("nan")}, "compression is a number from 1 to 64"),
    ({"compression": "8x"}, "compression is a number from 1 to 64"),
    ({"compression": True}, "compression is a number from 1 to 64"),
    ({"target_error": 0}, "target_error is a number above 0 and up to 1"),
    ({"target_error": 1e-60}, "target_error is a number above 0 and up to 1"),
    ({"target_error": 1.1}, "target_error is a number above 0 and up to 1"),
    ({"sparf": 8}, "sparf is .channels, tokens."),
    ({"sparf": (8,)}, "sparf is .channels, tokens."),
    ({"sparf": (65, 8)}, "channels are a whole number from 1 to 64"),
    ({"sparf": (0, 8)}, "channels are a whole number from 1 to 64"),
    ({"sparf": (8, 0)}, "tokens are a whole number from 1 to 4294967295"),
    ({"sparf": (8, 1.5)}, "tokens are a whole number from 1 to 4294967295"),
    ({"compression": 8, "target_error": 0.1}, "exclude each other"),
    ({"exact_if_cached": 1}, "exact_if_cached is True or False, not 1"),
    ({"counts": {}}, "counts is a kvfs.PageCounts"),
]


@pytest.mark.parametrize(("options", "says"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments(store, options, says):
    """One line that names the argument and its range."""
    sequence = sealed(store, num_tokens=10, derive=())
    with pytest.raises(InvalidArgument, match=says) as caught:
        store.attend(0, random_queries(), sequence, **options)
    assert "\n" not in str(caught.value)


def test_a_drive_that_cannot(store):
    """One line, before anything is asked of it."""
    sequence = sealed(store, num_tokens=10, derive=())
    store._attention.sparse_methods = 0
    with pytest.raises(DriveLacks, match="the drive cannot do attention by sketch"):
        store.attend(0, random_queries(), sequence, compression=8)
    store.attend(0, random_queries(), sequence)


def test_awaited(path):
    """The same arguments."""

    async def work():
        async with kvfs.aio.open(path, cache_bytes="8MiB", num_workers=2) as store:
            counts = kvfs.PageCounts()
            plain = sealed(store.store, num_tokens=2048)
            sequence = await store.sequence("sealed")
            found = await store.attend(0, random_queries(), sequence, compression=8, counts=counts)
            return error_of(found, store.store.attend(0, random_queries(), plain, compression=8)), counts

    error, counts = asyncio.run(work())
    assert error == 0 and counts.index_pages > 0
