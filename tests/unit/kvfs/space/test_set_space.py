"""What takes a set's space, who has left it, and models that go: of all drives together."""

import pytest

import kvfs
from kvfs.errors import DriveLost, ModelInUse, NoSuchModel
from kvfs.owner_process import this_process
from kvfs.sequence_attributes import OWNER

from .test_leftovers import other
from .test_set_caps import GROUP, GROUP_BYTES, OPTIONS, drive_set, fill, locations, lose, make, model_of, names
from .test_space_usage import assert_sums

__all__ = ["drive_set", "locations"]  # fixtures


def kept_by(drive_set, model, name, owner):
    return fill(drive_set.create_sequence(model, name, {OWNER: owner}), GROUP)


def test_usage_is_each_drives_own(drive_set, locations):
    """A drive that is shown twice, or whose blocks are another's."""
    make(drive_set, model_of(drive_set), "a", 2)
    drive_set.flush()
    usages = drive_set.space_usage()
    assert [usage.drive for usage in usages] == locations
    for usage in usages:
        assert_sums(usage)
        assert usage.blocks["groups"] == GROUP_BYTES  # of both groups half the heads
    drive_set.delete_sequence("a")
    drive_set.flush()
    assert [usage.blocks["groups"] for usage in drive_set.space_usage()] == [0, 0]


def test_usage_without_a_lost_drive(drive_set, locations):
    """df must go on where a drive does not."""
    lose(drive_set, 0)
    assert [usage.drive for usage in drive_set.space_usage()] == locations[1:]


def test_leftovers_are_whole_sequences(drive_set, locations):
    """Parts of which only the first knows its owner: half a sequence must not go, nor one that is in use."""
    model = model_of(drive_set)
    kept_by(drive_set, model, "far", other(this_process(), 0, "elsewhere"))
    kept_by(drive_set, model, "gone", other(this_process(), 1, "another-boot"))
    kept_by(drive_set, model, "mine", this_process())
    make(drive_set, model, "nobodys")
    drive_set.flush()
    drive_set.close()
    with kvfs.open(locations, **OPTIONS) as again:
        found = [(each.name, each.num_tokens, each.is_certain) for each in again.leftovers()]
        assert found == [("far", GROUP, False), ("gone", GROUP, True)]
        assert names(again) == ["far", "gone", "mine", "nobodys"]


def test_looking_for_leftovers_is_no_use(drive_set):
    """A cap would then evict by the alphabet."""
    model = model_of(drive_set)
    drive_set.set_quota("m", capacity_bytes=3 * GROUP_BYTES)
    for name in "zya":  # used longest ago first
        kept_by(drive_set, model, name, this_process())
    assert drive_set.leftovers() == []
    make(drive_set, model, "b")
    assert names(drive_set) == ["a", "b", "y"]


def test_leftovers_on_lost_drives_are_left_out(drive_set):
    """One drive that is away must not hide what the others know."""
    gone = other(this_process(), 1, "another-boot")
    kept_by(drive_set, model_of(drive_set), "both", gone)
    single = model_of(drive_set, num_heads=1, name="single")
    for name in ("x", "y"):  # one on each drive
        kept_by(drive_set, single, name, gone)
    drive_set.flush()
    firsts = {name: drive_set._member(drive_set._placed[name].parts[0]).location for name in ("both", "x", "y")}
    lost = lose(drive_set, list(drive_set.membership.drives.values()).index(firsts["both"]))
    there = [name for name, location in firsts.items() if location != lost]
    assert len(there) == 1 and [each.name for each in drive_set.leftovers()] == there


def test_a_model_goes_from_every_drive(drive_set, locations):
    """What one drive still knew of it would bring it back, in another shape than it is added in later."""
    model = model_of(drive_set)
    drive_set.set_quota("m", capacity_bytes=GROUP_BYTES)
    drive_set.set_quota(capacity_bytes=2 * GROUP_BYTES)
    make(drive_set, model, "a")
    with pytest.raises(ModelInUse, match="has 1 sequences"):
        drive_set.delete_model("m")
    drive_set.delete_sequence("a")
    drive_set.delete_model("m")
    with pytest.raises(NoSuchModel):
        drive_set.delete_model("m")
    drive_set.flush()
    drive_set.close()
    with kvfs.open(locations, **OPTIONS) as again:
        assert again.models() == [] and [quota.model for quota in again.quotas()] == [""]
        assert [member.store.models() for member in again._live] == [[], []]
        make(again, model_of(again, num_heads=2), "a")
        assert again.sequence_counts() == {"m": 1} and not again.check()


def test_names_that_begin_alike_stay(drive_set):
    """Parts are of models whose names begin with the model's."""
    short, longer = model_of(drive_set), model_of(drive_set, name="mm")
    for model in (short, longer):
        make(drive_set, model, model.name)
    drive_set.delete_sequence("m")
    drive_set.delete_model("m")
    assert [model.name for model in drive_set.models()] == ["mm"]
    make(drive_set, longer, "more")


def test_no_model_goes_without_a_drive(drive_set):
    """The missing one would bring it back; half of it must not go either."""
    model_of(drive_set)
    location = lose(drive_set, 1)
    with pytest.raises(DriveLost):
        drive_set.delete_model("m")
    assert [model.name for model in drive_set._live[0].store.models()] == ["m"]
    drive_set.drives.bring_back(location)
    drive_set.delete_model("m")
    assert drive_set.models() == []
