"""Lines broken on purpose, each as an engineer might break it: what would be lost if it came to users.

What no simulation without threads and without failing media can see (waiting for spills, reader guards, locks)
is not in here; it has tests of its own.
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
        'self._db.execute("DELETE FROM token_chunk WHERE sequence_id = ?", (row.id,))',
        "pass",
    ),
    (
        "transactions pass for durable",
        '            self._db.execute("COMMIT")\n            self.is_durable = False',
        '            self._db.execute("COMMIT")',
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
        "catalogue never synced",
        "        self._volume.sync()\n        self.is_durable = True",
        "        self.is_durable = True",
    ),
    (
        "tail place not stored",
        "(row.changed_ns, row.num_tokens, row.num_spilled, row.tail_lba, row.tail_lbas, row.id)",
        "(row.changed_ns, row.num_tokens, row.num_spilled, row.tail_lba, 0, row.id)",
    ),
    (
        "no transaction around a state",
        "        row.changed_ns = time.time_ns()\n        with self.transaction():",
        "        row.changed_ns = time.time_ns()\n        self.is_durable = False\n        if True:",
    ),
)

_METADATA += _of(
    "kvfs/metadata.py",
    ("database outgrows its area", 'self._db.execute(f"PRAGMA max_page_count', 'str(f"PRAGMA max_page_count'),
)

_SEQUENCE = _of(
    "kvfs/sequence.py",
    ("flush does not sync", "self._store._sync_if_needed()  # a fork", "pass  # a fork"),
    ("append leaves no mark", "            self._dirty = True\n            dtype =", "            dtype ="),
    (
        "token ids leave no mark",
        "ids.astype(np.uint32)])\n            self._dirty = True",
        "ids.astype(np.uint32)])",
    ),
    (
        "truncation leaves no mark",
        "min(self._tokens_changed_from, num_tokens)\n            self._dirty = True",
        "min(self._tokens_changed_from, num_tokens)",
    ),
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
    ("fork in two transactions", "with self._store._catalogue.transaction():", "with self._store._lock:"),
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
        "self._refill(tail, record[layer, 0], record[layer, 1])",
        "self._refill(tail, record[0, 0], record[0, 1])",
    ),
    (
        "values loaded as keys",
        "self._refill(tail, record[layer, 0], record[layer, 1])",
        "self._refill(tail, record[layer, 1], record[layer, 0])",
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
    ("unnamed groups leaked by truncation", "if group.id is None:  # no metadata ever named it", "if False:"),
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
    (
        "last group not read",
        "groups = self._groups[: -(-stop // group_tokens)]",
        "groups = self._groups[: stop // group_tokens]",
    ),
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
    ("renamed in memory only", "self._catalogue.rename_sequence(sequence._row.id, new_name)", "pass"),
    (
        "deleted blocks reused at once",
        "self._allocator.hold(*extent)\n            sequence._forget",
        "self._allocator.give_back(*extent)\n            sequence._forget",
    ),
    ("deletion forgets the tail", "            sequence._forget()\n", "            sequence._clear_tails()\n"),
    (
        "close does not flush",
        "                self.flush()\n                self._catalogue.close()",
        "                self._catalogue.close()",
    ),
    ("leftovers of a power cut kept", "self._namespace.deallocate(self._allocator.free_extents)", "pass"),
    (
        "host's part of attention dropped",
        "return merge_states(*answer, out, lse) if sees_tail else answer",
        "return answer",
    ),
    ("flush passes for done", "if not self._catalogue.is_durable:", "if self._catalogue.is_durable:"),
    ("attended tails leave memory", " and other not in self._attended:", ":"),
    (
        "sequences of the first model",
        "model for model in self._models.values() if model.id == row.model_id",
        "model for model in self._models.values() if model.id <= row.model_id",
    ),
)

_STORE += _of(
    "kvfs/store.py",
    (
        "deleted before the catalogue agrees",
        "            for extent in self._catalogue.delete_sequence",
        "            sequence._forget()\n            for extent in self._catalogue.delete_sequence",
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
        "self._starts[index] += num_lbas",
        "self._starts[index] += num_lbas - (num_lbas > 6)",
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
            "failures reported as success",
            "if request.status != Status.SUCCESS:\n                do_not_retry",
            "if request.status is None:\n                do_not_retry",
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
        "accel/vendor_commands.py",
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
            'oob["durable_program_number"] = state.durable_program_number',
            'oob["durable_program_number"] = state.next_program_number',
        ),
        ("one session for all", 'oob["session"] = state.session', 'oob["session"] = 1'),
        ("checksums not kept", "state.checksums.set(pages, oob)", "pass"),
    ),
    *_of(
        "ftl/oob.py",
        (
            "torn OOB believed",
            'return (records["magic"] == OOB_MAGIC) & (records["oob_crc32c"] == crc32c_records(records))',
            'return records["magic"] == OOB_MAGIC',
        ),
    ),
]

MUTATIONS = [
    *_METADATA_VFS,
    *_METADATA,
    *_SEQUENCE,
    *_STORE,
    *_ALLOCATOR,
    *_TAIL,
    *_HOST,
    *_SPDK_GLUE,
    *_ACCEL,
    *_FTL,
]
assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
