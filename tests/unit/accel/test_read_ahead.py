"""Index pages that are read ahead: answers stay what they are, whatever happens meanwhile, and pages count."""

import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from accel.drive import Drive, DriveConfig
from accel.page_cache import LINE_BYTES
from ftl.errors import MediaIoError
from spdk_glue.namespace import Namespace
from tests.unit.accel.conftest import GEOMETRY
from tests.unit.accel.sparse_drive import (
    HEADS,
    LAYER_LBAS,
    attend,
    blank,
    layout,
    random_queries,
    sparse_descriptor,
    store,
)

LAYERS = 6
SEGMENTS = [(0, 4), (4, 4), (8, 3)]
INDEX_PAGES = HEADS * (2 * 9 + 7)  # of a layer


@pytest.fixture(autouse=True)
def many_layers(monkeypatch):
    """And commands that are not small."""
    monkeypatch.setattr("tests.unit.accel.sparse_drive.LAYERS", LAYERS)
    monkeypatch.setattr("tests.unit.accel.sparse_drive.GROUP_LBAS", LAYERS * LAYER_LBAS)
    monkeypatch.setattr("accel.sparse_job.SPARSE_INLINE_BYTES", 0)


@pytest.fixture
def stored(namespace):
    return store(namespace, 12, SEGMENTS)


QUERIES = random_queries()


def ask(namespace, stored, layer, **options):
    return attend(
        namespace, sparse_descriptor([stored], QUERIES, layer, **{"compression": 8, **options}), QUERIES
    )


def ahead_of(drive):
    return drive.attention_unit._read_ahead


def wait_until(condition):
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(1e-3)


def wait_until_idle(drive):
    wait_until(lambda: not ahead_of(drive)._num_steps)


def read_ahead(drive) -> int:
    return drive.attention_unit.counters.pages_read_ahead


def is_at_rest(drive):
    wait_until_idle(drive)
    return not drive.cache._slots[:, 1].any() and not drive.ftl._state.guards._active


def same(answer, wanted):
    for found, part in zip(answer[:2], wanted[:2], strict=True):
        np.testing.assert_array_equal(found, part)


def cold(drive, namespace, stored, layer, **options):
    """A command that nothing was read ahead for."""
    ahead = drive.attention_unit._engine.read_ahead
    object.__setattr__(drive.attention_unit._engine, "read_ahead", None)
    drive.cache.clear()
    answer = ask(namespace, stored, layer, **options)
    object.__setattr__(drive.attention_unit._engine, "read_ahead", ahead)
    drive.cache.clear()
    return answer


class Gate:
    """Reads of some blocks wait until it is opened."""

    def __init__(self, drive, lbas, monkeypatch):
        self._pages = drive.ftl.resolve(np.asarray(lbas))
        self._read = drive.ftl.media.read
        self.was_reached, self._is_open = threading.Event(), threading.Event()
        self.num_pages = 0  # read of these
        self.failure = None
        monkeypatch.setattr(drive.ftl.media, "read", self._wait)

    def _wait(self, pages, addresses):
        held = np.isin(pages, self._pages)
        if held.any():
            self.was_reached.set()
            assert self._is_open.wait(30)
            self.num_pages += int(held.sum())
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
        return self._read(pages, addresses)

    def open(self):
        self._is_open.set()


def index_lbas(stored, layer):
    found = []
    for _, count, base, _ in stored.segments:
        of = replace(layout(count), num_layers=LAYERS)
        found += range(base + of.index_lba(layer, 0), base + of.index_lba(layer, HEADS))
    return np.array(found)


@pytest.mark.parametrize("options", [{}, {"compression": 0, "target_error": 0.3}], ids=str)
def test_layer_after_layer(drive, namespace, stored, options):
    """From the third layer on index pages are there: the same bits, and every page of flash counted once."""
    wanted = [cold(drive, namespace, stored, layer, **options) for layer in range(LAYERS)]
    before = drive.ftl.media.counters.pages_read
    already = drive.attention_unit.counters.pages_from_flash
    for layer in range(LAYERS):
        answer = ask(namespace, stored, layer, **options)
        same(answer, wanted[layer])
        header = answer[2]
        assert header["index_pages"] == INDEX_PAGES
        total = sum(int(header[name]) for name in ("index_pages", "chosen_pages", "dense_pages"))
        from_flash = total - (INDEX_PAGES if layer >= 2 else 0)
        assert (header["pages_from_flash"], header["pages_from_cache"]) == (from_flash, total - from_flash)
        wait_until_idle(drive)
    assert read_ahead(drive) == (LAYERS - 2) * INDEX_PAGES
    from_flash = drive.attention_unit.counters.pages_from_flash - already
    assert drive.ftl.media.counters.pages_read - before == from_flash + read_ahead(drive)
    # the next token goes the same way, so its first layer tells what follows
    drive.cache.clear()
    ask(namespace, stored, 0, **options)
    wait_until_idle(drive)
    assert read_ahead(drive) == (LAYERS - 1) * INDEX_PAGES
    assert is_at_rest(drive)


def test_nothing_where_the_cache_keeps_some(drive, namespace, stored):
    """What is kept from token to token would make room for what is read ahead."""
    for _ in range(2):
        for layer in range(LAYERS):
            ask(namespace, stored, layer)
            wait_until_idle(drive)
    already = read_ahead(drive)
    pages = drive.ftl.resolve(index_lbas(stored, 3))
    for page in pages[: INDEX_PAGES // 2].tolist():
        drive.cache.drop(page, 1)
    for layer in (1, 2):
        ask(namespace, stored, layer)
        wait_until_idle(drive)
    assert (already, read_ahead(drive)) == ((LAYERS - 2) * INDEX_PAGES,) * 2
    for page in pages.tolist():
        drive.cache.drop(page, 1)
    ask(namespace, stored, 1)
    ask(namespace, stored, 2)
    wait_until_idle(drive)
    assert read_ahead(drive) == (LAYERS - 1) * INDEX_PAGES


def test_every_second_layer(drive, namespace, stored):
    """Of a model with windows between: as far as from the layer before. None beyond the last one."""
    for layer in (0, 2, 4):
        ask(namespace, stored, layer)
        wait_until_idle(drive)
    assert read_ahead(drive) == INDEX_PAGES
    assert is_at_rest(drive)


def test_a_guess_that_is_wrong(drive, namespace, stored):
    """Backwards, again, another sequence: nothing, or pages that nobody asks for; never another answer."""
    other = store(namespace, 4, [(0, 4)], base_lba=3500, seed=3)
    for each, layer in (
        (stored, 3),
        (stored, 2),
        (stored, 2),
        (other, 0),
        (stored, 4),
        (other, 4),
        (stored, 1),
    ):
        wanted = cold(drive, namespace, each, layer)
        same(ask(namespace, each, layer), wanted)
        wait_until_idle(drive)
    assert is_at_rest(drive)


def test_what_is_being_read_is_waited_for(drive, namespace, stored, monkeypatch):
    """A command that comes meanwhile neither reads those pages again nor computes before they are there."""
    wanted = cold(drive, namespace, stored, 2)
    gate = Gate(drive, index_lbas(stored, 2), monkeypatch)
    for layer in (0, 1):
        ask(namespace, stored, layer)
    assert gate.was_reached.wait(30)
    answers = []
    command = threading.Thread(target=lambda: answers.append(ask(namespace, stored, 2)))
    command.start()
    wait_until(lambda: any(window.waiting for window in ahead_of(drive)._reading))
    assert not answers
    gate.open()
    command.join(30)
    same(answers[0], wanted)
    assert gate.num_pages == INDEX_PAGES
    # the command has counted them as its own
    wait_until_idle(drive)
    assert answers[0][2]["pages_from_flash"] > INDEX_PAGES and read_ahead(drive) == INDEX_PAGES  # of layer 3
    assert is_at_rest(drive)


def test_what_is_awaited_and_fails(drive, namespace, stored, monkeypatch):
    """The command reads it itself."""
    wanted = cold(drive, namespace, stored, 2)
    gate = Gate(drive, index_lbas(stored, 2), monkeypatch)
    gate.failure = MediaIoError(5, "drive", 0)
    for layer in (0, 1):
        ask(namespace, stored, layer)
    assert gate.was_reached.wait(30)
    answers = []
    command = threading.Thread(target=lambda: answers.append(ask(namespace, stored, 2)))
    command.start()
    wait_until(lambda: any(window.waiting for window in ahead_of(drive)._reading))
    gate.open()
    command.join(30)
    same(answers[0], wanted)
    assert gate.num_pages == 2 * INDEX_PAGES
    assert is_at_rest(drive)


@pytest.mark.parametrize("when", ["before", "after"])
def test_damage(drive, namespace, stored, when, caplog):
    """Of a page that is read ahead, or was: as without, told by the command that needs it."""
    lba = int(index_lbas(stored, 2)[0])
    if when == "before":
        namespace.deallocate([(lba, 1)])
    with caplog.at_level(logging.WARNING):
        for layer in (0, 1):
            assert ask(namespace, stored, layer)[2]["damaged_segments"] == 0
            wait_until_idle(drive)
        if when == "after":
            assert read_ahead(drive) == INDEX_PAGES
            blank(namespace, lba)
        assert not caplog.records
        answer = ask(namespace, stored, 2)
    assert answer[2]["damaged_segments"] == 1
    same(answer, cold(drive, namespace, stored, 2))
    assert is_at_rest(drive)


def test_a_page_that_does_not_hold_its_checksum(drive, namespace, stored, tmp_path, caplog):
    """It is not served from the cache."""
    lba = int(index_lbas(stored, 2)[0])
    page = int(drive.ftl.resolve(np.array([lba]))[0])
    with (tmp_path / "drive").open("r+b") as file:
        file.seek(drive.ftl.media.layout.data_start + page * 4096 + 77)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 8]))
    for layer in (0, 1):
        ask(namespace, stored, layer)
        wait_until_idle(drive)
    assert read_ahead(drive) == 0
    assert ask(namespace, stored, 2)[2]["damaged_segments"] == 1
    assert is_at_rest(drive)


def test_sealed_anew(drive, namespace, stored):
    """Other sketches at the same place, in pages that were erased and written again: these are used."""
    for layer in (0, 1):
        ask(namespace, stored, layer)
        wait_until_idle(drive)
    assert read_ahead(drive) == INDEX_PAGES
    other = stored
    for seed in range(1, 12):  # round and round, so that superblocks are erased
        namespace.deallocate([(0, drive.ftl.num_lbas)])
        other = store(namespace, 12, SEGMENTS, seed=seed)
    assert drive.ftl.counters.superblocks_erased > 0
    answer = ask(namespace, other, 2)
    same(answer, cold(drive, namespace, other, 2))
    assert is_at_rest(drive)


@pytest.mark.parametrize("num_lines", [1, 4, 31, 128])
def test_small_caches(tmp_path, monkeypatch, num_lines):
    """What has no room is not read ahead, and nobody waits for it."""
    monkeypatch.setattr("accel.drive.MIN_CACHE_BYTES", 0)
    Drive.format(tmp_path / "drive", GEOMETRY)
    drive = Drive.open(tmp_path / "drive", DriveConfig(cache_bytes=num_lines * LINE_BYTES, num_workers=2))
    namespace = Namespace(drive.transport)
    stored = store(namespace, 12, SEGMENTS)
    wanted = [cold(drive, namespace, stored, layer) for layer in range(LAYERS)]
    for _ in range(2):
        for layer in range(LAYERS):
            same(ask(namespace, stored, layer), wanted[layer])
            wait_until_idle(drive)
    assert read_ahead(drive) <= 2 * LAYERS * min(INDEX_PAGES, num_lines * LINE_BYTES // 4096 // 5)
    assert read_ahead(drive) > 0 or num_lines < 128
    assert is_at_rest(drive)
    drive.close()


def test_no_room_at_once(drive, namespace, stored):
    """Pins of others are not waited for, nor is anything of theirs taken."""
    for layer in (0, 1):
        ask(namespace, stored, layer)
        wait_until_idle(drive)
    already = read_ahead(drive)
    pages = np.arange(drive.cache.num_lines) * drive.cache.line_pages
    drive.cache.clear()
    drive.cache.acquire(pages)
    ahead_of(drive).read(object(), 3, [index_lbas(stored, 3)])
    wait_until_idle(drive)
    drive.cache.release(pages)
    assert read_ahead(drive) == already
    assert is_at_rest(drive)


def test_from_several_threads(drive, namespace, stored):
    """Sequences that are decoded at once, some commands cancelled, the cache cleared under way."""
    each = [stored, store(namespace, 4, [(0, 4)], base_lba=3500, seed=3)]
    wanted = [[cold(drive, namespace, one, layer) for layer in range(LAYERS)] for one in each]
    failures = []

    def decode(number):
        for turn in range(6):
            for layer in range(LAYERS):
                if (turn + layer) % 5 == 4:
                    data = sparse_descriptor([each[number]], QUERIES, layer, compression=8)
                    namespace.attention_cancel(namespace.attention_submit(data))
                    drive.cache.clear()
                out, *_ = ask(namespace, each[number], layer)
                if not np.allclose(out, wanted[number][layer][0], atol=1e-5):
                    failures.append((number, turn, layer))

    threads = [threading.Thread(target=decode, args=(number % 2,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    num_cancelled = 4 * sum((turn + layer) % 5 == 4 for turn in range(6) for layer in range(LAYERS))
    num_commands = 2 * LAYERS + 4 * 6 * LAYERS + num_cancelled
    wait_until(lambda: drive.attention_unit.counters.commands >= num_commands)  # cancelled ones, too
    assert is_at_rest(drive)


def test_closing_meanwhile(tmp_path, monkeypatch):
    """A drive waits for the window that is being read."""
    Drive.format(tmp_path / "drive", GEOMETRY)
    drive = Drive.open(tmp_path / "drive", DriveConfig(cache_bytes=8 << 20, num_workers=2))
    namespace = Namespace(drive.transport)
    stored = store(namespace, 12, SEGMENTS)
    monkeypatch.setattr("accel.sketch_job.SPARSE_WINDOW_BYTES", 4096)  # many windows
    gate = Gate(drive, index_lbas(stored, 2)[:9], monkeypatch)  # a reader is left to others
    for layer in (0, 1):
        ask(namespace, stored, layer)
    assert gate.was_reached.wait(30)
    closing = threading.Thread(target=drive.close)
    closing.start()
    wait_until(lambda: ahead_of(drive)._is_closed)
    assert closing.is_alive()
    gate.open()
    closing.join(30)
    assert not closing.is_alive()
    assert gate.num_pages == 9
    assert ahead_of(drive)._num_steps == 0


def test_a_drive_that_does_the_same_each_time_does_not(tmp_path):
    """Simulations count its operations."""
    Drive.format(tmp_path / "drive", GEOMETRY)
    drive = Drive.open(tmp_path / "drive", DriveConfig(cache_bytes=8 << 20, num_command_threads=0))
    namespace = Namespace(drive.transport)
    stored = store(namespace, 12, SEGMENTS)
    for layer in range(LAYERS):
        ask(namespace, stored, layer)
    assert ahead_of(drive) is None and read_ahead(drive) == 0
    drive.close()
