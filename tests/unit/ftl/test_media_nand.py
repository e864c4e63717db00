"""Flash that fails: each way by itself, from a seed, and what must hold nevertheless."""

import numpy as np
import pytest

from ftl.errors import EraseFailed, NandRuleViolation, ProgramFailed
from ftl.geometry import Geometry
from ftl.layout import OOB_MAGIC, PAGE_OOB
from ftl.media_memory import CountingMedia
from ftl.media_nand import NandMedia, NandModel, PowerCut
from spdk_glue import dma

GEOMETRY = Geometry(num_channels=2, dies_per_channel=2, planes_per_die=2, pages_per_erase_block=8)
PER_SUPERBLOCK, PLANES = GEOMETRY.pages_per_superblock, GEOMETRY.num_planes


def nand(seed=0, **model):
    print(f"seed {seed}")
    return NandMedia(GEOMETRY, np.random.default_rng(seed), NandModel(**model))


def payload(pages):
    buffer = dma.allocate(len(pages) * GEOMETRY.page_size)
    buffer.view("<u8").reshape(len(pages), -1)[:] = np.asarray(pages)[:, None] + 1
    return buffer, dma.page_addresses(buffer, GEOMETRY.page_size)


def program(media, pages):
    pages = np.asarray(pages)
    _buffer, addresses = payload(pages)
    oob = np.zeros(len(pages), PAGE_OOB)
    oob["magic"], oob["lba"] = OOB_MAGIC, pages
    media.program(pages, addresses, oob)


def fill(media, superblock):
    program(media, superblock * PER_SUPERBLOCK + np.arange(PER_SUPERBLOCK))


def holds(media, pages):
    """bool [n]: the pages that read as they were programmed, by content and by checksum."""
    pages = np.asarray(pages)
    buffer, addresses = payload(np.zeros_like(pages))
    crc32c = media.read(pages, addresses)
    whole = (buffer.view("<u8").reshape(len(pages), -1) == (pages + 1)[:, None]).all(axis=1)
    assert (whole <= (crc32c == media.oob["payload_crc32c"][pages])).all() or not media.oob["magic"][
        pages
    ].all()
    return whole


def has_oob(media, pages):
    return media.oob["lba"][pages] == pages


def digest(media):
    return hash((media.pages.tobytes(), media.oob.tobytes(), media.bad_blocks().tobytes()))


def test_without_a_model_nothing_fails():
    """The default must behave, or every other test of the layers above tests the wrong thing."""
    media = nand()
    for _ in range(5):
        for superblock in range(8):
            media.erase(superblock)
            fill(media, superblock)
    assert holds(media, np.arange(8 * PER_SUPERBLOCK)).all()
    assert not any(media.faults.as_dict().values())


def test_repeatable():
    """A seed replays a run exactly, all faults on: without that no failure found can be studied."""

    def run(seed):
        media = nand(seed, program_failure_rate=0.01, erase_failure_rate=0.02, factory_bad_fraction=0.02,
                     grown_bad_fraction=0.1, rated_cycles=5, bit_error_rate=1e-5, lost_write_rate=0.01,
                     misdirected_write_rate=0.01)  # fmt: skip
        for superblock in np.random.default_rng(1).integers(0, 64, 200).tolist():
            good = ~media.bad_blocks()[superblock]
            try:
                media.erase(superblock)
                pages = superblock * PER_SUPERBLOCK + np.arange(PER_SUPERBLOCK // 2)
                program(media, pages[good[pages % PLANES]])
                holds(media, pages)
            except (ProgramFailed, EraseFailed) as error:
                media.mark_bad(superblock, error.planes)
        media.cut_after = media.operations
        with pytest.raises(PowerCut):
            media.sync()
        media.reboot()
        return digest(media), media.uuid, media.faults.as_dict()

    first, again, other = run(3), run(3), run(4)
    assert first == again
    assert first[0] != other[0]
    assert all(count > 0 for count in first[2].values())


def test_factory_bad_blocks():
    """Blocks bad from the start, reported as such, refused and skipped by erases."""
    media = nand(factory_bad_fraction=0.1)
    bad = media.bad_blocks()
    assert 0.05 < bad.mean() < 0.16
    superblock = int(np.argmax(bad.any(axis=1)))
    plane = int(np.argmax(bad[superblock]))
    with pytest.raises(NandRuleViolation):
        program(media, [superblock * PER_SUPERBLOCK + plane])
    media.erase(superblock)
    assert media.counters.blocks_erased == PLANES - bad[superblock].sum()


def test_program_failure():
    """Pages of a failed batch may be lost, in the failed blocks above all; pages programmed earlier are not."""
    failures = losses = 0
    for seed in range(40):
        media = nand(seed)
        earlier, batch = np.arange(16), np.arange(16, PER_SUPERBLOCK)
        other = PER_SUPERBLOCK + np.arange(8)
        program(media, earlier)
        media.model = NandModel(program_failure_rate=0.02)
        try:
            program(media, np.concatenate([batch, other]))
        except ProgramFailed as error:
            if error.superblock == 1:
                continue
            failures += 1
            assert f"superblock 0 on planes {error.planes.tolist()}" in str(error)
            assert holds(media, earlier).all()
            assert not media.bad_blocks().any()  # that is for the caller to say
            whole = has_oob(media, batch) & holds(media, batch)
            losses += not whole[np.isin(batch % PLANES, error.planes)].all()
            media.mark_bad(0, error.planes)
            media.erase(0)
            assert media.faults.program_failures == len(error.planes)
    assert failures >= losses > 10


def test_erase_failure():
    """A block that fails to erase: the others are erased, its content is undefined."""
    media = nand(erase_failure_rate=0.1)
    failed = 0
    for superblock in range(64):
        fill(media, superblock)
        planes = np.empty(0, np.int64)
        try:
            media.erase(superblock)
        except EraseFailed as error:
            assert error.superblock == superblock
            planes = error.planes
        failed += len(planes)
        magic = media.read_oob(superblock)["magic"].reshape(-1, PLANES)
        assert not np.delete(magic, planes, axis=1).any()
        media.mark_bad(superblock, planes)
        pages = np.arange(superblock * PER_SUPERBLOCK, (superblock + 1) * PER_SUPERBLOCK)
        program(media, pages[~np.isin(pages % PLANES, planes)])
    assert 0.05 < failed / (64 * PLANES) < 0.15
    assert media.faults.erase_failures == failed
    assert media.counters.blocks_erased == 64 * PLANES - failed


def test_grown_bad_blocks():
    """Blocks that go bad do so for ever, spread over their life, in the wanted number."""
    media = nand(seed=1, grown_bad_fraction=0.2, rated_cycles=10)
    when = {}
    for cycle in range(10):
        for superblock in range(32):
            if media.bad_superblocks()[superblock]:
                continue
            pages = superblock * PER_SUPERBLOCK + np.arange(PER_SUPERBLOCK)
            for attempt in (lambda: media.erase(superblock), lambda: program(media, pages)):  # noqa: B023
                try:
                    good = ~media.bad_blocks()[superblock]
                    pages = pages[good[pages % PLANES]]
                    attempt()
                except (ProgramFailed, EraseFailed) as error:
                    media.mark_bad(superblock, error.planes)
                    when.update({(superblock, plane): cycle for plane in error.planes.tolist()})
    assert 0.12 < len(when) / (32 * PLANES) < 0.28
    assert min(when.values()) <= 1
    assert max(when.values()) >= 8
    assert len(set(when.values())) > 6


def test_a_grown_bad_block_stays_bad():
    """Retrying where the flash failed for good must fail again."""
    media = nand(grown_bad_fraction=1, rated_cycles=1)
    for superblock in range(8):
        for _ in range(3):
            with pytest.raises((ProgramFailed, EraseFailed)):
                media.erase(superblock)
                fill(media, superblock)


def test_wear_out():
    """Up to the rated cycles nothing wears out; a tenth past them nothing is left."""
    media = nand(rated_cycles=20)
    failures = []
    for _ in range(24):
        try:
            media.erase(0)
            failures.append(0)
        except EraseFailed as error:
            failures.append(len(error.planes))
    assert sum(failures[:21]) == 0
    assert failures[23] == PLANES
    assert media.erase_counts()[0] == 24


def test_read_disturb():
    """Reading wears too: errors come past the limit, in that block only, stay, and end with an erase."""
    media = nand(read_disturb_limit=100, read_disturb_error_rate=1e-4)
    fill(media, 0)
    fill(media, 1)
    pages = np.arange(PER_SUPERBLOCK)
    for _ in range(92):
        assert holds(media, np.array([0])).all()
    assert media.read_counts()[:2].tolist() == [92, 0]
    assert holds(media, pages).all()
    assert media.faults.bits_flipped == 0
    for _ in range(300):
        holds(media, np.array([0]))
    block = pages[pages % PLANES == 0]
    assert not holds(media, block).all()
    assert media.faults.bits_flipped > 0
    assert holds(media, np.setdiff1d(pages, block)).all()
    assert holds(media, PER_SUPERBLOCK + pages).all()
    damaged = ~holds(media, block)
    assert (~holds(media, block) >= damaged).all()
    media.erase(0)
    assert media.read_counts()[0] == 0
    fill(media, 0)
    assert holds(media, pages).all()


def test_reading_oob_disturbs():
    """A scan reads every page of every block once."""
    media = nand()
    media.read_oob(3)
    assert media.read_counts()[3] == GEOMETRY.pages_per_erase_block
    media.read_oob_pages(np.array([3 * PER_SUPERBLOCK]))
    assert media.read_counts()[3] == GEOMETRY.pages_per_erase_block + 1


def test_bit_errors_grow_with_wear():
    """A worn block loses more bits than a new one, by the factor that the model says."""
    media = nand(bit_error_rate=1e-7, bit_error_growth=1000.0, rated_cycles=50)
    for _ in range(50):
        media.erase(1)
    flips = []
    for superblock in (0, 1):
        fill(media, superblock)
        before = media.faults.bits_flipped
        for _ in range(5):
            holds(media, superblock * PER_SUPERBLOCK + np.arange(PER_SUPERBLOCK))
        flips.append(media.faults.bits_flipped - before)
    bits = 5 * PER_SUPERBLOCK * GEOMETRY.page_size * 8
    assert flips[0] < 20
    assert 0.8 < flips[1] / (bits * 1e-4) < 1.2


def test_dead_die():
    """A die that died: garbage from its planes, failures, and nothing of it elsewhere."""
    media = nand()
    fill(media, 0)
    media.dead_dies.add(1)
    pages = np.arange(PER_SUPERBLOCK)
    on_die = pages % GEOMETRY.num_dies == 1
    np.testing.assert_array_equal(holds(media, pages), ~on_die)
    records = media.read_oob(0)
    np.testing.assert_array_equal(records["lba"] == pages, ~on_die)
    np.testing.assert_array_equal(media.read_oob_pages(pages[:8])["lba"] == pages[:8], ~on_die[:8])
    with pytest.raises(EraseFailed) as caught:
        media.erase(0)
    assert caught.value.planes.tolist() == [1, 5]
    with pytest.raises(ProgramFailed) as caught:
        program(media, PER_SUPERBLOCK + np.arange(8))
    assert caught.value.planes.tolist() == [1, 5]
    program(media, 2 * PER_SUPERBLOCK + np.array([0, 2, 3, 4]))
    assert NandMedia(GEOMETRY, np.random.default_rng(0), NandModel(dead_dies=frozenset({2}))).dead_dies == {2}


def test_lost_writes():
    """A write reported as done that is not there; only the payload's absence and the OOB's can tell."""
    media = nand(lost_write_rate=0.2)
    fill(media, 0)
    lost = media.faults.lost_writes
    assert 3 < lost < 30
    pages = np.arange(PER_SUPERBLOCK)
    np.testing.assert_array_equal(has_oob(media, pages) & (media.oob["magic"][pages] != 0), holds(media, pages))
    assert np.count_nonzero(~holds(media, pages)) == lost


def test_misdirected_writes():
    """A write that went to another page of its block: whole there, with its own LBA, missing here."""
    found = 0
    for seed in range(10):
        media = nand(seed, misdirected_write_rate=0.3)
        pages = np.arange(2 * PLANES)
        program(media, pages)
        strayed = np.flatnonzero(
            (media.oob["magic"] != 0) & (media.oob["lba"] != np.arange(GEOMETRY.num_pages))
        )
        assert len(strayed) <= media.faults.misdirected_writes
        found += len(strayed)
        for page in strayed.tolist():
            lba = int(media.oob["lba"][page])
            assert page % PLANES == lba % PLANES
            assert page // PER_SUPERBLOCK == 0
            assert page >= 2 * PLANES
            assert media.oob["magic"][lba] == 0
            assert (media.pages[page].view("<u8") == lba + 1).all()
    assert found > 20


def test_synced_survives_a_power_cut():
    """What was synced is there after any cut: that is all that durability rests on."""
    for seed in range(30):
        media = nand(seed)
        fill(media, 0)
        media.erase(1)
        media.mark_bad(2, np.array([3]))
        media.sync()
        media.cut_after = media.operations + 1
        with pytest.raises(PowerCut):
            for superblock in (3, 4, 5):
                fill(media, superblock)
        for operation in (lambda: media.sync(), lambda: holds(media, [0]), lambda: media.read_oob(0),  # noqa: B023
                          lambda: media.erase(0), lambda: media.mark_bad(0, np.array([0]))):  # noqa: B023  # fmt: skip
            with pytest.raises(PowerCut):
                operation()
        media.reboot()
        assert holds(media, np.arange(PER_SUPERBLOCK)).all()
        assert has_oob(media, np.arange(1, PER_SUPERBLOCK)).all()
        assert media.bad_blocks()[2].tolist() == [False] * 3 + [True] + [False] * (PLANES - 4)
        assert (media.faults.power_cuts, media.operations, media.cut_after) == (1, 0, None)


def test_fates_of_unsynced_pages():
    """Whole, gone, torn payload, torn OOB, in any order: each must happen, or recovery is not tested."""
    fates = {"whole": 0, "gone": 0, "torn payload": 0, "torn OOB": 0, "later without earlier": 0}
    for seed in range(10):
        media = nand(seed)
        pages = np.arange(PER_SUPERBLOCK)
        program(media, pages)
        before = media.oob[:PER_SUPERBLOCK].copy()
        media.reboot()
        gone = media.oob["magic"][pages] == 0
        same_oob = media.oob[pages] == before
        whole = (media.pages[pages].view("<u8") == (pages + 1)[:, None]).all(axis=1)
        fates["whole"] += int(np.count_nonzero(same_oob & whole))
        fates["gone"] += int(np.count_nonzero(gone))
        fates["torn payload"] += int(np.count_nonzero(same_oob & ~whole))
        fates["torn OOB"] += int(np.count_nonzero(~gone & ~same_oob))
        there = (same_oob & whole).reshape(-1, PLANES)
        fates["later without earlier"] += int((there[1:] & ~there[:-1]).any())
        # programming goes on behind whatever is there, never over it
        last = np.flatnonzero(~gone)[-1]
        with pytest.raises(NandRuleViolation):
            program(media, [last])
    assert all(fates.values()), fates


def test_fates_of_unsynced_erases():
    """Done, undone and half-done, each block by itself; never undone under what was programmed since."""
    seen = set()
    for seed in range(20):
        media = nand(seed)
        fill(media, 0)
        media.sync()
        media.erase(0)
        program(media, [2])
        media.reboot()
        counts = (media.oob["magic"][:PER_SUPERBLOCK] != 0).reshape(-1, PLANES).sum(axis=0)
        seen |= {"done" if c == 0 else "undone" if c == 8 else "half" for c in np.delete(counts, 2).tolist()}
        if media.oob["lba"][2] == 2 and counts[2] == 1:
            seen.add("programmed since")
        pages = np.flatnonzero(media.oob["magic"][:PER_SUPERBLOCK])
        back = pages[pages % PLANES != 2]
        assert not len(back) or holds(media, back).all()
    assert seen == {"done", "undone", "half", "programmed since"}


@pytest.mark.parametrize(
    ("operation", "run", "wanted"),
    [
        ("program", lambda media: program(media, [0, 1]), {"none", "part"}),
        ("erase", lambda media: media.erase(1), {"all", "part"}),
        ("sync", lambda media: media.sync(), {"all", "part"}),
    ],
)
def test_the_cut_operation_is_done_or_not(operation, run, wanted):
    """The operation that the power fails in must come out both ways over the seeds."""
    outcomes = set()
    for seed in range(30):
        media = nand(seed)
        fill(media, 1)
        media.sync()
        if operation == "sync":
            fill(media, 0)
        media.cut_after = media.operations
        with pytest.raises(PowerCut):
            run(media)
        media.reboot()
        superblock = 1 if operation == "erase" else 0
        count = np.count_nonzero(media.read_oob(superblock)["magic"])
        outcomes.add("all" if count == PER_SUPERBLOCK else "none" if count == 0 else "part")
    assert outcomes >= wanted


def test_forgotten_marks():
    """A bad block marked and not synced may be forgotten; a factory one, or a synced mark, never."""
    outcomes = set()
    for seed in range(20):
        media = nand(seed)
        media.mark_bad(0, np.array([0]))
        media.sync()
        media.mark_bad(0, np.array([0, 1]))
        media.reboot()
        bad = media.bad_blocks()[0]
        assert bad[0]
        outcomes.add(bool(bad[1]))
    assert outcomes == {False, True}


def test_reads_can_count_as_operations():
    """Cuts inside recovery, which does little else than read."""
    media = NandMedia(GEOMETRY, np.random.default_rng(0), count_reads=True)
    fill(media, 0)
    media.cut_after = 2
    holds(media, [0])
    with pytest.raises(PowerCut):
        media.read_oob(0)
    media.reboot()
    media.read_oob(0)


@pytest.mark.parametrize(
    "wrong", [{"program_failure_rate": 1.5}, {"factory_bad_fraction": -1}, {"rated_cycles": 0}]
)
def test_models_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NandModel(**wrong)


def test_counting_media():
    """A study of write amplification: the rules and OOB of a medium, without the memory for its pages."""
    geometry = Geometry(pages_per_erase_block=256, num_superblocks=2048)  # 16 GiB
    media = CountingMedia(geometry)
    oob = np.zeros(16, PAGE_OOB)
    oob["magic"], oob["payload_crc32c"], oob["lba"] = OOB_MAGIC, np.arange(16) + 5, np.arange(16)
    nowhere = np.zeros(16, np.uint64)
    media.program(np.arange(16), nowhere, oob)
    assert media.read(np.arange(16), nowhere).tolist() == list(range(5, 21))
    assert media.read_oob(0)["lba"][:16].tolist() == list(range(16))
    with pytest.raises(NandRuleViolation):
        media.program(np.arange(16), nowhere, oob)
    media.mark_bad(0, np.array([1]))
    media.erase(0)
    assert media.read_oob(0)["magic"].nonzero()[0].tolist() == [1, 9]
    assert media.erase_counts()[0] == 1
