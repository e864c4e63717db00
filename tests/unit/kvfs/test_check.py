"""Looking into a drive and mending it: damage is found, named, and cut back to what is whole."""

import numpy as np
import pytest

import kvfs
from kvfs.errors import InvalidArgument
from kvfs.inspection import Inspection
from kvfs.repair import repair
from kvfs.scrub import verify_all
from spdk_glue import dma
from tests.unit.kvfs.conftest import NUM_LAYERS, add_model, random_kv

GROUP = 256
NUM_TOKENS = 2 * GROUP + 100  # two groups and a tail record
PAGE_TOKENS = 32  # of one head: 4096 / (64 * 2)


def fill(path, names=("first", "second"), num_tokens=NUM_TOKENS):
    with kvfs.open(path, cache_bytes="8MiB", worker="reference") as store:
        model = add_model(store)
        for seed, name in enumerate(names):
            sequence = store.create_sequence(model, name)
            keys, values = random_kv(num_tokens, seed)
            for layer in range(NUM_LAYERS):
                sequence.append(layer, keys, values)
            sequence.append_tokens(np.arange(num_tokens))


def flip(path, choose):
    """Flip a bit of each LBA in choose(store)."""
    with kvfs.open(path, cache_bytes="8MiB", worker="reference") as store:
        lbas = np.array(choose(store))
        pages = store._drive.ftl.resolve(lbas)
        start = store._drive.ftl.media.layout.data_start
    assert (pages >= 0).all()
    with path.open("r+b") as file:
        for page in pages.tolist():
            file.seek(start + page * 4096 + 99)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 4]))
    return lbas.tolist()


def sql(path, *statements):
    """Change the catalogue behind the store's back."""
    with Inspection(path, read_only=False) as inspection:
        inspection.catalogue._db.execute("PRAGMA foreign_keys = OFF")
        with inspection.catalogue.transaction():
            for statement in statements:
                inspection.catalogue._db.execute(statement)
        inspection.catalogue.sync()


def age(inspection):
    """Write on until recovery knows that all before was durable: what is damaged then is not merely torn."""
    namespace = inspection.namespace
    namespace.write(namespace.num_lbas - 400, dma.allocate(300 * namespace.block_bytes))
    namespace.flush()
    namespace.deallocate([(namespace.num_lbas - 400, 300)])
    namespace.flush()


def check(path):
    with Inspection(path) as inspection:
        return inspection.check()


def texts(report):
    return [problem.text for problem in report.problems]


def mend(path):
    """(what was done, what is left)."""
    with Inspection(path, read_only=False) as inspection:
        done = repair(inspection, inspection.check())
        left = inspection.check()
    assert check(path).problems == left.problems
    return done, texts(left)


def group_lba(store, name, group, layer=0, head=0, is_value=0, page=0):
    sequence = store.sequence(name)
    layout = sequence._layout
    within = (head * 2 + is_value) * layout.pages_per_head + page
    return sequence._groups[group].base_lba + layer * layout.layer_lbas + within


def whole(path, name, num_tokens, seed=0):
    """The sequence has so many tokens, right ones, and goes on from there."""
    keys, values = random_kv(NUM_TOKENS, seed)
    with kvfs.open(path, cache_bytes="8MiB", worker="reference") as store:
        sequence = store.sequence(name)
        assert sequence.num_tokens == num_tokens == len(sequence.tokens)
        for layer in range(NUM_LAYERS):
            found = sequence.read(layer)
            np.testing.assert_array_equal(found[0], keys[:num_tokens].astype(np.float16))
            np.testing.assert_array_equal(found[1], values[:num_tokens].astype(np.float16))
            sequence.append(layer, keys[num_tokens:], values[num_tokens:])
        sequence.flush()
        np.testing.assert_array_equal(sequence.read(1)[0], keys.astype(np.float16))
        sequence.truncate(num_tokens)
        assert store.check() == []


def test_a_healthy_drive(path):
    """No false alarms, also with forks, part groups and a drive that was used for a while."""
    fill(path)
    with kvfs.open(path, cache_bytes="8MiB", worker="reference", writeback_tokens=32) as store:
        fork = store.sequence("first").fork("fork")
        fork.truncate(300)
        part = store.create_sequence(store.model("model-float16"), "part")
        keys, values = random_kv(300)
        for layer in range(NUM_LAYERS):
            part.append(layer, keys, values)
        store.delete_sequence("second")
        assert store.check() == []
    report = check(path)
    assert (report.problems, report.lost, report.leaked) == ([], [], [])
    before = path.read_bytes()
    check(path)
    assert path.read_bytes() == before  # looking changes nothing


def test_lost_blocks_have_names(path):
    """A lost page: sequence, model, layer and tokens; a repair keeps exactly what is whole."""
    fill(path)
    (lba,) = flip(path, lambda s: [group_lba(s, "first", 1, layer=1, head=1, is_value=1, page=3)])
    report = check(path)
    start = GROUP + 3 * PAGE_TOKENS
    where = f"sequence 'first' of model 'model-float16', layer 1, tokens {start} to {start + 31}"
    assert texts(report) == [f"LBA {lba} is lost: {where} (values of KV head 1)"]
    assert report.is_damaged and report.lost == [lba]
    with Inspection(path) as inspection:
        assert [lba for step in verify_all(inspection.namespace) for lba in step.lost] == [lba]
        assert inspection.owner(lba).as_dict()["token_stop"] == start + 32
    done, left = mend(path)
    assert done[0] == f"truncated sequence 'first' from {NUM_TOKENS} to {start} tokens"
    assert left == []
    whole(path, "first", start)
    whole(path, "second", NUM_TOKENS, seed=1)


def test_lost_tail_record(path):
    """The tail record's page: the whole groups remain."""
    fill(path)
    (lba,) = flip(path, lambda s: [s.sequence("second")._row.tail_lba + 1])
    (line,) = texts(check(path))
    assert line.startswith(f"LBA {lba} is lost: sequence 'second'") and "tail record" in line
    done, left = mend(path)
    assert f"truncated sequence 'second' from {NUM_TOKENS} to {2 * GROUP} tokens" in done
    assert left == []
    whole(path, "second", 2 * GROUP, seed=1)


def test_lost_block_of_forks(path):
    """A shared page: both sequences are named, and cut."""
    fill(path, names=["first"])
    with kvfs.open(path, cache_bytes="8MiB", worker="reference") as store:
        store.sequence("first").fork("fork")
    flip(path, lambda s: [group_lba(s, "fork", 0)])
    assert "sequences 'first', 'fork' of model" in texts(check(path))[0]
    done, left = mend(path)
    assert [line.split(" from")[0] for line in done[:2]] == [
        "truncated sequence 'first'",
        "truncated sequence 'fork'",
    ]
    assert left == []
    whole(path, "fork", 0)


def test_leaks(path):
    """Blocks that nothing names: no damage, and given back."""
    fill(path)
    with Inspection(path, read_only=False) as inspection:
        free = inspection.namespace.num_lbas - 20
        inspection.namespace.write(free, dma.allocate(7 * 4096))
        inspection.namespace.flush()
    report = check(path)
    assert report.leaked == [(free, 7)]
    assert not report.is_damaged
    assert f"7 blocks on flash that nothing names, from LBA {free} on" in texts(report)[0]
    assert mend(path) == (["gave back 7 blocks that nothing names"], [])


def test_lost_leak(path):
    """A lost block that nothing names: nobody misses it."""
    fill(path)
    with Inspection(path, read_only=False) as inspection:
        free = inspection.namespace.num_lbas - 20
        inspection.namespace.write(free, dma.allocate(4096))
        age(inspection)
        page = int(inspection._drive.ftl.resolve(np.array([free]))[0])
        start = inspection._drive.ftl.media.layout.data_start
    with path.open("r+b") as file:
        file.seek(start + page * 4096)
        file.write(b"damage")
    report = check(path)
    assert not report.is_damaged
    assert f"LBA {free} is lost: nothing names it" in texts(report)
    assert mend(path)[1] == []


def test_blocks_that_are_gone(path):
    """Blocks that a row names and the flash does not have would read as zeros: found, and cut."""
    fill(path)
    with Inspection(path, read_only=False) as inspection:
        extent = inspection.owners.extents[1]
        inspection.namespace.deallocate([(extent.first_lba + 8, 3)])
        inspection.namespace.flush()
    (line,) = texts(check(path))
    assert line.startswith(f"3 of blocks {extent.first_lba} to {extent.stop_lba - 1} (group 2 of 'first')")
    assert f"LBA {extent.first_lba + 8} first" in line
    done, left = mend(path)
    assert f"truncated sequence 'first' from {NUM_TOKENS} to {GROUP} tokens" in done
    assert left == []
    whole(path, "first", GROUP)


def test_reference_counts_and_unlinked_groups(path):
    """Wrong counts would free what is in use, or never free anything."""
    fill(path)
    sql(path, "UPDATE kv_group SET reference_count = 7 WHERE id = 1")
    assert texts(check(path)) == ["group 1 counts 7 references but has 1"]
    assert mend(path) == (["counted the references of 1 groups anew"], [])
    sql(path, "DELETE FROM sequence_group WHERE group_id = 2", "UPDATE sequence SET num_spilled = 256")
    found = texts(check(path))
    assert "group 2 counts 1 references but has 0" in found
    done, left = mend(path)
    assert any("groups of" in line and "no sequence has" in line for line in done)
    assert left == []
    whole(path, "first", 256)


def test_overlapping_extents(path):
    """Two sequences that name the same blocks: neither can be trusted there, and the store opens again."""
    fill(path)
    sql(path, "UPDATE kv_group SET base_lba = (SELECT base_lba + 4 FROM kv_group WHERE id = 1) WHERE id = 4")
    with pytest.raises(kvfs.errors.NotADrive, match="contradicts"):
        kvfs.open(path)
    report = check(path)
    assert {problem.kind for problem in report.problems} == {"overlap", "leak"}
    assert "group 4 of 'second'" in texts(report)[0] and "group 1 of 'first'" in texts(report)[0]
    done, left = mend(path)
    assert f"truncated sequence 'first' from {NUM_TOKENS} to 0 tokens" in done
    assert f"truncated sequence 'second' from {NUM_TOKENS} to 256 tokens" in done
    assert left == []
    whole(path, "second", 256, seed=1)


@pytest.mark.parametrize(
    ("statement", "tokens"),
    [
        ("UPDATE kv_group SET base_lba = 1 << 40 WHERE id = 1", 0),
        ("UPDATE kv_group SET base_lba = 3 WHERE id = 2", 256),
        ("DELETE FROM kv_group WHERE id = 2", 256),
        ("DELETE FROM sequence_group WHERE group_id = 1", 0),
        ("UPDATE kv_group SET num_lbas = 5 WHERE id = 2", 256),
        ("UPDATE sequence SET tail_lbas = 1 WHERE name = 'first'", 512),
        ("UPDATE sequence SET num_spilled = 9999 WHERE name = 'first'", 512),
        ("UPDATE sequence SET num_tokens = 300 WHERE name = 'first'", 512),
        ("UPDATE sequence SET num_spilled = -4 WHERE name = 'first'", 0),
        ("INSERT INTO sequence_group VALUES (99, 0, 1)", NUM_TOKENS),
        ("UPDATE sequence_group SET position = -5 WHERE position = 1", 256),
        ("UPDATE sequence_group SET position = 100 WHERE position = 1", 256),
    ],
)
def test_rows_that_lie(path, statement, tokens):
    """Any row that cannot be: reported, and mended to something that opens and is right."""
    fill(path, names=["first"])
    sql(path, statement)
    assert check(path).is_damaged
    done, left = mend(path)
    assert done
    assert left == []
    whole(path, "first", tokens)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE model SET group_tokens = 512",
        "UPDATE sequence SET model_id = 9 WHERE name = 'first'",
        "UPDATE model SET head_dim = 7",
    ],
)
def test_a_model_that_lies(path, statement):
    """A damaged row of a model says nothing about its sequences: reported, and nothing of them is cut."""
    fill(path)
    with kvfs.open(path, cache_bytes="8MiB", worker="reference") as store:
        store.sequence("first").fork("fork")
    sql(path, statement)
    assert check(path).is_damaged
    done, _ = mend(path)
    assert done == []
    sql(path, "UPDATE model SET group_tokens = 256, head_dim = 64", "UPDATE sequence SET model_id = 1")
    assert check(path).problems == []


def test_damaged_catalogue(path):
    """A lost page of the catalogue: named; the data are still looked at, and nothing is mended by guessing."""
    fill(path)
    with Inspection(path) as inspection:
        database = inspection.volume.database.first_lba
        page = int(inspection._drive.ftl.resolve(np.array([database]))[0])
        start = inspection._drive.ftl.media.layout.data_start
    with path.open("r+b") as file:
        file.seek(start + page * 4096 + 500)
        file.write(b"damage")
    report = check(path)
    assert report.is_damaged
    assert any(f"LBA {database} is lost: the catalogue's database, block 0" in line for line in texts(report))
    assert any(line.startswith("catalogue: ") for line in texts(report))
    done, left = mend(path)
    assert done == []
    assert left == texts(report)


def test_lost_volume_header(path):
    """Without the header nothing is known of the catalogue: said, and no crash."""
    fill(path)
    with Inspection(path, read_only=False) as inspection:
        inspection.namespace.write(0, inspection.namespace.read(0, 1))
        age(inspection)
        page = int(inspection._drive.ftl.resolve(np.array([0]))[0])
        start = inspection._drive.ftl.media.layout.data_start
    with path.open("r+b") as file:
        file.seek(start + page * 4096)
        file.write(b"damage")
    found = texts(check(path))
    assert any("LBA 0 is lost: the volume header cannot be read" in line for line in found), found


def test_drive_map(path):
    """What the drive finds in its own map comes with the name of the sequence that it concerns."""
    fill(path)
    with Inspection(path) as inspection:
        lba = inspection.owners.extents[0].first_lba
        entries = inspection._drive.ftl._state.mapping.entries
        entries[[lba, lba + 1]] = entries[[lba + 1, lba]]
        found = texts(inspection.check())
    assert any(line.startswith("flash: wrong lba (") and "sequence 'first'" in line for line in found), found


def test_parity_repairs(tmp_path):
    """With parity a damaged page costs nothing: reads are right, a scrub's renewal writes it anew."""
    path = tmp_path / "drive.kvfs"
    kvfs.format(path, "48MiB", parity=True, spare_percent=10)
    fill(path)
    flip(path, lambda s: [group_lba(s, "first", 0), s.sequence("second")._row.tail_lba])
    report = check(path)
    assert [problem.kind for problem in report.problems] == ["repairable"]
    assert not report.is_damaged
    done, left = mend(path)
    assert done == ["wrote 2 superblocks anew, of which parity gave pages back"]
    assert left == []
    whole(path, "first", NUM_TOKENS)
    whole(path, "second", NUM_TOKENS, seed=1)


def test_options(path):
    """Bad options: InvalidArgument, which names the choices."""
    with pytest.raises(InvalidArgument, match="choose one of"):
        kvfs.open(path, collection="lazy")
    with pytest.raises(InvalidArgument, match="choose one of"):
        Inspection(path, collection="lazy")
    with pytest.raises(InvalidArgument, match="spare_percent"):
        kvfs.format(path.with_name("other"), "48MiB", spare_percent=77)
    with kvfs.open(path, collection="d-choices", cache_bytes="8MiB") as store:
        assert store.counters()["waf"]["total"] is None


def test_counters(path):
    """counters: write amplification is the sum of its causes."""
    with kvfs.open(path, cache_bytes="8MiB", worker="reference") as store:
        model = add_model(store)
        sequence = store.create_sequence(model, "one")
        for layer in range(NUM_LAYERS):
            sequence.append(layer, *random_kv(600))
        store.flush()
        counters = store.counters()
    waf = counters["waf"]
    parts = ("host", "garbage_collection", "wear_levelling", "padding", "parity", "metadata")
    assert waf["host"] == 1
    assert waf["total"] == pytest.approx(sum(waf[name] for name in parts))
    assert counters["flash"]["waf"] == waf["total"]
    assert counters["flash"]["available_spare_percent"] == 100
