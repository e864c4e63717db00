"""Sparse attention as a command of the drive: right numbers, honest pages, a status for bad fields."""

import logging
import threading
from dataclasses import replace

import numpy as np
import pytest

from accel.drive import Drive, DriveConfig
from accel.page_cache import LINE_BYTES
from accel.sketch.expected_error import ErrorTarget
from spdk_glue.derived_layout import groups_per_segment
from spdk_glue.namespace import Namespace
from spdk_glue.status import NvmeStatusError, Status
from spdk_glue.vendor_command import EXACT_IF_CACHED, Derive, KvDtype, SparseMethod, answer_bytes
from tests.unit.accel.conftest import GEOMETRY
from tests.unit.accel.sparse_drive import (
    GROUP_LBAS,
    GROUP_TOKENS,
    HEAD_DIM,
    HEADS,
    LAYER_LBAS,
    PAGE,
    attend,
    blank,
    dense_attention,
    expected,
    layout,
    parts_of,
    random_queries,
    ranges,
    sparse_descriptor,
    store,
)

SPARF = {"sparse_method": SparseMethod.SPARF, "channels": HEAD_DIM, "tokens": 1 << 20}
ACCURACY = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(params=[0, 1 << 30], ids=["on threads", "at once"])
def both_ways(request, monkeypatch):
    """The submitting thread computes, or readers and workers do."""
    monkeypatch.setattr("accel.sparse_job.SPARSE_INLINE_BYTES", request.param)


def is_at_rest(drive):
    return not drive.cache._slots[:, 1].any() and not drive.ftl._state.guards._active


def matches(answer, wanted):
    np.testing.assert_allclose(answer[0], wanted[0], **ACCURACY)
    np.testing.assert_allclose(answer[1], wanted[1], **ACCURACY)


def matches_but_for_rounding(answer, wanted):
    """For a compression: queries and weights are bytes where 2-bit codes are read, see accel.sketch.scan."""
    assert np.linalg.norm(answer[0] - wanted[0]) <= 3e-2 * np.linalg.norm(wanted[0])
    np.testing.assert_allclose(answer[1], wanted[1], atol=2e-2)


def status_of(call) -> int:
    with pytest.raises(NvmeStatusError) as caught:
        call()
    return caught.value.status


@pytest.mark.parametrize("compression", [1, 4, 8, 64])
def test_the_whole_method(drive, namespace, both_ways, compression):
    """Sketches, refined units and dense tokens: the definition's numbers, and pages as promised."""
    stored = store(namespace, 12, [(0, 4), (4, 4), (8, 3)])
    queries = random_queries()
    for layer in (0, 1):
        for _ in range(2):  # cold, then warm
            out, lse, header = attend(
                namespace, sparse_descriptor([stored], queries, layer, compression=compression), queries
            )
            wanted, num_chosen = expected([stored], queries, compression, layer)
            matches_but_for_rounding((out, lse), wanted)
            assert header["chosen_pages"] == num_chosen
            assert header["index_pages"] == HEADS * sum(
                layout(count).index_pages for _, count, *_ in stored.segments
            )
            assert header["dense_pages"] == HEADS * 2 * GROUP_TOKENS * HEAD_DIM * 2 // PAGE
            assert header["pages_from_flash"] + header["pages_from_cache"] == sum(
                int(header[name]) for name in ("index_pages", "chosen_pages", "dense_pages")
            )
            dense_of_sealed = HEADS * 2 * 11 * GROUP_TOKENS * HEAD_DIM * 2 // PAGE
            if compression <= 8:
                read = int(header["index_pages"]) + int(header["chosen_pages"])
                assert read <= dense_of_sealed * 4 / (3 * compression)
    assert header["pages_from_flash"] == 0
    assert is_at_rest(drive)


@pytest.mark.parametrize("options", [{"compression": 8}, {"target_error": 0.3}], ids=str)
def test_exact_if_cached(drive, namespace, both_ways, options):
    """With every page of the tokens in the cache the dense answer; with one missing the sketches'."""
    stored = store(namespace, 12, [(0, 4), (4, 4), (8, 3)])
    queries = random_queries()
    sparse, flagged = (
        sparse_descriptor([stored], queries, 1, flags=flags, **options) for flags in (0, EXACT_IF_CACHED)
    )
    plain = sparse_descriptor([replace(stored, segments=[])], queries, 1, sparse_method=SparseMethod.DENSE)
    for _ in range(2):  # from flash, then with the sketches in the cache
        sketched = attend(namespace, flagged, queries)
        assert sketched[2]["chosen_pages"] > 0
    dense = attend(namespace, plain, queries)
    exact = attend(namespace, flagged, queries)
    num_pages = HEADS * 2 * 12 * GROUP_TOKENS * HEAD_DIM * 2 // PAGE
    for found, wanted in zip(exact[:2], dense[:2], strict=True):
        np.testing.assert_array_equal(found, wanted)
    counted = {name: int(exact[2][name]) for name in ("pages_from_flash", "pages_from_cache", "dense_pages")}
    assert counted == {"pages_from_flash": 0, "pages_from_cache": num_pages, "dense_pages": num_pages}
    assert exact[2]["index_pages"] == exact[2]["chosen_pages"] == 0
    matches(attend(namespace, sparse, queries), sketched)  # not asked to
    last_of_layer = stored.base_lba + 11 * GROUP_LBAS + 2 * LAYER_LBAS - 1
    drive.cache.drop(int(drive.ftl.resolve(np.array([last_of_layer]))[0]), 1)
    matches(attend(namespace, flagged, queries), sketched)
    assert is_at_rest(drive)


def test_exact_if_cached_is_of_this_layer(drive, namespace):
    """Another layer's pages are no reason, nor is a cache of which a command may pin less than it needs."""
    stored = store(namespace, 12, [(0, 4), (4, 4), (8, 3)])
    queries = random_queries()
    attend(namespace, sparse_descriptor([replace(stored, segments=[])], queries, 0, sparse_method=0), queries)
    for layer, is_exact in ((0, True), (1, False)):
        descriptor = sparse_descriptor([stored], queries, layer, flags=EXACT_IF_CACHED, compression=8)
        assert (attend(namespace, descriptor, queries)[2]["index_pages"] == 0) == is_exact
    drive.cache.num_lines = 8
    descriptor = sparse_descriptor([stored], queries, 0, flags=EXACT_IF_CACHED, compression=8)
    assert attend(namespace, descriptor, queries)[2]["index_pages"] > 0
    assert is_at_rest(drive)


def test_batches_with_windows_caps_and_biases(drive, namespace, both_ways):
    """Sealed and unsealed sequences in one command; queries that see parts of segments; soft cap and slopes."""
    sealed = store(namespace, 8, [(0, 4), (5, 3)])
    plain = store(namespace, 3, [], base_lba=2000, seed=1)
    short = store(namespace, 5, [(0, 2)], base_lba=3000, seed=2)
    batch = [sealed, plain, short]
    queries = random_queries(3, 4)
    seen = [(300, 8 * GROUP_TOKENS - 100), (5, 700), (0, 600)]
    slopes = np.linspace(0.001, 0.01, HEADS * 2, dtype=np.float32)
    for options in ({}, {"softcap": 3.0}, {"slopes": slopes}):
        out, lse, _ = attend(
            namespace, sparse_descriptor(batch, queries, seen=seen, compression=4, **options), queries
        )
        matches_but_for_rounding((out, lse), expected(batch, queries, 4, seen=seen, **options)[0])
    # a segment of which less is seen than its sketch takes is not worth it
    _, _, header = attend(
        namespace, sparse_descriptor([short], queries[:1], seen=[(490, 600)], compression=8), queries[:1]
    )
    assert header["index_pages"] == 0 and header["dense_pages"] > 0


def test_target_error(namespace):
    """More is read for a smaller error; where 6 bits do not do, the tokens' own pages give the dense answer."""
    stored = store(namespace, 8, [(0, 4), (4, 4)])
    queries = random_queries()
    dense = exact([stored], queries)
    pages = []
    for target in (0.9, 0.3, 0.2, 0.1, 1e-4):
        out, _, header = attend(namespace, sparse_descriptor([stored], queries, target_error=target), queries)
        assert np.linalg.norm(out - dense[0]) <= target * np.linalg.norm(dense[0]) + 1e-5
        pages.append(int(header["pages_from_flash"]) + int(header["pages_from_cache"]))
    assert pages == sorted(pages) and pages[0] < pages[-1]
    matches((out, out[..., 0]), (dense[0], out[..., 0]))
    assert header["damaged_segments"] == 0


def test_damage_where_the_error_is_too_large(drive, namespace, monkeypatch):
    """Two reasons to read a segment's own pages: its tokens count once."""
    stored = store(namespace, 8, [(0, 4), (4, 4)])
    queries = random_queries()
    choose = iter([np.arange(3), None])  # of the second head all is read
    monkeypatch.setattr(ErrorTarget, "choose", lambda target: next(choose))
    namespace.deallocate([(stored.segments[0][2] + layout(4).refinement_lba(0, 0, 1), 1)])
    out, lse, header = attend(namespace, sparse_descriptor([stored], queries, target_error=0.5), queries)
    dense = exact([stored], queries)
    matches((out[:, :, 2:], lse[:, :, 2:]), (dense[0][:, :, 2:], dense[1][:, :, 2:]))
    assert np.abs(lse - dense[1]).max() < 0.2
    assert header["damaged_segments"] == 1
    assert is_at_rest(drive)


def exact(batch, queries, layer=0):
    starts, stops = ranges(batch, queries.shape[1])
    out, lse = np.zeros(queries.shape), np.zeros(queries.shape[:3])
    for item, each in enumerate(batch):
        for head in range(HEADS):
            rows = slice(2 * head, 2 * head + 2)
            out[item, :, rows], lse[item, :, rows] = dense_attention(
                each.keys[layer, :, head], each.values[layer, :, head], queries[item, :, rows],
                starts[item], stops[item], np.arange(each.num_tokens),
            )  # fmt: skip
    return out, lse


@pytest.mark.parametrize("num_queries", [1, 3])
def test_sparf_of_everything_is_dense(drive, namespace, both_ways, num_queries):
    """r = head_dim and k = all tokens; fewer read fewer pages, and what is left out is not silently nothing."""
    stored = store(namespace, 12, [(0, 8), (8, 3)], derive=Derive.CHANNEL_MAJOR_KEYS)
    other = store(namespace, 2, [], base_lba=4000, seed=3)
    queries = random_queries(2, num_queries)
    dense = exact([stored, other], queries)
    out, lse, header = attend(namespace, sparse_descriptor([stored, other], queries, **SPARF), queries)
    matches((out, lse), dense)
    # of the short segment, all channels would be more pages than its tokens have
    assert header["index_pages"] == HEADS * (HEAD_DIM + 1)
    fewer = {**SPARF, "channels": 8, "tokens": 64}
    out, lse, header = attend(namespace, sparse_descriptor([stored, other], queries, **fewer), queries)
    assert header["index_pages"] < HEADS * 2 * HEAD_DIM
    assert 0 < header["chosen_pages"] < HEADS * 2 * 11 * GROUP_TOKENS * HEAD_DIM * 2 // PAGE
    np.testing.assert_allclose(out[1], dense[0][1], **ACCURACY)
    assert 0.01 < np.linalg.norm(out[0] - dense[0][0]) / np.linalg.norm(dense[0][0]) < 0.9
    assert is_at_rest(drive)


BAD_FIELDS = [
    {"sparse_method": 3},
    {"sparse_method": 0},
    {"reserved": 1},
    {**SPARF, "compression": 0, "flags": EXACT_IF_CACHED},
    {"flags": 8},
    {"compression": 0.5},
    {"compression": 65},
    {"compression": np.nan},
    {"compression": np.inf},
    {"compression": -8},
    {"compression": 0},
    {"target_error": 0.1},
    {"target_error": np.nan},
    {"compression": 0, "target_error": -0.1},
    {"compression": 0, "target_error": 1.5},
    {"compression": 0, "target_error": np.nan},
    {"channels": 1},
    {"tokens": 1},
    {**SPARF, "compression": 8},
    {**SPARF, "compression": 0, "channels": 0},
    {**SPARF, "compression": 0, "channels": HEAD_DIM + 1},
    {**SPARF, "compression": 0, "tokens": 0},
    {"num_segments": 3},
    {"num_segments": 65535},
    {"segment_reserved": 1},
    {"segment_item": 1},
    {"segment_first_group": 1},
    {"segment_first_group": 1 << 31},
    {"segment_num_groups": 0},
    {"segment_num_groups": 5},
    {"segment_num_groups": 1 << 31},
    {"segment_base_lba": 1 << 62},
    {"segment_base_lba": 1 << 20},
]


@pytest.mark.parametrize("changes", BAD_FIELDS, ids=str)
def test_bad_fields(namespace, changes):
    """Each is a status, and the drive goes on."""
    stored = store(namespace, 6, [(0, 2), (2, 2)])
    queries = random_queries()
    bad = sparse_descriptor([stored], queries, **{"compression": 8, **changes})
    assert status_of(lambda: namespace.attend(bad, answer_bytes(*queries.shape))) == Status.INVALID_DESCRIPTOR
    attend(namespace, sparse_descriptor([stored], queries, compression=8), queries)


def test_segments_longer_than_full_ones_are_refused(namespace):
    """Kernels and layouts know no longer ones."""
    full = groups_per_segment(Derive.SKETCH, PAGE, HEAD_DIM, KvDtype.FLOAT16, GROUP_TOKENS)
    stored = store(namespace, full + 1, [(0, full)])
    queries = random_queries()
    bad = sparse_descriptor([stored], queries, compression=8, segment_num_groups=full + 1)
    assert status_of(lambda: namespace.attend(bad, answer_bytes(*queries.shape))) == Status.INVALID_DESCRIPTOR


def test_random_bytes(drive, namespace):
    """Fuzz: a status or an answer, never an internal error; nothing stays pinned."""
    stored = store(namespace, 4, [(0, 2), (2, 1)])
    queries = random_queries()
    good = sparse_descriptor([stored], queries, compression=8)
    random = np.random.default_rng(5)
    allowed = {
        Status.INVALID_DESCRIPTOR,
        Status.DEALLOCATED_BLOCK,
        Status.SGL_LENGTH_INVALID,
        Status.UNRECOVERED_READ_ERROR,
        Status.DATA_TRANSFER_ERROR,
    }
    for _ in range(300):
        data = good.copy()
        for position in random.integers(0, 64 + 32 + 16 + 48, random.integers(1, 4)):
            data[position] = random.integers(0, 256)
        try:
            namespace.attend(data, answer_bytes(*queries.shape))
        except NvmeStatusError as error:
            assert error.status in allowed, str(error)
            if error.status == Status.SGL_LENGTH_INVALID:
                namespace.attention_cancel(namespace._next_ticket)
    assert is_at_rest(drive)


def corrupt(drive, path, lba):
    """Flip a bit of a block on the medium; the cache forgets it."""
    page = int(drive.ftl.resolve(np.array([lba]))[0])
    with path.open("r+b") as file:
        file.seek(drive.ftl.media.layout.data_start + page * 4096 + 77)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 8]))
    drive.cache.clear()


@pytest.mark.parametrize("page", ["index", "last index", "refinement"])
@pytest.mark.parametrize("how", ["flipped", "zero", "never written"])
def test_damage(drive, namespace, both_ways, tmp_path, caplog, page, how):
    """Of one segment's sketch: its tokens from their own pages, counted, told once; all others as before."""
    stored = store(namespace, 12, [(0, 4), (4, 4), (8, 3)])
    queries = random_queries()
    data = sparse_descriptor([stored], queries, compression=1)  # all units are refined
    base, of = stored.segments[1][2], layout(4)
    lba = (
        base
        + {
            "index": of.index_lba(0, 1),
            "last index": of.index_lba(0, 1) + of.index_pages - 1,
            "refinement": of.refinement_lba(0, 1, 3),
        }[page]
    )
    if how == "flipped":
        corrupt(drive, tmp_path / "drive", lba)
    elif how == "never written":
        namespace.deallocate([(lba, 1)])
    elif page == "index":
        blank(namespace, lba)  # no header
    else:
        pytest.skip("any bytes are codes")
    wanted, _ = expected([stored], queries, 1, without=[1])
    with caplog.at_level(logging.WARNING, "accel.damage_notes"):
        for _ in range(2):
            out, lse, header = attend(namespace, data, queries)
            matches((out, lse), wanted)
            assert (header["damaged_segments"], header["first_damaged"]) == (1, 1)
            assert header["dense_pages"] == 5 * HEADS * 2 * GROUP_TOKENS * HEAD_DIM * 2 // PAGE
    assert len([record for record in caplog.records if "damaged" in record.getMessage()]) == 1
    counters = drive.attention_unit.counters
    assert (counters.sparse_commands, counters.damaged_segments, counters.failed) == (2, 2, 0)
    assert is_at_rest(drive)


@pytest.mark.parametrize("how", ["flipped", "zero", "never written"])
def test_damaged_channels(drive, namespace, both_ways, tmp_path, how):
    """As for sketches."""
    stored = store(namespace, 16, [(0, 8), (8, 8)], derive=Derive.CHANNEL_MAJOR_KEYS)
    queries = random_queries()
    lba = stored.segments[1][2] + layout(8, Derive.CHANNEL_MAJOR_KEYS).index_lba(0, 1) + HEAD_DIM
    if how == "flipped":
        corrupt(drive, tmp_path / "drive", lba)
    elif how == "zero":
        blank(namespace, lba)
    else:
        namespace.deallocate([(lba, 1)])
    out, lse, header = attend(namespace, sparse_descriptor([stored], queries, **SPARF), queries)
    matches((out, lse), exact([stored], queries))
    assert (header["damaged_segments"], header["first_damaged"]) == (1, 1)
    assert is_at_rest(drive)


def test_a_dense_page_that_is_lost_fails_the_command(drive, namespace, both_ways):
    """There is nothing to fall back to."""
    stored = store(namespace, 5, [(0, 4)])
    queries = random_queries()
    lba = stored.base_lba + 4 * 64 + 3
    namespace.deallocate([(lba, 1)])
    with pytest.raises(NvmeStatusError) as caught:
        attend(namespace, sparse_descriptor([stored], queries, compression=8), queries)
    assert (caught.value.status, caught.value.lba) == (Status.DEALLOCATED_BLOCK, lba)
    assert is_at_rest(drive)


@pytest.mark.parametrize("num_lines", [1, 4, 31])
@pytest.mark.parametrize("round_bytes", [1, 1 << 17, 64 << 20])
def test_tiny_caches_and_rounds(tmp_path, monkeypatch, num_lines, round_bytes):
    """Pieces of heads, heads one by one, all at once; pages that no span may pin."""
    monkeypatch.setattr("accel.drive.MIN_CACHE_BYTES", 0)
    monkeypatch.setattr("accel.sparse_job.SPARSE_INLINE_BYTES", 0)
    monkeypatch.setattr("accel.sparse_job.ROUND_BYTES", round_bytes)
    Drive.format(tmp_path / "drive", GEOMETRY)
    drive = Drive.open(tmp_path / "drive", DriveConfig(cache_bytes=num_lines * LINE_BYTES, num_workers=2))
    namespace = Namespace(drive.transport)
    stored = store(namespace, 12, [(0, 4), (4, 4), (8, 3)])
    queries = random_queries()
    # what a piece chooses is its own; of everything it is the same
    wanted, _ = expected([stored], queries, 1)
    channels = store(namespace, 4, [(0, 4)], base_lba=3000, derive=Derive.CHANNEL_MAJOR_KEYS)
    for _ in range(2):
        out, lse, header = attend(namespace, sparse_descriptor([stored], queries, compression=1), queries)
        matches((out, lse), wanted)
        assert header["chosen_pages"] == HEADS * 44
        out, lse, _ = attend(namespace, sparse_descriptor([channels], queries, **SPARF), queries)
        matches((out, lse), exact([channels], queries))
    assert is_at_rest(drive)
    drive.close()


def test_from_several_threads(drive, namespace, both_ways):
    """Commands of all kinds share cache, readers and workers, and must not mix; some are cancelled."""
    stored = store(namespace, 12, [(0, 4), (4, 4), (8, 3)])
    failures = []
    every = [random_queries(seed=seed) for seed in range(4)]
    alone = []
    for queries in every:
        answer = attend(namespace, sparse_descriptor([stored], queries, compression=8), queries)[:2]
        matches_but_for_rounding(answer, expected([stored], queries, 8)[0])
        alone.append(answer)

    def work(seed):
        queries = every[seed]
        shape = queries.shape
        data = sparse_descriptor([stored], queries, compression=8)
        for turn in range(6):
            if turn % 2:
                namespace.attention_cancel(namespace.attention_submit(data))
                drive.cache.clear()
            answer = parts_of(namespace.attend(data, answer_bytes(*shape)), shape)
            if not all(np.allclose(*parts, atol=1e-5) for parts in zip(answer, alone[seed], strict=True)):
                failures.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    while drive.attention_unit.counters.commands < 4 * 10:
        pass  # cancelled ones end by themselves
    assert is_at_rest(drive)


def test_a_kernel_that_fails(drive, namespace, both_ways, monkeypatch):
    """An error, and all is given back."""
    stored = store(namespace, 5, [(0, 4)])
    queries = random_queries()
    data = sparse_descriptor([stored], queries, compression=8)

    def fail(*arguments, **options):
        raise RuntimeError("broken")

    for name in ("scan.score_units", "scan.sum_units", "kernels.refined_units"):
        with monkeypatch.context() as patch:
            patch.setattr(f"accel.sketch.{name}", fail)
            assert status_of(lambda: attend(namespace, data, queries)) == Status.INTERNAL_ERROR
        assert is_at_rest(drive)
    attend(namespace, data, queries)


def test_identify_says_which_methods(namespace):
    """A host goes by this alone."""
    assert namespace.attention["sparse_methods"] == 1 << SparseMethod.SPARF | 1 << SparseMethod.SKETCH
