"""What the flash layer is put through besides power cuts, and what must hold whenever it is looked at.

Threads are not needed for it: the media call the simulation from inside every operation, with the layer's lock
released, and that is where another host's commands would come in between.
"""

from unittest.mock import patch

import numpy as np

from ftl import recovery
from ftl.check import Kind, check
from ftl.errors import CorruptPage
from ftl.layout import OOB_MAGIC, PageKind
from ftl.mapping import PAGE_NONE
from ftl.nand_model import NandModel
from ftl.oob import holds
from ftl.open_superblock import OpenSuperblock
from ftl.parity import _membership, lost_records, unprotected_groups
from ftl.scrub import scrub
from ftl.superblocks import State
from ftl.translation import FlashTranslationLayer

from .oracle import Lost
from .pages import make_pages
from .simulated_media import SimulatedMedia

QUIET_STEPS = 15  # before the trials
MEANWHILE_CHANCE = 0.5  # of another command inside a media operation
ROOM = 4  # free superblocks that collecting one more needs at most


class FtlTrials:
    """Trials of one FtlSimulation, whose layer, medium and oracle they use."""

    def __init__(self, simulation):
        self._simulation = simulation
        self._random = simulation.random
        self._is_inside = False

    @property
    def _ftl(self) -> FlashTranslationLayer:
        return self._simulation._ftl

    def _note(self, text: str) -> None:
        self._simulation.done.append(text)

    def _are_lost(self, pages: np.ndarray, lbas: np.ndarray) -> np.ndarray:
        """bool: pages of these LBAs that cannot be read any more, through no fault of the layer's.

        An erase that was undone in part may also have taken the original of a copy that was lost.
        """
        media = self._simulation.media
        lost = media.lost_pages()
        lost_lbas = [*self._simulation._oracle.lost, *(int(record["lba"]) for record in lost.values())]
        is_blank = (pages != PAGE_NONE) & ~media.are_there(np.maximum(pages, 0))
        return np.isin(pages, list(lost)) | (np.isin(lbas, lost_lbas) & is_blank)

    def _newest(self, lbas: np.ndarray) -> list[int]:
        return [self._simulation._oracle.may_hold[lba][-1] for lba in lbas.tolist()]

    # while the media work

    def meanwhile(self) -> None:
        """Now and then, as a media operation begins or ends: small commands of another host."""
        media = self._simulation.media
        is_dying = bool(media.dead_dies) or media.dies_in is not None  # then any write may need room
        # or it would wait for ever
        is_sole = not self._is_inside and not self._ftl._writer._uncommitted and not is_dying
        is_sole &= not self._ftl._state.lock.locked()
        if not is_sole or self._random.random() >= MEANWHILE_CHANCE:
            return
        self._is_inside = True
        try:
            for _ in range(self._random.integers(1, 4)):
                self._command()
        finally:
            self._is_inside = False

    def _command(self) -> None:
        count = int(self._random.integers(1, 5))
        first = int(self._random.integers(0, self._ftl.num_lbas - count))
        busy = self._simulation._writing
        if first >= busy.stop or busy.start >= first + count:
            commands = [self._overwrite, self._deallocate, self._read, self._make_durable]
            commands[self._random.integers(len(commands))](first, count)

    def _overwrite(self, first: int, count: int) -> None:
        """Where that needs no collection, which may be what is under way."""
        ready = [
            stream
            for stream, found in sorted(self._ftl._writer._open.items())
            if stream < 3 and not found.is_busy and found.num_left >= count
        ]
        if ready and self._simulation.schedule.nand == NandModel():
            values = self._simulation.new_values(count)
            self._note(f"  meanwhile write {count} at {first}: {values.start}")
            for lba, value in enumerate(values, first):
                self._simulation._oracle.write(lba, value)
            _buffer, addresses = make_pages(list(values), self._ftl.page_size)
            self._ftl.write(np.arange(first, first + count), addresses, ready[0])

    def _deallocate(self, first: int, count: int) -> None:
        self._note(f"  meanwhile deallocate {count} at {first}")
        self._simulation.deallocate(first, count)

    def _make_durable(self, *_) -> None:
        """What a flush does first; where that would not wait for what is under way."""
        state, log, simulation = self._ftl._state, self._ftl._log, self._simulation
        if not log._is_busy and log._log.num_left > 4 and not state.geometry.parity:
            self._note("  meanwhile make durable")
            outdated = simulation._oracle.begin_flush()
            for lba in simulation._writing:  # not written yet
                outdated.pop(lba, None)
            with state.lock:
                log.make_durable()
            simulation._oracle.flushed(outdated)

    def _read(self, first: int, count: int) -> None:
        self._compare(np.arange(first, first + count), "read meanwhile")

    def _compare(self, lbas: np.ndarray, why: str, ftl: FlashTranslationLayer | None = None) -> None:
        """What LBAs hold is what was written last; ftl: another layer than the one in use."""
        lbas = lbas[~self._are_lost(self._ftl.resolve(lbas), lbas)]
        if not len(lbas):
            return
        buffer, addresses = make_pages([0] * len(lbas), self._ftl.page_size)
        (ftl or self._ftl).read(lbas, addresses)
        words = buffer.view("<u8").reshape(len(lbas), -1)
        expected = self._newest(lbas)
        wrong = np.flatnonzero((words != np.array(expected, np.uint64)[:, None]).any(axis=1))
        if len(wrong):
            lba, found = int(lbas[wrong[0]]), int(words[wrong[0], 0])
            raise Lost(f"{why}: LBA {lba} holds {found}, not {expected[wrong[0]]}")

    # steps of the workload

    def maintain(self) -> None:
        """What the layer does by itself now and then, and would seldom do in so short a life."""
        choice, state = self._random.random(), self._ftl._state
        if choice < 0.5 or self._ftl.free_superblocks <= ROOM:
            self._collect()
            return
        if self._is_likely():  # else what was superseded or deallocated is still there, and might be back
            self._ftl.collect(state.geometry.num_superblocks)
        if self._ftl.free_superblocks <= ROOM:
            return
        is_checkpoint = choice < 0.8
        if is_checkpoint:  # of what is not durable yet
            self._simulation.write_some()
        with state.lock:
            if is_checkpoint:
                self._note("checkpoint")
                self._ftl._log.checkpoint()
            else:
                self._note("a new log")
                self._ftl._log._rotate()
            self._ftl._collector.erase_replaced()
        # nor does it leave out what was written meanwhile; of a write that went elsewhere only it may know
        if is_checkpoint and self._simulation.schedule.nand == NandModel():
            self._check_checkpoint()

    def _collect(self) -> None:
        """Collection moves what somebody who resolved it before has yet to read."""
        ftl = self._ftl
        full = np.flatnonzero(ftl.superblock_states() == State.FULL)
        if not len(full) or ftl.free_superblocks < ROOM:
            return
        likely = full[np.argmin(ftl.valid_pages()[full])]
        self._note("collect while somebody reads")
        with ftl.read_guard():
            all_pages = ftl.resolve(np.arange(ftl.num_lbas))
            here = all_pages // ftl.geometry.pages_per_superblock == likely
            lbas = np.flatnonzero(here & ~self._are_lost(all_pages, np.arange(ftl.num_lbas)))
            pages, expected = all_pages[lbas], self._newest(lbas)
            ftl.collect(1)
            still = ~self._are_lost(pages, lbas)  # a die may have died meanwhile
            lbas, pages = lbas[still], pages[still]
            expected = [value for value, is_there in zip(expected, still, strict=True) if is_there]
            if not len(lbas):
                return
            buffer, addresses = make_pages([0] * len(lbas), ftl.page_size)
            ftl.read_physical(pages, lbas, addresses)
        if buffer.view("<u8").reshape(len(lbas), -1)[:, 0].tolist() != expected:
            raise Lost(f"a reader of LBAs {lbas.tolist()} was served something else")

    # openings

    def recover(self, media: SimulatedMedia, progress=None) -> recovery.Recovered:
        """As recovery does; what it maps and counts on as durable is what the rest of its row gives back."""
        found = recovery.recover(media, progress)
        geometry = media.geometry
        if not geometry.parity or media.dead_dies or self._simulation.schedule.nand != NandModel():
            return found  # else rows are cut short
        pages = np.flatnonzero(holds(media.oob))
        records = media.oob[pages]
        durable = ~recovery._doubtful(records, self._durable_numbers(records, found))
        weak = np.isin(pages // geometry.num_dies, unprotected_groups(geometry, records, pages))
        weak = pages[weak & durable]
        mapped = found.mapping.resolve(np.arange(len(found.mapping)))
        if np.isin(weak, mapped).any():
            raise Lost(f"pages {np.intersect1d(weak, mapped)[:5]} are called durable, and have no parity")
        return found

    def _durable_numbers(self, records: np.ndarray, found: recovery.Recovered) -> dict[int, int]:
        """By session, what is known to be durable, by pages or the log."""
        numbers = dict.fromkeys(records["session"].tolist(), 0) | found.durable_numbers
        for session in numbers:
            told = records["durable_program_number"][records["session"] == session].max(initial=0)
            numbers[session] = max(numbers[session], int(told))
        return numbers

    # trials, with the power on

    def run(self) -> None:
        """After a power cut all is as it should be, and goes on to be; then comes some of the damage."""
        self._check_findings()
        for _ in range(QUIET_STEPS):
            self._simulation._step()
        self._simulation.flush()
        self._check_findings()
        self._check_numbers()
        self._check_checkpoint()
        self._check_lost_records()
        self._check_collection_ends()
        media = self._simulation.media
        is_whole = not (media.dead_dies or media.gone)
        if is_whole and self._is_likely():
            self._damage()
        if self._is_likely():
            self._tamper()
        is_whole = not (media.dead_dies or media.gone)  # or it would be the second fault
        if is_whole and self._simulation.schedule.geometry.parity and self._is_likely():
            self._lose_a_die()

    def _is_likely(self) -> bool:
        return self._random.random() < 0.4

    def _check_findings(self) -> None:
        """Map, OOB and superblocks agree, and every superblock is somebody's."""
        ftl = self._ftl
        findings = [
            found
            for found in ftl.check()
            if found.kind != Kind.OOB_LOST or not self._are_lost(np.array([found.page]), np.array([found.lba]))
        ]
        if findings:
            raise Lost(f"the flash layer finds: {findings[:5]}")
        bad = self._simulation.media.bad_blocks()
        if (bad != ftl.superblocks.bad_planes).any():
            raise Lost("the medium and the layer do not agree which blocks are bad")
        not_marked = [block for block in self._simulation.media.failed if not bad[block]]
        if not_marked:
            raise Lost(f"blocks failed to be programmed and are not marked bad: {not_marked}")
        kept = ftl.superblocks.of(State.FULL)
        kept = set(kept[ftl.valid_pages()[kept] > 0].tolist()) & self._simulation.media.failed_with_data
        if not kept <= ftl.superblocks.retiring:
            raise Lost(f"superblocks {kept} failed while they held something, and it is not moved")
        for superblock in ftl.superblocks.of(State.FREE).tolist():
            bad, room = ftl.superblocks.bad_planes[superblock], int(ftl.superblocks.capacity[superblock])
            if OpenSuperblock(superblock, ftl.geometry, bad, 0, ftl.superblocks.keeps_parity).num_left != room:
                raise Lost(f"superblock {superblock} is said to take {room} pages")
        states, log = ftl.superblock_states(), ftl._log
        wanted = {
            State.LOG: {*log._log.superblocks, *log._checkpoint_superblocks, *log.replaced},
            State.OPEN: {found.superblock for found in ftl._writer._open.values()},
            State.ERASING: {*ftl._collector._emptied, *(s for s, _ in ftl._collector._erasing)},
        }
        for state, superblocks in wanted.items():
            if superblocks != set(np.flatnonzero(states == state).tolist()):
                raise Lost(f"{state.name} are {np.flatnonzero(states == state)}, known are {superblocks}")

    def _check_numbers(self) -> None:
        """No program number is given twice, and a version twice only to copies."""
        media = self._simulation.media
        records = media.oob[media.are_there(np.arange(len(media.oob)))]
        if len(np.unique(records["program_number"])) < len(records):
            raise Lost("two pages have the same program number")
        data = records[records["kind"] == PageKind.DATA]
        versions, which = np.unique(data["sequence_number"], return_index=True)
        first = data[which[np.searchsorted(versions, data["sequence_number"])]]
        if (first["lba"] != data["lba"]).any():
            raise Lost("two LBAs have the same version")

    def _check_checkpoint(self) -> None:
        """Opening by the checkpoint and by reading everything come to the same."""
        quick = recovery.recover(self._simulation.media)
        if quick.checkpoint is None:
            return
        with patch.object(recovery, "_load_checkpoint", lambda *_: None):
            thorough = recovery.recover(self._simulation.media)
        if not np.array_equal(quick.mapping.copy_entries(), thorough.mapping.copy_entries()):
            raise Lost("the checkpoint's map is not that of the flash")
        full = self._ftl.superblocks.of(State.FULL)
        full = full[self._ftl.superblocks.newest[full] <= quick.checkpoint.program_number]
        full = full[quick.checkpoint.superblocks["is_closed"][full] != 0]  # not only since then
        full = full[recovery._heads(self._simulation.media, full)["magic"] != 0]
        num_read, num_all = quick.scanned_superblocks, thorough.scanned_superblocks
        if num_read > num_all - len(full) and self._simulation.schedule.nand == NandModel():
            raise Lost(f"{num_read} superblocks of {num_all} are read, {len(full)} are as in the checkpoint")
        for name in ("next_sequence_number", "next_program_number", "session"):
            if getattr(quick, name) < getattr(thorough, name):
                raise Lost(f"{name} from a checkpoint would be used again")

    def _check_lost_records(self) -> None:
        """What parity says of a page that is there is what it is."""
        geometry, oob = self._ftl.geometry, self._simulation.media.oob
        if not geometry.parity or self._simulation.media.dead_dies:
            return  # with one die gone nothing is promised of another
        pages = np.flatnonzero(holds(oob))
        records = oob[pages]
        known = _membership(geometry, records, pages)
        pages = pages[known.member[known.lacking[known.place] == 0]]
        for die in range(geometry.num_dies):
            kept = holds(oob) & (np.arange(len(oob)) % geometry.num_dies != die)
            found, found_pages = lost_records(geometry, oob[kept], np.flatnonzero(kept))
            wanted = pages[pages % geometry.num_dies == die]
            if not np.isin(wanted, found_pages).all():
                raise Lost(f"parity knows nothing of pages {np.setdiff1d(wanted, found_pages)[:5]}")
            found = found[np.isin(found_pages, wanted)]
            for name in ("lba", "sequence_number", "program_number", "kind", "stream", "payload_crc32c"):
                if (np.sort(found[name]) != np.sort(oob[name][wanted])).any():
                    raise Lost(f"parity gives another {name} than the pages of die {die} have")

    def _check_collection_ends(self) -> None:
        """Collecting goes on only as long as something is gained."""
        limit = 3 * self._ftl.geometry.num_superblocks
        if self._ftl.free_superblocks > ROOM and self._is_likely() and self._ftl.collect(limit) == limit:
            raise Lost(f"{limit} superblocks were collected, and more would be")

    def _damage(self) -> None:
        """Flipped bits: parity gives a page back and scrub writes it anew, or an error names the LBA."""
        ftl, media, geometry = self._ftl, self._simulation.media, self._ftl.geometry
        ftl.collect(geometry.num_superblocks)  # so that there is room to move what is damaged
        flushed = ftl.resolve(np.arange(ftl.num_lbas))
        for _ in range(self._random.integers(3)):
            self._simulation._step()
        all_pages = ftl.resolve(np.arange(ftl.num_lbas))
        lbas = np.flatnonzero((all_pages != PAGE_NONE) & (all_pages == flushed))
        if not len(lbas) or media.gone:
            return
        superblocks = all_pages[lbas] // geometry.pages_per_superblock
        being_written = lbas[ftl.superblock_states()[superblocks] == State.OPEN]
        lba = int(self._random.choice(being_written if len(being_written) and self._is_likely() else lbas))
        page = int(all_pages[lba])
        if self._random.random() < 0.2:
            self._damage_oob(lba, page)
            return
        neighbours = lbas[all_pages[lbas] // geometry.num_dies == page // geometry.num_dies]
        hit = np.array([lba]) if not geometry.parity or self._random.random() < 0.6 else neighbours[:2]
        is_lost = not geometry.parity or len(hit) > 1
        self._note(f"bit flips in LBAs {hit.tolist()}, page {page}")
        for damaged in all_pages[hit].tolist():
            media.flip_bit(damaged)
        had_room, erase_count = ftl.free_superblocks > ROOM, self._erase_count(page)
        self._expect_error(int(lbas[lbas != lba][0]) if len(lbas) > 1 else lba + 1, page)
        if not is_lost:
            self._compare(hit, "read of a damaged page")
            if page // geometry.pages_per_superblock not in ftl.superblocks.damaged:
                raise Lost(f"nobody knows that page {page} is damaged")
        self._scrub(hit, is_lost)
        if is_lost:
            if had_room and self._is_likely():  # nor is it moved, and what lies beside it is not erased
                ftl.renew({page // geometry.pages_per_superblock})
            for other in hit.tolist():
                self._expect_error(other)
            for damaged in all_pages[hit].tolist():
                media.flip_bit(damaged)
            self._compare(np.arange(ftl.num_lbas), "read of a mended drive")
        elif had_room and int(ftl.resolve(hit)[0]) == page and self._erase_count(page) == erase_count:
            raise Lost(f"scrub leaves LBA {hit[0]} at its damaged page {page}")

    def _erase_count(self, page: int) -> int:
        """Of its superblock: where it changes, what comes to lie in a page has come anew."""
        return int(self._ftl.superblocks.erase_counts[page // self._ftl.geometry.pages_per_superblock])

    def _scrub(self, hit: np.ndarray, is_lost: bool) -> None:
        found = list(scrub(self._ftl))
        lost = [lba for report in found for lba in report.lost]
        repaired = [lba for report in found for lba in report.repaired]
        if (lost, repaired) != ((hit.tolist(), []) if is_lost else ([], hit.tolist())):
            raise Lost(f"LBAs {hit.tolist()} are damaged; scrub says lost {lost}, repaired {repaired}")
        if is_lost and self._ftl.free_superblocks > ROOM:
            # meets the damage, moves the rest, and must keep what it cannot read
            per_superblock = self._ftl.geometry.pages_per_superblock
            self._ftl.renew(set((self._ftl.resolve(hit) // per_superblock).tolist()))
            self._ftl.collect(1)

    def _damage_oob(self, lba: int, page: int) -> None:
        """A page whose record does not hold is still that page, or an error; collection may not lose it."""
        self._note(f"bit flip in the OOB of page {page}, LBA {lba}")
        record = self._simulation.media.oob[page : page + 1].view(np.uint8)
        record[20] ^= 1  # a byte of the LBA
        damaged = record.copy()
        had_room, erase_count = self._ftl.free_superblocks > ROOM, self._erase_count(page)
        if had_room:
            self._ftl.renew({page // self._ftl.geometry.pages_per_superblock})
        is_there = int(self._ftl.resolve(np.array([lba]))[0]) == page and self._erase_count(page) == erase_count
        if had_room and self._ftl.geometry.parity and is_there:
            raise Lost(f"parity knows the record of page {page}, but LBA {lba} is not moved")
        try:
            self._compare(np.array([lba]), "read of a page with a damaged record")
        except CorruptPage as error:
            if self._ftl.geometry.parity or error.lba != lba:
                raise
        if (record == damaged).all():  # nothing was programmed there since
            record[20] ^= 1
        self._ftl._state.checksums.forget(page // self._ftl.geometry.pages_per_superblock)
        self._compare(np.array([lba]), "read of a page with a mended record")

    def _tamper(self) -> None:
        """What is wrong in memory is found by the check, by its name; then it is mended."""
        ftl, state = self._ftl, self._ftl._state
        entries, valid = state.mapping.entries, state.mapping.valid_pages
        mapped, free = np.flatnonzero(entries), state.superblocks.of(State.FREE)
        mapped = mapped[self._simulation.media.are_there(entries[mapped].astype(np.int64) - 1)]
        if len(mapped) < 2 or not len(free):
            return
        one, other = self._random.choice(mapped, 2, replace=False).tolist()
        good = int(np.argmin(state.superblocks.bad_planes[free[0]]))
        first_free = int(free[0]) * ftl.geometry.pages_per_superblock + good
        log = state.superblocks.of(State.LOG)
        outside = int(self._random.choice([first_free, *log * ftl.geometry.pages_per_superblock + good]))
        changes = {
            Kind.OUTSIDE_DATA: (entries, {one: outside + 1}),
            Kind.WRONG_LBA: (entries, {one: entries[other], other: entries[one]}),
            Kind.MAPPED_TWICE: (entries, {one: entries[other]}),
            Kind.VALID_PAGES: (valid, {0: valid[0] + 1}),
            Kind.NOT_ERASED: (self._simulation.media.oob["magic"], {first_free: OOB_MAGIC}),
        }
        older = self._older_version(one)
        oob = self._simulation.media.oob
        newest = oob[int(entries[one]) - 1]
        # others a power cut may take; and beside a newer one that is torn the check looks no further
        is_newest = newest["sequence_number"] == oob["sequence_number"][self._pages_of(one)].max()
        if older is not None and is_newest and newest["program_number"] <= state.durable_program_number:
            changes[Kind.SUPERSEDED] = (entries, {one: older + 1})
        kind = self._random.choice(sorted(changes))
        array, values = changes[Kind(kind)]
        before = array.copy()
        for index, value in values.items():
            array[index] = value
        found = {finding.kind for finding in check(state)}
        array[:] = before
        self._simulation.media.read_oob(int(free[0]))  # by which the medium knows what is programmed
        if Kind(kind) not in found:
            raise Lost(f"the check does not find {kind!r} but {found}")

    def _pages_of(self, lba: int) -> np.ndarray:
        """int64: those on flash that say they are this LBA's."""
        oob = self._simulation.media.oob
        return np.flatnonzero((oob["kind"] == PageKind.DATA) & (oob["lba"] == lba) & holds(oob))

    def _older_version(self, lba: int) -> int | None:
        """A durable page on flash that held an LBA before, in a superblock with data."""
        oob, state = self._simulation.media.oob, self._ftl._state
        page = int(state.mapping.resolve(np.array([lba]))[0])
        older = self._pages_of(lba)
        older = older[oob["sequence_number"][older] < oob["sequence_number"][page]]
        older = older[self._simulation.media.are_there(older)]
        states = state.superblocks.states[older // self._ftl.geometry.pages_per_superblock]
        found = older[states == State.FULL]
        return int(found[0]) if len(found) else None

    def _expect_error(self, lba: int, page: int | None = None) -> None:
        """For an LBA, by default from where it is."""
        _buffer, addresses = make_pages([0], self._ftl.page_size)
        lbas = np.array([lba])
        try:
            self._ftl.read_physical(
                self._ftl.resolve(lbas) if page is None else np.array([page]), lbas, addresses
            )
        except CorruptPage as error:
            if error.lba != lba:
                raise Lost(f"LBA {lba} is corrupt, but the error names {error.lba}") from error
        else:
            raise Lost(f"LBA {lba} is corrupt, and was served")

    def _lose_a_die(self) -> None:
        """Whatever a flush has promised is there without any one die, also for whoever opens the drive then."""
        simulation, media = self._simulation, self._simulation.media
        num_good = np.count_nonzero(~self._ftl.superblocks.bad_planes, axis=1)
        if (num_good == 1).any():  # no parity is possible there
            return
        die = int(self._random.integers(simulation.schedule.geometry.num_dies))
        simulation.flush()
        self._note(f"without die {die}")
        with media.what_if():
            media.dead_dies, alive = {die}, media.dead_dies
            try:
                everything = np.arange(self._ftl.num_lbas)
                self._compare(everything, "without a die")
                again = FlashTranslationLayer.open(media, **simulation._options)
                self._compare(everything, "opened without a die", again)
            finally:
                media.dead_dies = alive
        for superblock in range(media.geometry.num_superblocks):  # the die is back
            self._ftl._state.checksums.forget(superblock)
        self._ftl._state.superblocks.damaged.clear()
