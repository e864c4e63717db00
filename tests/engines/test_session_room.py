"""Caps of sessions: what goes is what was kept longest ago, before anything is stored beyond the cap."""

import logging

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install kvfs[transformers]")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install kvfs[transformers]")

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import kvfs
from kvfs.engines import transformers
from kvfs.engines.errors import CapReached
from kvfs.engines.session_room import SessionRoom, group_bytes, sequence_bytes
from kvfs.errors import InvalidArgument
from tests.engines.answers import greedy, names, plain
from tests.engines.conftest import tiny

GROUP = 256
NEW = 3


@pytest.fixture
def small_store(tmp_path):
    kvfs.format(tmp_path / "drive.kvfs", size="16MiB")
    with kvfs.open(tmp_path / "drive.kvfs", cache_bytes="8MiB", writeback_tokens=1) as opened:
        yield opened


def bytes_on_flash(store):
    """Of all sequences, what several share once."""
    database = store._catalogue._db
    lbas = database.execute("SELECT coalesce(sum(num_lbas), 0) FROM kv_group").get
    return (lbas + sum(row.tail_lbas for row in store.catalogue_rows())) * store._namespace.block_bytes


def chat(model, store, session, num_tokens, prompt, **options):
    """The Session, after an answer to a prompt that is longer than its last one, or not."""
    enabled = transformers.enable(model, store, session=session, **options)
    try:
        ids = prompt(num_tokens, seed=int(session[-1]))
        greedy(model, ids, num_tokens=NEW)
        return enabled
    finally:
        transformers.disable(model)


# -- a model of it ---------------------------------------------------------------------------------------------


class Model:
    """tokens: of each session, kept longest ago first."""

    def __init__(self, cap, most):
        self.cap, self.most = cap, most
        self.tokens, self.pinned = {}, set()

    def answer(self, stored, session, num_tokens, reused):
        """Of a prompt: whether it is kept. stored: the store's model, once it is known."""
        end = num_tokens + NEW - 1
        for now in sorted({num_tokens, *range(-(-num_tokens // GROUP) * GROUP + 1, end + 1, GROUP), end}):
            if not self.fits(stored, session, now, reused):
                return False
        self.tokens.pop(session, None)
        self.tokens[session] = end
        return True

    def fits(self, stored, session, num_tokens, reused):
        shared = min(reused, self.tokens.get(session, 0)) // GROUP
        work = sequence_bytes(stored, num_tokens) - shared * group_bytes(stored)
        gone = []
        for victim in [None, *(one for one in self.tokens if one != session and one not in self.pinned)]:
            gone += [victim] if victim else []
            left = {one: count for one, count in self.tokens.items() if one not in gone}
            used = sum(sequence_bytes(stored, count) for count in left.values()) + work
            if used <= self.cap and len(left.keys() | {session}) <= self.most:
                self.tokens = left
                return True
        return False


STEPS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([40, 250, 255, 300, 520, 700]), st.booleans()), max_size=9
)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@example(steps=[(1, 40, False), (2, 40, False), (1, 40, False), (3, 40, False)], groups=9, most=3)
@example(steps=[(1, 40, True), (2, 300, False), (3, 40, False), (2, 520, False)], groups=4, most=5)
@given(steps=STEPS, groups=st.integers(2, 9), most=st.integers(1, 5))
def test_against_a_model(tmp_path_factory, prompt, steps, groups, most):
    """A cap that is exceeded, a session that goes before an older one, or though it is pinned, or never."""
    path = tmp_path_factory.mktemp("room") / "drive.kvfs"
    kvfs.format(path, size="64MiB")
    model = tiny("Llama")
    with kvfs.open(path, cache_bytes="8MiB", writeback_tokens=1) as store:
        chat(model, store, "chat-0", 40, prompt)
        (stored,) = store.models()
        cap = groups * sequence_bytes(stored, GROUP)
        expected = Model(cap, most)
        expected.tokens["chat-0"] = 40 + NEW - 1
        for number, num_tokens, is_pinned in steps:
            session = f"chat-{number}"
            try:
                enabled = chat(
                    model, store, session, num_tokens, prompt, capacity_bytes=cap, max_sequences=most
                )
            except InvalidArgument:  # what is pinned is too much already
                assert not expected.fits(stored, None, 0, 0) or len(expected.pinned) >= most
                break
            is_kept = expected.answer(stored, session, num_tokens, enabled.last.num_tokens)
            assert names(store, "") == sorted(expected.tokens)
            assert enabled.last.is_kept == is_kept
            assert bytes_on_flash(store) <= cap and len(names(store, "")) <= most
            if is_pinned and session in expected.tokens:
                store.sequence(session).set_attribute("user.kvfs.pinned", b"1")
                expected.pinned.add(session)
            expected.pinned &= {
                row.name
                for row in store.catalogue_rows()
                if store.sequence(row.name).attributes().get("user.kvfs.pinned") == b"1"
            }
        assert store.check() == []


# -- one by one ------------------------------------------------------------------------------------------------


def test_no_room_for_the_open_one(llama, enable, store, name, prompt, caplog):
    """An answer that is cut off, or stored beyond the cap; pinned sessions that go for it."""
    first = enable(llama, store, session=f"{name}-a")
    ids = prompt(300)
    expected = plain(llama, ids)
    greedy(llama, ids)
    store.sequence(f"{name}-a").set_attribute("user.kvfs.pinned", b"1")
    (stored,) = [model for model in store.models() if model.id == store.sequence(f"{name}-a").model.id]
    rows = [row for row in store.catalogue_rows() if row.model_id == stored.id]
    for row in rows:
        if row.name != f"{name}-a":
            store.delete_sequence(row.name)  # of other tests
    cap = sequence_bytes(stored, 311) + sequence_bytes(stored, GROUP)
    session = enable(llama, store, session=f"{name}-b", capacity_bytes=cap, tenant=f"{name}-other")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(greedy(llama, ids), expected)
    assert len(caplog.records) == 1 and "a cap of" in caplog.text and "goes on in memory" in caplog.text
    assert not session.last.is_kept and first.last.is_kept and names(store, name) == [f"{name}-a"]
    with pytest.raises(InvalidArgument, match="does not hold"):
        enable(llama, store, session=f"{name}-b", capacity_bytes="4KiB")
    for bad in ({"capacity_bytes": 0}, {"capacity_bytes": "much"}, {"max_sequences": 0}):
        with pytest.raises(InvalidArgument):
            enable(llama, store, session=f"{name}-b", **bad)


def test_a_full_drive_has_the_oldest_evicted(llama, enable, small_store, prompt, caplog):
    """Conversation after conversation on a small drive: all are kept, the latest stay; pinned ones, too."""
    for number in range(6):
        session = enable(llama, small_store, session=f"chat-{number}", evict_when_full=True)
        ids = prompt(600, num_rows=2, seed=number)
        assert torch.equal(greedy(llama, ids, num_tokens=3), plain(llama, ids, num_tokens=3))
        assert session.last.is_kept
        if number == 0:
            small_store.sequence("chat-0.1").set_attribute("user.kvfs.pinned", b"1")
    left = names(small_store, "chat")
    assert {"chat-0.1", "chat-5.0", "chat-5.1"} <= set(left) and len(left) < 8
    assert session.room.evictions > 0 and not caplog.records
    assert small_store.check() == []


def test_over_a_mount(llama, small_store, prompt, client_of, tmp_path):
    """Another process's store keeps no fewer promises; its own sequences are not sessions, and stay."""
    with client_of(small_store, tmp_path / "mount") as remote:
        for number in range(4):
            chat(llama, remote, f"chat-{number}", 300, prompt, max_sequences=2)
        small_store.create_sequence(small_store.models()[0], "own")
        chat(llama, remote, "chat-4", 300, prompt, max_sequences=2)
        assert names(remote, "") == ["chat-3", "chat-4", "own"]
        room = SessionRoom(remote, "chat-3", max_sequences=1)
        room.make_room(remote.models()[0].name)
        assert names(remote, "") == ["chat-3", "own"] and room.evictions == 1
        remote.sequence("chat-3").set_attribute("user.kvfs.pinned", b"1")
        with pytest.raises(CapReached):
            SessionRoom(remote, "another", max_sequences=1).make_room(remote.models()[0].name, {"w"}, 10)
