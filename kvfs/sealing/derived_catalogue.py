"""What the catalogue knows of derived segments: which there are, of which groups, and which models want them.

A segment belongs to the last of its groups. Whoever has that group has those before it too (sequences share
groups from the first one on, and lose them from the last one on), so forks and prefixes share segments without
being counted, and a segment goes with its last group: a trigger takes the row. A truncation that keeps the
group for others keeps the segment for them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvfs.allocator import Extent
from spdk_glue.vendor_command import Derive

DERIVED_SCHEMA = """
CREATE TABLE derived_segment (
    id INTEGER PRIMARY KEY,
    group_id INTEGER NOT NULL REFERENCES kv_group(id),  -- its last group
    derive INTEGER NOT NULL,       -- spdk_glue.vendor_command.Derive: SKETCH or CHANNEL_MAJOR_KEYS
    num_groups INTEGER NOT NULL,   -- that one and those before it
    base_lba INTEGER NOT NULL UNIQUE,
    num_lbas INTEGER NOT NULL,
    UNIQUE (group_id, derive)
) STRICT;
CREATE TABLE model_sealing (
    model_id INTEGER NOT NULL REFERENCES model(id),
    derive INTEGER NOT NULL,       -- made of this model's groups once they are complete
    PRIMARY KEY (model_id, derive)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER derived_segment_of_no_group AFTER DELETE ON kv_group BEGIN
    DELETE FROM derived_segment WHERE group_id = OLD.id;
END;
CREATE TRIGGER model_sealing_of_no_model AFTER DELETE ON model BEGIN
    DELETE FROM model_sealing WHERE model_id = OLD.id;
END;
"""
DERIVED_TABLES = ("derived_segment", "model_sealing")
DERIVED_TRIGGERS = ("derived_segment_of_no_group", "model_sealing_of_no_model")
ROW_BYTES = 100  # of a segment and its places in two indexes, generously


@dataclass(frozen=True)
class SegmentRow:
    """position: of its last group in the sequence that was asked for"""

    id: int
    group_id: int
    position: int
    derive: Derive
    num_groups: int
    base_lba: int
    num_lbas: int

    @property
    def first_group(self) -> int:
        return self.position + 1 - self.num_groups


@dataclass(frozen=True)
class PlacedSegment:
    """A segment as a check sees it. position: of its last group in a sequence that has it, or None."""

    id: int
    group_id: int
    derive: int
    num_groups: int
    base_lba: int
    num_lbas: int
    sequence_id: int | None
    position: int | None


@dataclass(frozen=True)
class DerivedUsage:
    """Of one model and layout: what its segments take. num_tokens: that a segment holds, of forks once."""

    model: str
    derive: str
    is_wanted: bool
    num_segments: int
    num_tokens: int
    num_bytes: int
    dense_bytes: int  # of the token-major pages of the same tokens

    @property
    def share(self) -> float:
        """Of what the same tokens take without it."""
        return self.num_bytes / self.dense_bytes if self.dense_bytes else 0.0


class DerivedCatalogue:
    """db: the catalogue's connection; transaction: its context manager."""

    def __init__(self, db, transaction):
        self._db = db
        self._transaction = transaction

    # policy

    def wanted(self) -> dict[int, list[Derive]]:
        """What is to be derived, by the ids of the models."""
        found: dict[int, list[Derive]] = {}
        for model_id, derive in self._db.execute("SELECT model_id, derive FROM model_sealing ORDER BY derive"):
            found.setdefault(model_id, []).append(Derive(derive))
        return found

    def set_wanted(self, model_id: int, derives: Iterable[Derive]) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM model_sealing WHERE model_id = ?", (model_id,))
            self._db.executemany(
                "INSERT INTO model_sealing VALUES (?, ?)", [(model_id, int(derive)) for derive in derives]
            )

    def sequences_of(self, model_id: int) -> list[tuple[int, str, int]]:
        """(id, name, whole groups on flash) of a model's sequences that have any, those changed last first."""
        return list(
            self._db.execute(
                "SELECT sequence.id, sequence.name, num_spilled / group_tokens FROM sequence"
                " JOIN model ON model.id = model_id WHERE model_id = ? AND num_spilled >= group_tokens"
                " ORDER BY changed_ns DESC",
                (model_id,),
            )
        )

    # segments

    def segments(self, sequence_id: int) -> list[SegmentRow]:
        """Of a sequence's groups as they are stored."""
        rows = self._db.execute(
            "SELECT derived_segment.id, derived_segment.group_id, position, derive, num_groups, base_lba,"
            " num_lbas FROM sequence_group JOIN derived_segment USING (group_id) WHERE sequence_id = ?"
            " ORDER BY position",
            (sequence_id,),
        )
        return [SegmentRow(*row[:3], Derive(row[3]), *row[4:]) for row in rows]

    def add(self, group_id: int, derive: Derive, num_groups: int, base_lba: int, num_lbas: int) -> list[Extent]:
        """Name a segment. Returns the extents of those that it replaces: with the same last group, or shorter
        ones within it that no sequence has without it."""
        with self._transaction():
            freed = self._take(
                "derive = ?1 AND (group_id = ?2 OR group_id IN (SELECT shorter.group_id"
                " FROM sequence_group AS last JOIN sequence_group AS shorter"
                " ON shorter.sequence_id = last.sequence_id AND shorter.position < last.position"
                " AND shorter.position > last.position - ?3"
                " JOIN kv_group AS its ON its.id = shorter.group_id JOIN kv_group AS whole ON whole.id = ?2"
                " WHERE last.group_id = ?2 AND its.reference_count = whole.reference_count))",
                (int(derive), group_id, num_groups),
            )
            self._db.execute(
                "INSERT INTO derived_segment (group_id, derive, num_groups, base_lba, num_lbas)"
                " VALUES (?, ?, ?, ?, ?)",
                (group_id, int(derive), num_groups, base_lba, num_lbas),
            )
            return freed

    def drop(self, ids: Sequence[int]) -> list[Extent]:
        """Forget segments; their extents."""
        with self._transaction():
            return [extent for id_ in ids for extent in self._take("id = ?", (id_,))]

    def drop_ending_in(self, group_id: int) -> list[Extent]:
        """Forget the segments of a group that is to change."""
        with self._transaction():
            return self._take("group_id = ?", (group_id,))

    def drop_of(self, model_id: int | None, derive: Derive | None) -> list[Extent]:
        """Forget all of a model and a layout, or of any."""
        with self._transaction():
            return self._take(
                "(?1 IS NULL OR derive = ?1) AND (?2 IS NULL OR group_id IN (SELECT group_id"
                " FROM sequence_group JOIN sequence ON sequence.id = sequence_id WHERE model_id = ?2))",
                (None if derive is None else int(derive), model_id),
            )

    def drop_oldest(self, num_lbas: int) -> list[Extent]:
        """Forget those made longest ago, until so many blocks are free or none is left."""
        ids, found = [], 0
        for id_, count in self._db.execute("SELECT id, num_lbas FROM derived_segment ORDER BY id"):
            if found >= num_lbas:
                break
            ids.append(id_)
            found += count
        return self.drop(ids)

    def _take(self, condition: str, arguments: tuple) -> list[Extent]:
        rows = list(
            self._db.execute(f"SELECT id, base_lba, num_lbas FROM derived_segment WHERE {condition}", arguments)
        )
        self._db.executemany("DELETE FROM derived_segment WHERE id = ?", [(row[0],) for row in rows])
        return [(base_lba, num_lbas) for _, base_lba, num_lbas in rows]

    def usage(self) -> list[tuple[int, Derive, int, int, int]]:
        """(model id, layout, segments, groups, blocks) of what there is."""
        rows = self._db.execute(
            "SELECT model_id, derive, count(*), sum(num_groups), sum(num_lbas) FROM derived_segment"
            " JOIN sequence ON sequence.id = (SELECT sequence_id FROM sequence_group"
            "  WHERE sequence_group.group_id = derived_segment.group_id LIMIT 1)"
            " GROUP BY model_id, derive"
        )
        return [(row[0], Derive(row[1]), *row[2:]) for row in rows]

    def num_lbas(self, derive: Derive) -> int:
        """Blocks of all segments of a layout."""
        query = "SELECT coalesce(sum(num_lbas), 0) FROM derived_segment WHERE derive = ?"
        return self._db.execute(query, (int(derive),)).get

    # blocks, checking

    def used_extents(self) -> Iterable[Extent]:
        return self._db.execute("SELECT base_lba, num_lbas FROM derived_segment")

    def placed(self) -> list[PlacedSegment]:
        """All, each with one of the sequences that have it."""
        rows = self._db.execute(
            "SELECT derived_segment.id, group_id, derive, num_groups, base_lba, num_lbas,"
            " min(sequence_id), position FROM derived_segment LEFT JOIN sequence_group USING (group_id)"
            " GROUP BY derived_segment.id"
        )
        return [PlacedSegment(*row) for row in rows]

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        return [f"derived segment {segment_id} {why}" for segment_id, why in self._wrong()]

    def _wrong(self) -> list[tuple[int, str]]:
        found = []
        for row in self.placed():
            if row.position is None:
                found.append((row.id, f"is of group {row.group_id}, which no sequence has"))
            elif not 1 <= row.num_groups <= row.position + 1:
                found.append((row.id, f"is of {row.num_groups} groups up to position {row.position}"))
        incomplete = self._db.execute(
            "SELECT derived_segment.id FROM derived_segment JOIN sequence_group USING (group_id)"
            " JOIN sequence ON sequence.id = sequence_id JOIN model ON model.id = model_id"
            " GROUP BY derived_segment.id HAVING max(num_spilled) < (position + 1) * group_tokens"
        )
        found += [(segment_id, "is of a group that is not complete") for (segment_id,) in incomplete]
        return found

    def mend(self, damaged: Iterable[int] = ()) -> int:
        """Forget what `problems` finds, and what is damaged; how many segments."""
        with self._transaction():
            before = self._db.total_changes()
            self.drop(sorted({*(segment_id for segment_id, _ in self._wrong()), *damaged}))
            self._db.execute("DELETE FROM model_sealing WHERE model_id NOT IN (SELECT id FROM model)")
            return self._db.total_changes() - before
