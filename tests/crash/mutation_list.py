"""Lines broken on purpose, each as an engineer might break it: what would be lost if it came to users.

What no simulation without threads and without failing media can see (waiting for spills, reader guards, locks)
is not in here; it has tests of its own. Nor is what only takes away a second defence, and changes nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, which is in `file` once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


def _of(file: str, *mutations: tuple[str, str, str]) -> list[Mutation]:
    return [Mutation(name, file, old, new) for name, old, new in mutations]


_METADATA_VFS = _of(
    "kvfs/metadata_vfs.py",
    (
        "rows durable before their data",
        "            self._namespace.flush()\n            self._namespace.write_scattered(",
        "            self._namespace.write_scattered(",
    ),
    (
        "catalogue written but not flushed",
        "        self._namespace.flush()\n        self.database.forget_dirty()",
        "        self.database.forget_dirty()",
    ),
    ("volume header never updated", "if header.tobytes() != self._header.tobytes():", "if False:"),
    ("log not written", "self.database.drain() + self.wal.drain()", "self.database.drain()"),
    ("database not written", "self.database.drain() + self.wal.drain()", "self.wal.drain()"),
    ("file size not kept", "self.size = max(self.size, offset + len(data))", "self.size = offset + len(data)"),
    (
        "SQLite's syncs ignored",
        "            self._volume.sync()\n        except NvmeError",
        "            pass\n        except NvmeError",
    ),
    (
        "part block written over zeros",
        "bytearray(self._block_bytes) if whole else bytearray(self._block(index))",
        "bytearray(self._block_bytes)",
    ),
    (
        "neighbours joined over a gap",
        "indices[stop] == indices[stop - 1] + 1",
        "indices[stop] <= indices[stop - 1] + 2",
    ),
    (
        "data area begins in the log",
        "self.first_data_lba = 1 + database_lbas + wal_lbas",
        "self.first_data_lba = 1 + database_lbas",
    ),
    (
        "blocks forgotten before they are written",
        "        extents = self.database",
        "        self.wal.forget_dirty()\n        extents = self.database",
    ),
)

_METADATA = _of(
    "kvfs/metadata.py",
    ("sharing not counted", "reference_count = reference_count + 1", "reference_count = reference_count + 0"),
    ("sharing never ends", "reference_count = reference_count - 1", "reference_count = reference_count - 0"),
    ("shared groups freed", "WHERE reference_count = 0 AND id IN", "WHERE reference_count <= 1 AND id IN"),
    ("groups of the deleted kept", "freed = self._release_groups(row.id, 0)", "freed = []"),
    (
        "tail of the deleted kept",
        "        if row.tail_lbas:\n            freed.append",
        "        if False:\n            freed.append",
    ),
    ("token chunk begun anew", "first_chunk = first_new - first_new % TOKEN_CHUNK", "first_chunk = first_new"),
    (
        "token ids of the deleted kept",
        'for table in ("token_chunk", "sequence_attribute"):\n'
        '                self._db.execute(f"DELETE FROM {table} WHERE sequence_id = ?", (row.id,))',
        'for table in ("sequence_attribute",):\n'
        '                self._db.execute(f"DELETE FROM {table} WHERE sequence_id = ?", (row.id,))',
    ),
    (
        "groups in any order",
        'ORDER BY position",\n            (sequence_id,),\n        )\n        return [GroupRow',
        'ORDER BY group_id DESC",\n            (sequence_id,),\n        )\n        return [GroupRow',
    ),
    (
        "groups released from the one behind",
        "sequence_id = ?1 AND position >= ?2",
        "sequence_id = ?1 AND position > ?2",
    ),
    (
        "tail place not stored",
        "(row.changed_ns, row.num_tokens, row.num_spilled, row.tail_lba, row.tail_lbas, row.id)",
        "(row.changed_ns, row.num_tokens, row.num_spilled, row.tail_lba, 0, row.id)",
    ),
    (
        "no transaction around a state",
        "        with self.transaction():\n            freed = self._release_groups(row.id, first_changed)",
        "        self.is_durable = False\n        if True:\n"
        "            freed = self._release_groups(row.id, first_changed)",
    ),
)

_METADATA += _of(
    "kvfs/catalogue_database.py",
    (
        "log full for ever",
        "if self._is_log_own and wal.size <= min(LONGEST_LOG_BYTES, wal.capacity // 4):",
        "if self._is_log_own:",
    ),
    (
        "lost transactions hold once more",
        "if self._is_log_own and wal.size <= min(LONGEST_LOG_BYTES, wal.capacity // 4):",
        "if wal.size <= min(LONGEST_LOG_BYTES, wal.capacity // 4):",
    ),
    (
        "transactions pass for durable",
        '            self._db.execute("COMMIT")\n            self.is_durable = False',
        '            self._db.execute("COMMIT")',
    ),
    (
        "catalogue never synced",
        "        self._volume.sync()\n        self.is_durable = True",
        "        self.is_durable = True",
    ),
)

_METADATA += _of(
    "kvfs/batch.py",
    ("database outgrows its area", '        self._db.pragma("max_page_count", num_pages)\n', "        pass\n"),
)

_SEQUENCE = _of(
    "kvfs/sequence.py",
    (
        "truncation leaves no mark",
        "        self._history.cut(num_tokens)\n        self._changed()",
        "        self._history.cut(num_tokens)",
    ),
    ("flush does not sync", "self._store._sync_if_needed()  # a fork", "pass  # a fork"),
    (
        "truncated token ids stored",
        "self._tokens_changed_from = min(self._tokens_changed_from, num_tokens)",
        "pass",
    ),
    ("truncated token ids kept", "self._tokens = self._tokens[:num_tokens]", "pass"),
    ("dropped groups not noted", "self._groups_changed_from = min(self._groups_changed_from, keep)", "pass"),
    ("tail record not written", "self._store._namespace.write(first_lba, buffer, PLACEMENT_TAIL)", "pass"),
    (
        "old tail reused at once",
        "self._store._allocator.hold(self._row.tail_lba, self._row.tail_lbas)",
        "self._store._allocator.give_back(self._row.tail_lba, self._row.tail_lbas)",
    ),
    (
        "old tail leaked",
        "        if self._row.tail_lbas:\n            self._store._allocator.hold",
        "        if False:\n            self._store._allocator.hold",
    ),
    (
        "freed groups reused at once",
        "for extent in freed:\n            self._store._allocator.hold(*extent)",
        "for extent in freed:\n            self._store._allocator.give_back(*extent)",
    ),
    ("freed groups leaked", "        for extent in freed:\n", "        for extent in freed[1:]:\n"),
    (
        "fork shares a part group",
        "whole -= whole % self._geometry.group_tokens\n        self._groups",
        "self._groups",
    ),
    (
        "fork of unstored groups",
        "            if self._dirty:\n                self._store_state()  # gives",
        "            if False:\n                self._store_state()  # gives",
    ),
    ("fork without token ids", "self._tokens = parent._tokens.copy()", "self._tokens = parent._tokens[:0]"),
    (
        "fork in two transactions",
        "with self._store._catalogue.transaction():  # the name",
        "with self._store._lock:  # the name",
    ),
    (
        "fork counts no groups",
        "        self._groups_changed_from = 0\n        self._layers",
        "        self._groups_changed_from = len(self._groups)\n        self._layers",
    ),
    (
        "truncated inside a group",
        "whole = num_tokens - num_tokens % self._geometry.group_tokens",
        "whole = num_tokens",
    ),
    (
        "first layer's tail for all",
        "for tail, rows in zip(self._layers, tail",
        "for tail, rows in zip(self._layers[::-1], tail",
    ),
    (
        "values loaded as keys",
        "tail.refill(*rows)",
        "tail.refill(*rows[::-1])",
    ),
    ("half a tail after a failed load", "self._clear_tails()  # or the next", "pass  # or the next"),
    (
        "unloaded in the middle of a pass",
        "return self._layers is not None and len({tail.num_tokens for tail in self._layers}) == 1",
        "return self._layers is not None",
    ),
    (
        "unloaded without storing",
        "        if self._layers is not None and self._dirty:\n"
        "            self._store_state()\n        self._clear",
        "        self._clear",
    ),
    ("unnamed groups leaked by truncation", "if group.id is None:  # no", "if False:  # no"),
    (
        "unnamed groups leaked by deletion",
        "            if group.id is None:\n                self._store._allocator.hold",
        "            if False:\n                self._store._allocator.hold",
    ),
    (
        "written groups reused undeallocated",
        "                self._store._allocator.hold(group.base_lba, group.num_lbas)\n        del self",
        "                self._store._allocator.give_back(group.base_lba, group.num_lbas)\n        del self",
    ),
    ("part group not named", "named = -(-spilled // group_tokens)", "named = spilled // group_tokens"),
    (
        "too few tokens in the row",
        "num_tokens=num_tokens, num_spilled=spilled,",
        "num_tokens=max(0, num_tokens - 1), num_spilled=spilled,",
    ),
    (
        "clean before it is stored",
        "        self._wait_for_spills()\n        num_tokens = self.num_tokens\n",
        "        self._wait_for_spills()\n"
        "        num_tokens = min(self.num_tokens, self._row.num_tokens + 100)\n",
    ),
    (
        "tail read from its start",
        "            first = max(start, on_flash)\n",
        "            first = on_flash\n",
    ),
)
_SEQUENCE += _of(
    "kvfs/growing_sequence.py",
    (
        "append leaves no mark",
        "            self._changed()\n            group_tokens =",
        "            group_tokens =",
    ),
    ("token ids leave no mark", "(token_ids)])\n            self._changed()", "(token_ids)])"),
    (
        "layers written over one another",
        "base = self._groups[position].base_lba + layer * self._layout.layer_lbas\n        return tail",
        "base = self._groups[position].base_lba\n        return tail",
    ),
)

_STORE = _of(
    "kvfs/store.py",
    (
        "deallocated before it is forgotten",
        "        self._catalogue.sync()\n        released = self._allocator.release()\n"
        "        if released:\n            self._namespace.deallocate(released)",
        "        released = self._allocator.release()\n        if released:\n"
        "            self._namespace.deallocate(released)\n        self._catalogue.sync()",
    ),
    (
        "nothing deallocated",
        "        if released:\n            self._namespace",
        "        if False:\n            self._namespace",
    ),
    (
        "flush leaves one out",
        "            for sequence in list(self._sequences.values()):\n                if sequence._dirty",
        "            for sequence in list(self._sequences.values())[1:]:\n                if sequence._dirty",
    ),
    ("renamed in memory only", "self._catalogue.rename_sequence(sequence._row.id, new_name)", "pass"),
    (
        "deleted blocks reused at once",
        "self._allocator.hold(*extent)\n        for sequence in sequences:",
        "self._allocator.give_back(*extent)\n        for sequence in sequences:",
    ),
    ("deletion forgets the tail", "            sequence._forget()\n", "            sequence._clear_tails()\n"),
    (
        "close does not flush",
        "                self.flush()\n                if self._catalogue.was_changed and",
        "                if self._catalogue.was_changed and",
    ),
    (
        "free space told with blocks taken",
        " and not self._extents_in_memory():",
        ":",
    ),
    ("leftovers of a power cut kept", "self._namespace.deallocate(self._allocator.free_extents)", "pass"),
    ("flush passes for done", "if self._catalogue.has_changes or", "if not self._catalogue.has_changes or"),
    ("attended tails leave memory", " and other not in self._attended:", ":"),
    (
        "sequences of the first model",
        "model for model in self._models.values() if model.id == row.model_id",
        "model for model in self._models.values() if model.id <= row.model_id",
    ),
)

_STORE += _of(
    "kvfs/store_blocks.py",
    (
        "held blocks reused before a sync",
        "            self._sync()  # what was freed",
        "            self._allocator.release()  # what was freed",
    ),
    (
        "refused groups leaked",
        "            for group in groups:\n                self._allocator.give_back",
        "            for group in groups[1:]:\n                self._allocator.give_back",
    ),
)

_STORE += _of(
    "kvfs/store.py",
    (
        "deleted before the catalogue agrees",
        "        with self._catalogue.transaction():\n            freed = [",
        "        for sequence in sequences:\n            sequence._forget()\n"
        "        with self._catalogue.transaction():\n            freed = [",
    ),
    (
        "blocks of the deleted leak",
        "        for extent in freed:\n            self._allocator.hold(*extent)\n"
        "        for sequence in sequences:",
        "        for sequence in sequences:",
    ),
)

_ATTENTION = _of(
    "kvfs/attention.py",
    (
        "host's part of attention dropped",
        "return merge_states(*state, out, lse) if sees_tail else state",
        "return state",
    ),
)

_ALLOCATOR = _of(
    "kvfs/allocator.py",
    (
        "extent too small",
        "if self._stops[index] - self._starts[index] >= num_lbas:",
        "if self._stops[index] - self._starts[index] >= num_lbas - 1:",
    ),
    (
        "last block handed out twice",
        "        self._starts[index] += count\n",
        "        self._starts[index] += count - (count > 6)\n",
    ),
    (
        "one extent never released",
        "for first_lba, num_lbas in released:",
        "for first_lba, num_lbas in released[1:]:",
    ),
    (
        "joined on the wrong side",
        "            self._starts[index] = first\n",
        "            self._starts[index] = stop\n",
    ),
)

_TOKEN_ROWS = _of(
    "kvfs/token_rows.py",
    (
        "last group not read",
        "num_groups = -(-stop // group_tokens)",
        "num_groups = stop // group_tokens",
    ),
)

_WRITE_BEHIND = [
    *_of(
        "kvfs/files/inode_table.py",
        (
            "rows before their data",
            "        self._behind.wait()  # no row may name what is not written\n"
            "        with self.data_lock:\n"
            "            for inode in self._changed.values():\n"
            "                self._behind.wait(inode)  # what has begun since\n",
            "        with self.data_lock:\n",
        ),
    ),
    *_of(
        "kvfs/files/file_data.py",
        (
            "read before it is written",
            "if is_behind and num_waits < MAX_WAITS:",
            "if False:",
        ),
        (
            "hole punched under writes",
            "            self._behind.wait(inode)\n            if end > inode.size and",
            "            if end > inode.size and",
        ),
        (
            "edges of what is being written",
            "            self._behind.wait(inode, min(first, inode.size // block_bytes), stop)\n",
            "",
        ),
    ),
]

_TAIL = _of(
    "kvfs/tail.py",
    ("part pages spilled", "stop_row -= stop_row % per_page", "pass"),
    (
        "image given back too early",
        "whole = self.num_spilled // self._layout.geometry.group_tokens\n        for",
        "whole = -(-self.num_spilled // self._layout.geometry.group_tokens)\n        for",
    ),
    (
        "whole image written for its end",
        "if first_page == 0 and stop_page == per_head:",
        "if stop_page == per_head:",
    ),
    ("part of a group written as all of it", "position * group_tokens >= self._first_token", "True"),
    ("spill ends a page late", "stop_page = -(-stop_row // per_page)", "stop_page = stop_row // per_page"),
)

_HOST = [
    *_of(
        "kvfs/attention_request.py",
        (
            "groups joined that are no neighbours",
            "extents[-1][0] + extents[-1][1] * group.num_lbas == group.base_lba",
            "extents[-1][0] < group.base_lba",
        ),
    ),
]

_SPDK_GLUE = [
    *_of(
        "spdk_glue/namespace.py",
        (
            "errors of commands ignored",
            '        if not completions["status"].any():\n            return',
            "        return",
        ),
        ("flush not sent", "self._run(command.flush(), [None])", "pass"),
        (
            "ranges deallocated short",
            'data["num_lbas"] = [count for _, count in batch]',
            'data["num_lbas"] = [count - 1 for _, count in batch]',
        ),
    ),
    *_of(
        "spdk_glue/controller.py",
        (
            "bad pages of a batch served",
            "            return False  # what it is, and whose",
            "            return True  # what it is, and whose",
        ),
        (
            "failures reported as success",
            "if request.status != Status.SUCCESS:\n                completion = completions",
            "if request.status is None:\n                completion = completions",
        ),
        (
            "error log without the block",
            "LBA_UNKNOWN if failure is None or failure.lba is None else failure.lba",
            "LBA_UNKNOWN",
        ),
    ),
]

_ACCEL = [
    *_of(
        "accel/block_commands.py",
        (
            "bad pages served",
            "                except CommandFailed as failure:\n"
            "                    request.fail(failure)\n\n    def _read",
            "                except CommandFailed:\n                    pass\n\n    def _read",
        ),
        ("flush acknowledged, not done", "            self._ftl.flush()", "            pass"),
        (
            "one range deallocated",
            "self._ftl.deallocate(pairs.astype(np.int64))",
            "self._ftl.deallocate(pairs.astype(np.int64)[:1])",
        ),
        (
            "corrupt page without its block",
            "raise CommandFailed(Status.UNRECOVERED_READ_ERROR, lba=error.lba, detail=",
            "raise CommandFailed(Status.UNRECOVERED_READ_ERROR, detail=",
        ),
    ),
    *_of(
        "accel/attention_unit.py",
        ("cache keeps erased pages", "ftl.on_erase(cache.drop)", "pass"),
    ),
    *_of(
        "accel/sealing.py",
        (
            "compaction mixes up blocks",
            "self._ftl.write(part, addresses,",
            "self._ftl.write(part, addresses[::-1].copy(),",
        ),
    ),
    *_of(
        "accel/merge.py",
        (
            "merged weights swapped",
            "weight_a * out_a[row, column] + weight_b",
            "weight_b * out_a[row, column] + weight_a",
        ),
    ),
]

_FTL = [
    *_of(
        "ftl/deallocation_log.py",
        (
            "last deallocation of a page lost",
            'header["num_records"] = len(held)',
            'header["num_records"] = max(len(held) - 1, 0)',
        ),
        ("oldest snapshot wins", "for number in sorted(parts, reverse=True):", "for number in sorted(parts):"),
    ),
    *_of(
        "ftl/mapping.py",
        ("overwritten pages counted as valid", "valid[old_superblock] -= 1", "valid[old_superblock] -= 0"),
        (
            "deallocated pages counted as valid",
            "            valid[page // pages_per_superblock] -= 1",
            "            valid[page // pages_per_superblock] -= 0",
        ),
        (
            "oldest version wins",
            "sequence_numbers[index] >= versions[lba]",
            "sequence_numbers[index] < versions[lba]",
        ),
        ("deallocations not recovered", "versions[lba] < sequence_number:", "versions[lba] > sequence_number:"),
    ),
    *_of(
        "ftl/collector.py",
        (
            "erased before the copies are durable",
            "        self._log.make_durable()\n        self.erase_replaced()",
            "        self.erase_replaced()",
        ),
    ),
    *_of(
        "ftl/page_writer.py",
        (
            "pages pass for durable when programmed",
            "state.session, state.durable_program_number)",
            "state.session, state.next_program_number)",
        ),
        ("one session for all", "record.session = session", "record.session = 1"),
        ("checksums not kept", "state.checksums.set(pages, oob)", "pass"),
        (
            "copies take the last free superblock",
            "state.superblocks.count(State.FREE) <= LOG_RESERVE:",
            "state.superblocks.count(State.FREE) < LOG_RESERVE:",
        ),
    ),
    *_of(
        "ftl/page_chain.py",
        (
            "another copy passes for what is gone",
            "return is_elsewhere & (is_same | ~is_exact)",
            "return is_elsewhere",
        ),
        ("refused pages taken for gone", " & was_accepted & (own[missed] > begun)", ""),
        (
            "what is gone passes for newer",
            'found["program_number"] -= np.maximum(previous["distance"][missed], 1)',
            'found["program_number"] -= 1',
        ),
    ),
    *_of(
        "ftl/oob.py",
        (
            "torn OOB believed",
            'found = (records["magic"] == OOB_MAGIC) & (records["oob_crc32c"] == crc32c_records(records))',
            'found = records["magic"] == OOB_MAGIC',
        ),
    ),
]

_FLASH_WRITES = [
    *_of(
        "ftl/page_writer.py",
        (
            "rows without parity after a flush",
            "            while found.is_busy:\n"
            "                self._state.changed.wait()\n"
            "            self.complete_row(found)\n"
            "\n",
            "            while found.is_busy:\n                self._state.changed.wait()\n\n",
        ),
        ("parity out of order", "order = np.argsort(pages)", "order = np.arange(len(pages))"),
        ("failed superblock goes on", "            found.abandon()\n", ""),
        (
            "failed superblock never moved",
            "            state.superblocks.retiring.add(failure.superblock)\n",
            "",
        ),
        (
            "failed blocks not marked",
            "        state.media.mark_bad(failure.superblock, failure.planes)\n",
            "",
        ),
        (
            "failed blocks written again",
            "        state.superblocks.planes_failed(failure.superblock, failure.planes)\n",
            "",
        ),
        ("failed superblock passes for empty", "        found.has_data = True\n", ""),
        ("copies pass for newer", "sequence_numbers[part]", "sequence_numbers[part] + np.uint64(50)"),
        (
            "programs under way pass for durable",
            "return min(self._programming, default=self._state.next_program_number) - 1",
            "return self._state.next_program_number - 1",
        ),
        ("each batch is the first", "if superblocks.first[superblock] == 0:", "if True:"),
        (
            "parity takes fill back",
            "superblocks.fill[superblock] = max(fill, superblocks.fill[superblock])",
            "superblocks.fill[superblock] = fill",
        ),
        (
            "newest page of a superblock not known",
            "        superblocks.newest[superblock] = last\n",
            "",
        ),
        (
            "full superblocks stay open",
            "                if not found.num_left:\n",
            "                if False:\n",
        ),
        (
            "row's parity over its rest",
            "self._state.counters.padding_pages += found.skip_row()",
            "pass",
        ),
        (
            "versions given twice",
            "version = self._state.new_sequence_numbers(len(pages))",
            "version = self._state.new_sequence_numbers(1)",
        ),
    ),
    *_of(
        "ftl/open_superblock.py",
        ("bad blocks written", "        usable[:, bad_planes] = False\n", ""),
        (
            "parity's places written with data",
            "            usable &= ~self.parity.is_parity.reshape(usable.shape)\n",
            "",
        ),
        (
            "tried again where it failed",
            "tried = int(self._order[self._position - 1]) + 1",
            "tried = int(self._order[0])",
        ),
        (
            "next row left out",
            "self._order, (row + 1) * self.parity.num_planes",
            "self._order, row * self.parity.num_planes",
        ),
        ("goes on over what is there", "np.searchsorted(self._order, fill)", "np.searchsorted(self._order, 0)"),
    ),
    *_of(
        "ftl/superblocks.py",
        (
            "erased superblock stays filled",
            "self.fill[superblock] = self.first[superblock]",
            "self.first[superblock]",
        ),
        (
            "no capacity for parity",
            "            good = good - np.count_nonzero",
            "            good - np.count_nonzero",
        ),
        ("superblock without blocks in use", "State.BAD if self.bad_planes[superblock].all() else", ""),
    ),
]

_PARITY = [
    *_of(
        "ftl/parity.py",
        ("sums of the row before", "        self._sums[:] = 0\n", ""),
        ("records' sums of the row before", "        self._oob_sums[:] = np.zeros((), PAGE_OOB)\n", ""),
        (
            "members not named",
            '        np.bitwise_or.at(oob_sums["member_dies"], slots, _bits(dies))\n',
            '        oob_sums["member_dies"][slots] = _bits(dies)\n',
        ),
        (
            "payload of earlier batches not summed",
            "self._sums[:], self._oob_sums[:] = sums[cut:], oob_sums[cut:]",
            "self._oob_sums[:] = oob_sums[cut:]",
        ),
        (
            "part row left without parity",
            "        if not self.is_begun:\n            return None\n        self._remember()",
            "        if True:\n            return None\n        self._remember()",
        ),
        (
            "page of an earlier life is a member",
            '        current[own[np.argmin(records["program_number"][member[own]])]] = False\n',
            "        pass\n",
        ),
        (
            "oldest parity counts",
            'parity[np.argsort(records["program_number"][parity])[::-1]]',
            'parity[np.argsort(records["program_number"][parity])]',
        ),
        (
            "whoever stands in the row is a member",
            "counted = older & (bits & wanted[place] != 0)",
            "counted = bits != 0",
        ),
        ("lives mixed by parity", 'fits = check == chosen["members_check"]', "fits = check == check"),
        (
            "upper half of program numbers lost",
            'found["program_number"] += number & ~LOWER_HALF',
            "pass",
        ),
        (
            "carry into the upper half lost",
            'found["program_number"] > number, LOWER_HALF + np.uint64(1), np.uint64(0)',
            'found["program_number"] > number, np.uint64(0), np.uint64(0)',
        ),
        (
            "checksums combined without that of zeros",
            "np.where(count % 2 == 0, crc_of_zeros, np.uint32(0))",
            "np.where(count % 2 == 0, np.uint32(0), np.uint32(0))",
        ),
        (
            "torn rows pass for covered",
            "np.setdiff1d(pages // geometry.num_dies, found.groups[found.lacking == 0])",
            "np.setdiff1d(pages // geometry.num_dies, found.groups)",
        ),
        (
            "parity of an earlier life counts",
            "            is_stale[place[newer]] = True\n",
            "            pass\n",
        ),
        (
            "lost page on the wrong die",
            "(groups[lost] * geometry.num_dies + die)",
            "(groups[lost] * geometry.num_dies)",
        ),
    ),
    *_of(
        "ftl/repair.py",
        ("page is its own neighbour", "    whole[index - first] = False\n", ""),
        ("parity not summed", "    summed[parity] = unwritten is None\n", ""),
        ("two damaged pages make a third", '[0] != lost["payload_crc32c"][0]:', "[0] is None:"),
        (
            "another's page given back",
            'if lost_pages.tolist() != [page] or int(lost["lba"][0]) != lba:',
            "if not len(lost_pages):",
        ),
        (
            "repaired page not handed over",
            "    copy_pages(np.array([destination], np.uint64), address, geometry.page_size)\n",
            "",
        ),
    ),
    *_of(
        "ftl/oob.py",
        (
            "earlier life beside what parity gives back",
            "held = ~np.isin(pages, lost_pages)",
            "held = np.ones(len(pages), bool)",
        ),
        ("lost records stay lost", "    if media.geometry.parity:\n", "    if False:\n"),
    ),
    *_of(
        "ftl/scrub.py",
        ("scrubbed but not renewed", "if damaged and not ftl.media.read_only:", "if False:"),
        ("lost pages not told", "            report.lost.append(lba)\n", ""),
        ("repaired pages not told", "            report.repaired.append(lba)\n", ""),
        (
            "renews the wrong superblock",
            "damaged.add(int(pages[position]) // ftl.geometry.pages_per_superblock)",
            "damaged.add(int(pages[0]) // ftl.geometry.pages_per_superblock)",
        ),
        ("scrub ends at the first repair", "if ftl.counters.repaired_pages == before:", "if True:"),
    ),
]

_COLLECTION = [
    *_of(
        "ftl/collector.py",
        (
            "erased under readers",
            "ready = [entry for entry in self._erasing if state.guards.is_past(entry[1])]",
            "ready = list(self._erasing)",
        ),
        (
            "superblock with damaged records erased",
            "        if state.mapping.valid_pages[victim]:\n            # pages",
            "        if False:\n            # pages",
        ),
        (
            "superblock with damaged pages erased",
            "            self._quarantine(victim, error)\n            return False",
            "            state.mapping.valid_pages[victim] = 0",
        ),
        (
            "failed erases not marked",
            "                state.media.mark_bad(superblock, failure.planes)\n",
            "",
        ),
        (
            "unerased blocks written",
            "                state.superblocks.planes_failed(superblock, failure.planes)\n",
            "",
        ),
        (
            "no parity for what a power cut left",
            "            chosen = np.isin(pages // num_dies, groups)\n",
            "            chosen = np.isin(pages // num_dies, groups[:0])\n",
        ),
        (
            "copies of the first pages only",
            "            position = int(chosen[-1]) + 1\n",
            "            position = len(pages)\n",
        ),
        (
            "metadata erased and kept",
            "        self._log.replaced.clear()\n",
            "        self._log.replaced[1:] = []\n",
        ),
        (
            "emptied superblocks never erased",
            "            self._erasing.append((superblock, self._state.guards.next_epoch()))\n        return",
            "            pass\n        return",
        ),
    ),
    *_of(
        "ftl/mapping.py",
        (
            "copy outdoes what was written meanwhile",
            "        if np.int64(entries[lbas[index]]) - 1 != old_pages[index]:\n",
            "        if False:\n",
        ),
        (
            "copies counted where they were",
            "        valid[old_pages[index] // pages_per_superblock] -= 1\n",
            "        valid[old_pages[index] // pages_per_superblock] -= 0\n",
        ),
        (
            "unmapped ranges one short",
            "edges[1::2] - edges[::2]], axis=1)",
            "edges[1::2] - edges[::2] - 1], axis=1)",
        ),
        ("valid pages not counted after recovery", "        self.valid_pages[:] = counts\n", ""),
    ),
    *_of(
        "ftl/read_guard.py",
        ("readers of the same instant not waited for", "all(active > epoch", "all(active >= epoch"),
        ("readers never leave", "            del self._active[guard]\n", ""),
        (
            "readers not counted",
            "        self._active[guard] = self._epoch\n",
            "        self._active[guard] = self._epoch + 1\n",
        ),
    ),
    *_of(
        "ftl/garbage_collection.py",
        ("quarantined superblocks collected", "dead[valid_pages[dead] == 0]", "dead"),
        ("what has failed not moved first", "    if retiring:\n", "    if False:\n"),
        (
            "full ones collected for nothing",
            "rows * row_pages < superblocks",
            "rows * 0 < superblocks",
        ),
        (
            "rows padded with what was gained",
            "rows = -(-valid_pages[candidates] // row_pages)",
            "rows = valid_pages[candidates] // row_pages",
        ),
    ),
    *_of(
        "ftl/translation.py",
        (
            "unmapped blocks show what was there",
            "zero_pages(destinations[~mapped], self.page_size)",
            "pass",
        ),
        (
            "failed superblocks forgotten with what they hold",
            "                if state.mapping.valid_pages[superblock]:\n",
            "                if False:\n",
        ),
        (
            "what earlier sessions made durable forgotten",
            "state.earlier_sessions = found.durable_numbers",
            "state.earlier_sessions = {}",
        ),
        ("superseded logs kept", "self._log.replaced += self._of_log(found.superseded_log)", "_ = []"),
        ("open superblocks not renewed", "            self._writer.close(superblocks or found.damaged)\n", ""),
        ("session used again", "state.session = found.session", "state.session = max(1, found.session - 1)"),
        (
            "versions from the start",
            "state.next_sequence_number = found.next_sequence_number",
            "state.next_sequence_number = 1",
        ),
        (
            "log lost at opening",
            "self._of_log(found.log_superblocks) if found else []",
            "[]",
        ),
        (
            "rows cut short by a failure left",
            "            self._collector.finish_retiring()  # a row",
            "            pass  # a row",
        ),
        (
            "damage forgotten",
            "            self._state.superblocks.damaged.add(page // self.geometry.pages_per_superblock)\n",
            "",
        ),
        (
            "deallocations in memory only",
            "                    self._log.deallocated(first, count, state.new_sequence_numbers(1))\n",
            "                    pass\n",
        ),
        (
            "older deallocations lose to writes",
            "state.new_sequence_numbers(1))\n            state.pressure",
            "state.next_sequence_number - 1)\n            state.pressure",
        ),
    ),
]

_FLASH_METADATA = [
    *_of(
        "ftl/metadata_log.py",
        (
            "snapshot before what it leaves out",
            "        self.sync()\n        records = np.zeros",
            "        records = np.zeros",
        ),
        (
            "old log erased before the new one is durable",
            "            self._log.complete_row()\n        self.sync()\n",
            "            self._log.complete_row()\n",
        ),
        (
            "old log erased before the new one has parity",
            "        if state.geometry.parity:\n            self._log.complete_row()\n        self.sync()\n",
            "        self.sync()\n",
        ),
        (
            "durable only after the next one",
            "            durable = min(finished, state.first_begun_number() - 1)\n",
            "            durable = state.next_program_number - 1\n",
        ),
        (
            "durable without parity",
            "durable = min(finished, state.first_begun_number() - 1)",
            "durable = finished",
        ),
        (
            "log row without parity",
            "_rows()\n                self._log.complete_row()\n            self.sync()\n            if",
            "_rows()\n            self.sync()\n            if",
        ),
        (
            "checkpoint of rows without parity",
            "for protected\n                self._writer.complete_rows()\n",
            "for protected\n",
        ),
        (
            "nothing to sync behind a program under way",
            "if self._synced_program_number < state.next_program_number - 1:",
            "if state.durable_program_number < finished:",
        ),
        (
            "media not synced",
            "                state.media.sync()\n",
            "                pass\n",
        ),
        (
            "checkpoint before what it holds is durable",
            "            self.sync()\n            with state.unlocked():",
            "            with state.unlocked():",
        ),
        (
            "deallocations in the checkpoint only",
            "            self._append_pending()  # the map",
            "            pass  # the map",
        ),
        (
            "log passes for closed",
            '        table["is_closed"][self._log.superblocks[-1:]] = 0\n',
            "",
        ),
        (
            "open superblocks pass for closed",
            'table["is_closed"] = np.isin(superblocks.states, (State.FULL,',
            'table["is_closed"] = np.isin(superblocks.states, (State.OPEN, State.FULL,',
        ),
        (
            "old checkpoint never erased",
            "            self.replaced.extend(self._checkpoint_superblocks)\n"
            "            self._checkpoint_superblocks = taken",
            "            self._checkpoint_superblocks = taken",
        ),
        ("old log never erased", "            self.replaced.append(superblock)\n", ""),
        (
            "new checkpoint forgotten",
            "            self._checkpoint_superblocks = taken_by.superblocks\n",
            "",
        ),
        (
            "deallocations not noted",
            "        self._pending.append((first_lba, num_lbas, sequence_number))\n",
            "",
        ),
        (
            "failed log goes on",
            "                self._writer.retire(failure, found)  # its pages",
            "                pass  # its pages",
        ),
        (
            "mark without the pages before it",
            "            self._marked_program_number = state.next_program_number - 1\n",
            "            state.durable_program_number = state.next_program_number - 1\n",
        ),
    ),
    *_of(
        "ftl/checkpoint.py",
        (
            "checkpoint knows one deallocation too many",
            'headers["sequence_number"] = checkpoint.sequence_number',
            'headers["sequence_number"] = checkpoint.sequence_number + 1',
        ),
        (
            "checkpoint knows one program too many",
            'headers["program_number"] = checkpoint.program_number',
            'headers["program_number"] = checkpoint.program_number + 1',
        ),
        (
            "map unpacked without its runs",
            "np.cumsum(np.frombuffer(piece, entry_dtype), dtype=entry_dtype)",
            "np.frombuffer(piece, entry_dtype)",
        ),
    ),
    *_of(
        "ftl/recovery.py",
        (
            "torn pages believed",
            '        good[part] = crc32c == records["payload_crc32c"][part]\n',
            "",
        ),
        (
            "sessions taken for one",
            'return records["program_number"] > newest[which]',
            'return records["program_number"] > newest.max(initial=0)',
        ),
        (
            "programs behind the checkpoint pass for durable",
            "[(found.checkpoint.session, found.checkpoint.program_number)]",
            "[(found.checkpoint.session, found.checkpoint.program_number + 100)]",
        ),
        (
            "failed pages believed",
            "    doubtful = doubtful | media.bad_blocks()[superblocks, indices % media.geometry.num_planes]\n",
            "",
        ),
        (
            "copies do not make up for what is gone",
            "        lost, lost_pages = lost[is_lost], lost_pages[is_lost]\n",
            "",
        ),
        (
            "newest version given again",
            "int(versions.max(initial=0)) + 1)",
            "int(versions.max(initial=0)))",
        ),
        (
            "newest program number given again",
            'int(records["program_number"].max(initial=0)) + 1',
            'int(records["program_number"].max(initial=0))',
        ),
        (
            "newest session goes on",
            'int(records["session"].max(initial=0)) + 1)',
            'int(records["session"].max(initial=0)))',
        ),
        (
            "versions of what only parity knows given again",
            "        _number_behind(found, by_parity)\n",
            "",
        ),
        (
            "log pages that only parity knows not noticed",
            "        found.log_superblocks += sorted("
            "with_log - {*found.log_superblocks, *found.checkpoint_superblocks})\n",
            "",
        ),
        (
            "log taken for superseded by its own snapshot",
            '    first = records["program_number"][snapshot].min()\n',
            '    first = records["program_number"].max() + np.uint64(1)\n',
        ),
        (
            "originals outdo their copies",
            "    records, pages = records[order], pages[order]\n    data =",
            "    records, pages = records[order[::-1]], pages[order[::-1]]\n    data =",
        ),
        (
            "records from parity outdo newer copies",
            "np.concatenate([lost, records]), np.concatenate([lost_pages, pages])\n"
            "    # a copy is programmed after its original: of equal versions it comes last, and counts\n"
            '    order = np.argsort(records["program_number"], kind="stable")\n'
            "    records, pages = records[order], pages[order]\n",
            "np.concatenate([records, lost]), np.concatenate([pages, lost_pages])\n",
        ),
        (
            "deallocations before the checkpoint again",
            "            if sequence_number < from_number:\n",
            "            if False:\n",
        ),
        (
            "data before the checkpoint again",
            '        data &= records["program_number"] > found.checkpoint.program_number\n',
            "        pass\n",
        ),
        (
            "superblocks of another life taken over",
            '    same &= (table["first_program_number"] <= numbers)'
            ' & (numbers <= table["newest_program_number"])\n',
            "",
        ),
        (
            "open superblocks not scanned",
            '    known = same & (table["is_closed"] != 0)\n',
            "    known = same\n",
        ),
        ("open superblocks not taken over", "    alive[superblocks[same]] = True\n", ""),
        ("known superblocks not taken over", "    alive[known] = True\n", ""),
        (
            "data beside an old log erased with it",
            "        superblocks[:] = [s for s in superblocks if not mapping.valid_pages[s]]\n",
            "        pass\n",
        ),
        (
            "superblock goes on at its start",
            "on_good[-1] + 1 if len(on_good)",
            "on_good[0] + 1 if len(on_good)",
        ),
        (
            "page given back lies behind the end",
            "        np.maximum.at(found.fill, superblocks, indices + 1)\n",
            "",
        ),
        (
            "log page not given back",
            '        whole[position] = repair_page(media, page, int(record["lba"]), address)\n',
            "",
        ),
        (
            "first page of the log not read",
            "    log_content = _read_log(media, log_records, log_pages)\n",
            "    log_content = _read_log(media, log_records[1:], log_pages[1:])\n",
        ),
        (
            "torn rows not noticed",
            "found.unprotected_groups = np.intersect1d(begun_groups, weak)",
            "pass",
        ),
    ),
    *_of(
        "ftl/check.py",
        (
            "pages of the log pass for data",
            "HOLDS_DATA = (State.OPEN,",
            "HOLDS_DATA = (State.LOG, State.OPEN,",
        ),
        (
            "pages mapped twice pass",
            "np.flatnonzero(np.diff(pages[order]) == 0)",
            "np.flatnonzero(np.diff(pages[order]) < 0)",
        ),
        (
            "counts of valid pages pass",
            "np.flatnonzero(counted[: len(valid_pages)] != valid_pages)",
            "np.flatnonzero(counted[: len(valid_pages)] > valid_pages)",
        ),
        (
            "free superblocks pass for erased",
            "        if states[superblock] == State.FREE:\n",
            "        if False:\n",
        ),
        (
            "records of other blocks pass",
            "    wrong[known] = record_lbas[place[known]] != lbas[known]\n",
            "    wrong[known] = False\n",
        ),
        (
            "older versions pass",
            'better = (records["sequence_number"] > known) |',
            'better = (records["sequence_number"] < known) |',
        ),
    ),
]

_REPAIR = [
    *_of(
        "kvfs/repair.py",
        (
            "cut short by one group",
            "num_groups = -(-num_tokens // group_tokens)",
            "num_groups = num_tokens // group_tokens",
        ),
        ("token ids of lost tokens kept", "catalogue.tokens(row.id)[:num_tokens]", "catalogue.tokens(row.id)"),
        ("lost groups kept", "catalogue.groups(row.id)[:num_groups]", "catalogue.groups(row.id)"),
        (
            "tail of lost tokens kept",
            "        tail_lba=0,\n        tail_lbas=0,\n",
            "        tail_lba=row.tail_lba,\n        tail_lbas=row.tail_lbas,\n",
        ),
        ("mended in memory only", "        catalogue.sync()  # before", "        pass  # before"),
        ("given back by old rows", "        inspection.look_again()\n", ""),
        ("leftovers kept", "        inspection.namespace.deallocate(now.leaked)\n", ""),
        ("lost blocks kept", "        inspection.namespace.deallocate(unused)\n", ""),
        (
            "damaged pages not written anew",
            "wrote {inspection.flash.renew()} superblocks",
            "wrote {0} superblocks",
        ),
        ("given back until the power fails", "    inspection.namespace.flush()\n", ""),
        (
            "forks cut inside a group they share",
            "if num_tokens % group_tokens and sum(",
            "if False and sum(",
        ),
        ("damage not cut off", "            num_tokens = _cut(inspection, row, num_tokens)\n", ""),
    ),
    *_of(
        "kvfs/check.py",
        (
            "lost pages cost no tokens",
            "            report.lose(whose)\n        if progress",
            "        if progress",
        ),
        ("nothing found leaked", "report.leaked = _runs(mapped & ~named)", "report.leaked = []"),
    ),
    *_of(
        "kvfs/metadata.py",
        ("wrong counts kept", "WHERE reference_count != {links}", "WHERE reference_count < {links}"),
        (
            "rows of nobody kept",
            'for table in ("sequence_group", "token_chunk", "sequence_attribute"):',
            'for table in ("sequence_group",):',
        ),
        (
            "groups of nobody kept",
            '            self._db.execute(f"DELETE FROM kv_group WHERE id NOT IN {_LINKED}")\n',
            "",
        ),
    ),
    *_of(
        "kvfs/block_owners.py",
        (
            "tail's tokens counted short",
            "max(num_tokens, 0) * layout.geometry.token_bytes // layout.page_size",
            "max(num_tokens - 1, 0) * layout.geometry.token_bytes // layout.page_size",
        ),
    ),
]

_FILES = [
    *_of(
        "kvfs/files/file_data.py",
        (
            "a gap before written bytes shows what was there",
            "offset > inode.size:\n                self._zero_behind_end(inode)\n            pieces",
            "False:\n                pass\n            pieces",
        ),
        (
            "a file made longer shows what was there",
            "            if size > inode.size:\n                self._zero_behind_end(inode)\n            with",
            "            with",
        ),
        (
            "bytes beside those written lost",
            "            lba = inode.extents.lba(block) if",
            "            lba = None if",
        ),
        (
            "a hole too long",
            "        first, stop = -(-offset // block_bytes), end //",
            "        first, stop = offset // block_bytes, end //",
        ),
    ),
    *_of(
        "kvfs/files/inode_table.py",
        (
            "freed blocks of files handed out at once",
            "        for extent in leaving:\n            self._store._allocator.hold(*extent)",
            "        for extent in leaving:\n            self._store._allocator.give_back(*extent)",
        ),
        (
            "freed blocks of files lost",
            "        for extent in leaving:\n",
            "        for extent in leaving[1:]:\n",
        ),
        (
            "files that were deleted while open stay",
            "            self._remove(orphan)",
            "            pass",
        ),
        ("extents of files not stored", "            self._rows.store_extents(*change)", "            pass"),
        (
            "changed inodes not stored",
            "        self._rows.store_inodes(inodes)",
            "        self._rows.store_inodes(inodes[1:])",
        ),
        (
            "unlinked files gone while open",
            "        if inode.is_in_use or inode.id == ROOT_INODE:",
            "        if inode.id == ROOT_INODE:",
        ),
    ),
    *_of(
        "kvfs/files/file_system.py",
        (
            "sync of a file forgets the catalogue",
            "                self._store._sync()\n                return",
            "                pass",
        ),
    ),
    *_of(
        "kvfs/files/names.py",
        (
            "a file replaced by renaming stays",
            "        if target is not None:\n            self._unlinked(now, new_folder, target)",
            "        pass",
        ),
        (
            "an old name stays after renaming",
            "            self._rows.remove_entry(folder.id, name)\n        elif",
            "        elif",
        ),
    ),
    *_of(
        "kvfs/batch.py",
        ("batches end without what is pending", "            self.pending.write_pending()\n", ""),
    ),
]

_ZONES = [
    *_of(
        "ftl/zoned_blocks.py",
        (
            "zone emptied before its copies are durable",
            "        zones.flush()\n        self._reset(victim)",
            "        self._reset(victim)",
        ),
        (
            "zeros left behind in a zone that is emptied",
            "            self._append(runs[start : start + ZONE_EXTENTS_MAX], is_copy=True)",
            "            pass",
        ),
        (
            "torn records of tables believed",
            'if crc32c != header["blocks_crc32c"] or number <= newest:',
            "if number <= newest:",
        ),
        ("half-emptied zone kept", "                dead = [newest]\n", "                return\n"),
        (
            "what opening found is not durable",
            "            zones.flush()  # what is found",
            "            pass  # what is found",
        ),
        (
            "records by zone, not by age",
            "        records.sort(key=lambda record: record.sequence_number)\n",
            "",
        ),
        (
            "half-written block left before a record",
            "        zones.pad(zone, fill * BLOCK_BYTES)\n",
            "",
        ),
        (
            "several zones of tables stay active",
            "            self._open = newest\n        self._finish_others()",
            "            self._open = newest",
        ),
        (
            "record numbers given twice",
            "        self._sequence_number = records[-1].sequence_number",
            "        self._sequence_number = records[0].sequence_number",
        ),
        (
            "torn records become whole when their zone is finished",
            "                self._zones.pad(zone, min(written + BLOCK_BYTES, capacity))\n",
            "",
        ),
    ),
    *_of(
        "ftl/media_zoned.py",
        (
            "missing pages of a zone left to look like zeros",
            "                self._backing.pad(superblock, _num_recorded(super().read_oob(superblock)))",
            "                pass",
        ),
        (
            "zones without OOB not reset",
            "                self._backing.reset(superblock)\n            elif",
            "                pass\n            elif",
        ),
        (
            "written pages without OOB pass for erased",
            '            records["magic"][recorded : self._backing.pages_written(superblock)] = OOB_MAGIC\n',
            "",
        ),
        (
            "pages read that were not written",
            "there = (indices + 1) * self._page_size <= self._zones.written[zones]",
            "there = self._zones.written[zones] >= 0",
        ),
        (
            "full superblocks stay active",
            "            if indices[-1] + 1 == self._per_superblock:",
            "            if False:",
        ),
        (
            "worn zones used again",
            "                self.mark_bad(superblock, THE_PLANE)",
            "                pass",
        ),
        (
            "worn zone passes for a broken drive",
            "            if self._zones.is_usable[zone]:\n                raise",
            "            if True:\n                raise",
        ),
    ),
    *_of(
        "ftl/zones.py",
        ("padding of zeros", "    memory.reshape(-1, BLOCK_BYTES)[:] = PAD", "    memory[:] = 0"),
    ),
]

_FREE_SPACE = _of(
    "kvfs/free_space.py",
    (
        "a change leaves the summary",
        '("INSERT", "DELETE", f"UPDATE OF {columns}")',
        '("DELETE", f"UPDATE OF {columns}")',
    ),
    ("stale summary believed", "return None if packed is None", "return [] if packed is None"),
)

_DRIVE_SET = [
    *_of(
        "kvfs/drive_set/part_record.py",
        ("two pasts mixed", "if unseen and unseen[0].num_tokens <= start.num_tokens:", "if False:"),
        (
            "token ids that a recovery cut off",
            "unseen[0].num_tokens <= start.num_tokens",
            "unseen[0].num_tokens < start.num_tokens",
        ),
        (
            "oldest cut instead of deepest",
            "self.cuts[-1].num_tokens >= num_tokens",
            "self.cuts[-1].num_tokens < 0",
        ),
    ),
    *_of(
        "kvfs/drive_set/set_sequence.py",
        ("truncation is no epoch", "        self._part_history.cut(num_tokens, len(token_ids))\n", ""),
        ("epoch not stored with the tokens", "part._state_notes[SET_STATE] = note", "pass"),
        ("token ids differ after a cut", "if len(part._tokens) != len(token_ids):", "if False:"),
        ("copy not truncated", "            self._move.cut(num_tokens)", "            pass"),
    ),
    *_of(
        "kvfs/drive_set/flushing.py",
        (
            "names of other drives not flushed",
            "            or member.store._catalogue.has_changes\n",
            "",
        ),
    ),
    *_of(
        "kvfs/drive_set/taking_up.py",
        ("parts left at different lengths", "if None not in kept and not are_even(states):", "if False:"),
        (
            "half a creation stays",
            "            self._members[part.drive_id].store.delete_sequence(part.row.name)",
            "            pass",
        ),
    ),
    *_of(
        "kvfs/drive_set/recovery.py",
        ("first copy instead of last", "max(firsts, key=lambda part", "min(firsts, key=lambda part"),
        ("half deleted served", "            if firsts:\n                return None\n", ""),
    ),
    *_of(
        "kvfs/drive_set/part_settings.py",
        ("parts of other heads", "{place.first_head},{place.stop_head},", "0,1,"),
    ),
    *_of(
        "kvfs/drive_set/set_prefixes.py",
        ("longest of the drives", "            return min(found[place]", "            return max(found[place]"),
        (
            "dropped prefixes come back",
            "self._missed.setdefault(member.drive_id, []).append(is_chosen)",
            "pass",
        ),
    ),
    *_of(
        "kvfs/drive_set/missed_deletions.py",
        (
            "deletions of caches forgotten",
            "of_all = {Deletion(cache), EVERYTHING} & missed.keys()",
            "of_all = set()",
        ),
        ("all deletions kept out", "            missed[EVERYTHING] = None", "            pass"),
    ),
    *_of(
        "kvfs/drive_set/set_objects.py",
        ("objects of drives that are behind", "            self._forget_all(member.store)\n", ""),
        ("doubles of a drive that returns", "{*part.keys()} & {*other", "set() & {*other"),
        ("what was missed is not known", "            if new:\n", "            if False:\n"),
        ("caps of a drive that returns", "        self._take_caps(store, others)\n", ""),
    ),
    *_of(
        "kvfs/drive_set/set_object_cache.py",
        (
            "deletions on lost drives",
            "                if member not in parts:\n                    for",
            "                if False:\n                    for",
        ),
        ("deleted elsewhere is not durable", "        self._objects.claim(self, [", "        list(["),
    ),
    *_of(
        "kvfs/drive_set/moving.py",
        (
            "copy named before it is durable",
            "            self.copy.flush()\n            with",
            "            with",
        ),
        (
            "what has moved is published no more",
            "            if publication is not None:",
            "            if False:",
        ),
        (
            "old copy deleted before the new one counts",
            "                self._is_switched(record)\n                store._sync_if_needed()\n        with",
            "                self._is_switched(record)\n        with",
        ),
        ("copy without the truncations", "self.copy._state_notes[SET_STATE] =", "_ ="),
    ),
]

_PREFIX = [
    *_of(
        "kvfs/prefix/hashing.py",
        ("names tell nothing of the groups before", "person=last)", 'person=b"")'),
        ("each flush begins a neighbourhood", "if position % NEIGHBOURS == 0:", "if start == 0:"),
        ("salts that everybody knows", "secrets.token_bytes(SALT_BYTES)", "bytes(SALT_BYTES)"),
    ),
    *_of(
        "kvfs/prefix/prefix_catalogue.py",
        ("entries outlive their group", "WHERE group_id = OLD.id;", "WHERE group_id = -1;"),
        ("publications outlive their sequence", "WHERE sequence_id = OLD.id;", "WHERE sequence_id = -1;"),
        (
            "shared groups not counted",
            "reference_count = reference_count + 1",
            "reference_count = reference_count",
        ),
        ("token ids of what is not shared", "substr(token_ids, 1, 4 * (?3 - position))", "token_ids"),
        ("tokens restored to be written again", "num_tokens = ?1, num_spilled = ?1", "num_tokens = ?1"),
        (
            "found before all layers are stored",
            "num_groups = min(num_spilled, len(token_ids)) // group_tokens",
            "num_groups = len(token_ids) // group_tokens",
        ),
        (
            "found before its last tokens are stored",
            "num_groups = min(num_spilled, len(token_ids)) // group_tokens",
            "num_groups = -(-min(num_spilled, len(token_ids)) // group_tokens)",
        ),
        (
            "each flush begins a chain",
            "names = hashing.chain(scope.salt, last[1], first, tokens, 4 * group_tokens)",
            "names = scope.chain(tokens)",
        ),
        (
            "groups behind a damaged one found",
            "later.position > first.position",
            "later.position < first.position",
        ),
        (
            "the damaged are published again",
            "DELETE FROM prefix_publication WHERE sequence_id IN",
            "SELECT 1 WHERE 0 IN",
        ),
    ),
    *_of(
        "kvfs/prefix/index.py",
        ("failed reads forgotten", "self._suspects.add(lba)", "pass"),
        ("tokens not compared", "if compare and (stored :=", "if not compare and (stored :="),
        ("whole prompts found one group short", "            return high\n", "            return high - 1\n"),
        (
            "first group never asked for",
            "if not names or not self._catalogue.has(scope.id, names[0]):",
            "if not names:",
        ),
        ("damaged groups found", "return bool(self._namespace.lost(first_lba, num_lbas))", "return False"),
    ),
    *_of(
        "kvfs/prefix/reuse.py",
        (
            "restored sequence empty in memory",
            "                del self._sequences[name]",
            "                pass",
        ),
        ("another model's prompt", "self._models.get(model.name) is not model:", "False:"),
    ),
]

_OBJECTS = [
    *_of(
        "kvfs/objects/object_caches.py",
        (
            "blocks of objects free before their rows are gone",
            "            self._store._allocator.hold(*extent)",
            "            self._store._allocator.give_back(*extent)",
        ),
        (
            "objects that are gone keep their rows",
            "self._catalogue.write([*changes.deleted], uses)",
            "self._catalogue.write([], uses)",
        ),
        (
            "a full catalogue leaves the rows of what was replaced",
            "        self._catalogue.write([*changes.added], ())\n",
            "",
        ),
        (
            "rows of objects go with another's transaction",
            "if self._store._catalogue.is_in_transaction:",
            "if False:",
        ),
        ("changes of objects do not ask for a sync", "changes.added or changes.deleted or", "False or"),
    ),
    *_of(
        "kvfs/objects/cache_index.py",
        ("an object beside the one it replaces", "            found.id = before.id\n", ""),
        (
            "the cap is exceeded by a block",
            "while self.used_lbas > limit:",
            "while self.used_lbas > limit + 1:",
        ),
        (
            "a deletion forgotten that was not yet a row",
            "        self.deleted[found.id] = None  #",
            "        #",
        ),
    ),
    *_of(
        "kvfs/objects/use_order.py",
        ("the last used is evicted", "return self._later[_ENDS] - 1", "return self._earlier[_ENDS] - 1"),
    ),
    *_of(
        "kvfs/objects/object_data.py",
        ("the last block of an object from another place", "(done + direct - num_direct)", "(done + direct)"),
        ("the end of an object not copied", "part[:] = lease[: part.nbytes]", "pass"),
    ),
]

_SEALING = [
    *_of(
        "kvfs/sealing/sealing.py",
        (
            "a segment of groups that were given up meanwhile",
            "        if not self._is_current(work):\n            self._give_back()\n",
            "        if False:\n            self._give_back()\n",
        ),
        (
            "blocks of a segment that was not made are lost",
            "            self._store._allocator.hold(*self._under_way)\n",
            "",
        ),
        (
            "blocks of replaced segments free before their rows are gone",
            "        for extent in replaced:\n            self._store._allocator.hold(*extent)",
            "        for extent in replaced:\n            self._store._allocator.give_back(*extent)",
        ),
        (
            "segments without rows stay when their groups go",
            "if one.first_group + one.num_groups > num_groups",
            "if one.first_group > num_groups",
        ),
        (
            "segments of groups that a truncation has given up",
            "if row.position < len(groups) and groups[row.position].id == row.group_id",
            "if row.position < len(groups)",
        ),
        (
            "room made in a transaction that may be taken back",
            "            return False  # it might be taken back",
            "            pass",
        ),
        (
            "given up, and never free",
            "        for extent in extents:\n            self._store._allocator.hold(*extent)",
            "        pass",
        ),
    ),
    *_of(
        "kvfs/sealing/derived_catalogue.py",
        (
            "short segments dropped that a fork still needs",
            " AND its.reference_count = whole.reference_count",
            "",
        ),
        (
            "short segments stay beside longer ones",
            'shorter.position < last.position"',
            'shorter.position < 0"',
        ),
        (
            "given up in memory only",
            'self._db.executemany("DELETE FROM derived_segment WHERE id = ?", [(row[0],) for row in rows])',
            "pass",
        ),
        (
            "blocks go with a trigger, to nobody",
            '            return self._take("group_id = ?", (group_id,))',
            "            return []",
        ),
    ),
    *_of(
        "kvfs/sealing/commands.py",
        ("every layer's share at the first's", "target + first * derived.layer_lbas", "target"),
        ("the first layers' groups again", "np.uint64(first * layout.layer_lbas)", "np.uint64(0)"),
    ),
    *_of(
        "accel/sealing.py",
        (
            "a head's refinements where the next one's are",
            "first = layout.refinement_lba(0, head)",
            "first = layout.refinement_lba(0, 0)",
        ),
        ("layers written over each other", "segment.target + layout.layer_lbas * layer", "segment.target"),
    ),
]

_CAPS = [
    *_of(
        "kvfs/space/space.py",
        ("tail records are free", "+ max(tail_lbas, stored_tail_lbas)", "+ 0"),
        ("a stored tail record is free", "max(tail_lbas, stored_tail_lbas)", "tail_lbas"),
        (
            "what is cut off is free before that is stored",
            "            if more > 0:  # what was cut off is",
            "            if True:  # what was cut off is",
        ),
        ("charges of the deleted stay", "            self._add(charge.account, -charge.lbas)\n\n", "\n"),
        (
            "a new tenant's cap is not asked",
            "self.make_room((sequence.model.id, tenant), charge.lbas, {sequence.id}, leaving=charge.account)",
            "pass",
        ),
        (
            "a cap before what is above it is evicted",
            "        self.evict(quota, quota.capacity_bytes)\n        self._catalogue.set_quota(quota)\n",
            "        self._catalogue.set_quota(quota)\n",
        ),
    ),
    *_of(
        "kvfs/space/caps.py",
        ("more than the cap", "            if used <= capacity:\n", "            if used <= capacity + 1:\n"),
        (
            "evicted though it is refused",
            "            if used > capacity:\n",
            "            if used > 2 * capacity:\n",
        ),
        ("who asks is evicted for itself", "{*victims, *keep})", "{*victims})"),
    ),
    *_of(
        "kvfs/space/space_catalogue.py",
        ("pinned ones are evicted", " AND tenant = ? AND is_kept = 0", " AND tenant = ?"),
        ("expired though pinned", "ttl_s IS NOT NULL AND NOT is_kept AND {end}", "ttl_s IS NOT NULL AND {end}"),
    ),
    *_of(
        "kvfs/space/set_space.py",
        (
            "owners on lost drives are asked for",
            "owner = owners.get((record.parts[0].drive_id, record.of(0).member_name))",
            "owner = self.sequence(row.name).attributes().get(OWNER)",
        ),
    ),
    *_of(
        "kvfs/space/set_caps.py",
        (
            "a copy on its way is free",
            "    return 0 if sequence._move is None else",
            "    return 0 if True else",
        ),
        (
            "halves of sequences on lost drives go",
            "            if not charge.is_kept and self._is_there(charge):",
            "            if not charge.is_kept:",
        ),
        (
            "what comes back is above the cap",
            "        for quota in self.quotas:\n            self.evict(quota",
            "        for quota in ():\n            self.evict(quota",
        ),
    ),
]


MUTATIONS = [
    *_METADATA_VFS,
    *_METADATA,
    *_SEQUENCE,
    *_STORE,
    *_ATTENTION,
    *_ALLOCATOR,
    *_TOKEN_ROWS,
    *_WRITE_BEHIND,
    *_TAIL,
    *_HOST,
    *_SPDK_GLUE,
    *_ACCEL,
    *_FTL,
    *_FLASH_WRITES,
    *_PARITY,
    *_COLLECTION,
    *_FLASH_METADATA,
    *_REPAIR,
    *_ZONES,
    *_FILES,
    *_FREE_SPACE,
    *_DRIVE_SET,
    *_PREFIX,
    *_OBJECTS,
    *_SEALING,
    *_CAPS,
]
assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
