"""Flash that fails: blocks that cannot be programmed or erased, bits that flip, a die that dies, power cuts.

The oracle is the content itself: one thread, so what was written last is what must be read.
"""

from contextlib import suppress

import numpy as np
import pytest

from ftl import recovery
from ftl.errors import CorruptPage
from ftl.geometry import Geometry
from ftl.media_nand import NandMedia, NandModel, PowerCut
from ftl.recovery import recover
from ftl.scrub import scrub
from ftl.superblocks import State
from ftl.translation import CollectorOptions, FlashTranslationLayer

from .pages import make_pages

FAILING = NandModel(
    program_failure_rate=3e-4, erase_failure_rate=3e-4, factory_bad_fraction=0.02, grown_bad_fraction=0.02
)


def geometry(parity: int, num_superblocks: int = 48) -> Geometry:
    return Geometry(
        num_channels=4,
        dies_per_channel=2,
        pages_per_erase_block=8,
        num_superblocks=num_superblocks,
        spare_percent=12,
        parity=parity,
    )


class Drive:
    """A layer and what its LBAs hold, one number per page."""

    def __init__(self, media, random, **options):
        self.media, self.random, self.options = media, random, options
        self.ftl = FlashTranslationLayer.format(media, **options)
        self.content = np.zeros(self.ftl.num_lbas, np.uint64)

    def churn(self, num_steps: int) -> None:
        for _ in range(num_steps):
            count = int(self.random.integers(1, 30))
            first = int(self.random.integers(0, self.ftl.num_lbas - count))
            choice = self.random.random()
            if choice < 0.8:
                values = self.random.integers(1, 1 << 40, count)
                _buffer, addresses = make_pages(values.tolist(), self.ftl.page_size)
                self.content[first : first + count] = values
                stream = int(self.random.integers(0, 20))
                self.ftl.write(np.arange(first, first + count), addresses, stream=stream)
            elif choice < 0.9:
                self.content[first : first + count] = 0
                self.ftl.deallocate([[first, count]])
            else:
                self.ftl.flush()

    def read(self) -> np.ndarray:
        num_lbas = self.ftl.num_lbas
        buffer, addresses = make_pages([0] * num_lbas, self.ftl.page_size)
        self.ftl.read(np.arange(num_lbas), addresses)
        words = buffer.view("<u8").reshape(num_lbas, -1)
        assert (words == words[:, :1]).all(), "a torn page was served"
        return words[:, 0].copy()

    def check(self) -> None:
        np.testing.assert_array_equal(self.read(), self.content)

    def reopen(self) -> None:
        self.ftl = FlashTranslationLayer.open(self.media, **self.options)


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_failing_blocks(seed, parity):
    """Failed programs and erases, bad blocks from the factory: every write goes somewhere, nothing is lost."""
    random = np.random.default_rng(seed)
    drive = Drive(NandMedia(geometry(parity), random, FAILING), random)
    for _ in range(3):
        drive.churn(300)
        drive.check()
        drive.ftl.close()
        drive.reopen()
        drive.check()
    assert drive.media.faults.program_failures


@pytest.mark.parametrize("seed", range(3))
def test_a_die_dies(seed):
    """Everything that was flushed is still readable, also after reopening; scrub makes it whole again."""
    random = np.random.default_rng(seed)
    drive = Drive(NandMedia(geometry(1, num_superblocks=64), random, FAILING), random)
    drive.churn(200)
    drive.ftl.deallocate([[0, drive.ftl.num_lbas // 3]])
    drive.content[: drive.ftl.num_lbas // 3] = 0
    drive.ftl.flush()
    drive.media.dead_dies = {int(random.integers(0, 8))}
    drive.check()
    assert drive.ftl.counters.repaired_pages
    drive.reopen()
    drive.check()
    reports = list(scrub(drive.ftl))
    assert not any(report.lost for report in reports)
    assert any(report.repaired for report in reports)
    drive.check()
    before = drive.ftl.counters.repaired_pages
    drive.check()
    assert drive.ftl.counters.repaired_pages == before
    drive.churn(100)
    drive.check()


@pytest.mark.parametrize("parity", [0, 1])
def test_bit_flips(parity):
    """One damaged page in each row of parity is given back; without parity it is an error naming the LBA."""
    random = np.random.default_rng(7)
    drive = Drive(NandMedia(geometry(parity), random), random)
    drive.churn(100)
    drive.ftl.flush()
    mapped = np.flatnonzero(drive.content)
    lba = int(mapped[len(mapped) // 2])
    page = int(drive.ftl.resolve(np.array([lba]))[0])
    drive.media.pages[page, 1234] ^= 16
    _buffer, address = make_pages([0], drive.ftl.page_size)
    if not parity:
        with pytest.raises(CorruptPage, match=f"LBA {lba} "):
            drive.ftl.read(np.array([lba]), address)
        reports = list(scrub(drive.ftl))
        assert [lost for report in reports for lost in report.lost] == [lba]
        return
    drive.check()
    assert [fixed for report in scrub(drive.ftl) for fixed in report.repaired] == [lba]
    assert int(drive.ftl.resolve(np.array([lba]))[0]) != page
    drive.check()
    # a second one in the same row cannot be
    page = int(drive.ftl.resolve(np.array([lba]))[0])
    row = page - page % 8
    neighbours = [other for other in range(row, row + 8) if other != page]
    drive.media.pages[[page, neighbours[0]], 99] ^= 1
    with pytest.raises(CorruptPage):
        drive.ftl.read(np.array([lba]), address)


def test_damage_after_a_clean_end_is_damage():
    """Bits that flip in the pages written last: an error, not the version before, as after a cut."""
    random = np.random.default_rng(11)
    drive = Drive(NandMedia(geometry(0), random), random)
    drive.churn(50)
    for value in (1, 2):
        _buffer, addresses = make_pages([value], drive.ftl.page_size)
        drive.ftl.write(np.array([5]), addresses)
        drive.ftl.flush()
    page = int(drive.ftl.resolve(np.array([5]))[0])
    drive.ftl.close()
    drive.media.pages[page, 17] ^= 1
    drive.reopen()
    with pytest.raises(CorruptPage, match="LBA 5 "):
        drive.read()


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_a_checkpoint_changes_nothing(seed, parity, monkeypatch):
    """After any cut, the map from a checkpoint and what was written since is the map from all pages."""
    random = np.random.default_rng(seed)
    model = NandModel(program_failure_rate=1e-4, factory_bad_fraction=0.02)
    drive = Drive(NandMedia(geometry(parity), random, model), random, checkpoint_pages=60)
    num_built_upon = 0
    for _ in range(10):
        drive.churn(40)
        drive.ftl.flush()
        if random.random() < 0.3:
            drive.ftl.deallocate([[0, drive.ftl.num_lbas // 2]])
        drive.media.cut_after = drive.media.operations + int(random.integers(0, 60))
        with suppress(PowerCut):
            drive.churn(40)
        drive.media.reboot()
        found = recover(drive.media)
        with monkeypatch.context() as patch:
            patch.setattr(recovery, "_load_checkpoint", lambda *_: None)
            scanned = recover(drive.media)
        np.testing.assert_array_equal(found.mapping.copy_entries(), scanned.mapping.copy_entries())
        num_built_upon += found.checkpoint is not None
        assert found.scanned_superblocks <= scanned.scanned_superblocks
        drive.reopen()
        drive.content = drive.read()
    assert num_built_upon


def test_cold_data_take_their_share_of_wear():
    """Half of the drive is never written again: its superblocks are erased as well."""
    random = np.random.default_rng(3)
    options = CollectorOptions(rated_cycles=200, wear_spread=0.05)
    drive = Drive(NandMedia(geometry(0), random), random, options=options)
    half = drive.ftl.num_lbas // 2
    drive.content[:half] = np.arange(1, half + 1)
    _buffer, addresses = make_pages(drive.content[:half].tolist(), drive.ftl.page_size)
    drive.ftl.write(np.arange(half), addresses)
    for _ in range(700):
        lbas = random.integers(half, drive.ftl.num_lbas, 64)
        values = random.integers(1, 1 << 40, 64)
        _buffer, addresses = make_pages(values.tolist(), drive.ftl.page_size)
        drive.ftl.write(lbas, addresses)
        drive.content[lbas] = values  # of an LBA named twice the last counts, here as there
    drive.check()
    counts = drive.ftl.erase_counts()
    assert drive.ftl.counters.wear_leveling_pages_written
    assert counts.max() - counts.min() <= 3 * options.wear_spread * options.rated_cycles


def test_states_after_all_that():
    """Every superblock is somewhere, and what is mapped lies where data lie."""
    random = np.random.default_rng(5)
    drive = Drive(NandMedia(geometry(1), random, FAILING), random, checkpoint_pages=100)
    drive.churn(500)
    states, valid = drive.ftl.superblock_states(), drive.ftl.valid_pages()
    assert valid.sum() == drive.ftl.mapped_pages == np.count_nonzero(drive.content)
    assert set(states[valid > 0].tolist()) <= {State.OPEN, State.FULL}
