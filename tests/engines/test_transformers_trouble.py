"""`enable` with drives that are damaged or full, in several processes, and with what it refuses."""

import copy
import logging
import threading

import numpy as np
import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install kvfs[transformers]")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install kvfs[transformers]")

import torch
from transformers.cache_utils import DynamicCache

import kvfs
from kvfs.engines.transformers import CacheMismatch, KvfsCache, UnsupportedModel, UnsupportedOption, disable
from spdk_glue.status import Status
from tests.engines.answers import WAYS, Streamed, greedy, names, plain, sampled


def lose(store, sequence, group, layer):
    """Flip a bit of a page of keys on flash."""
    store.flush()
    lba = sequence._groups[group].base_lba + layer * sequence._layout.layer_lbas
    page = int(store._drive.ftl.resolve(np.array([lba]))[0])
    with open(store.path, "r+b") as file:
        file.seek(store._drive.ftl.media.layout.data_start + page * 4096 + 99)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("way", ["greedy", "sampling"])
@pytest.mark.parametrize("resumed_by", ["chat", "another"])
def test_damaged_groups_are_computed_anew(llama, enable, tmp_path, prompt, caplog, resumed_by, way):
    """Without it: a flipped bit ends a conversation, or changes it."""
    kvfs.format(tmp_path / "drive.kvfs", size="64MiB")
    ids, generate = prompt(600), sampled if way == "sampling" else greedy
    expected = plain(llama, ids, generate)
    with kvfs.open(tmp_path / "drive.kvfs", cache_bytes="8MiB") as store:
        enable(llama, store, session="chat")
        greedy(llama, ids)
        lose(store, store.sequence("chat"), group=1, layer=1)
    with kvfs.open(tmp_path / "drive.kvfs", cache_bytes="8MiB") as store, caplog.at_level(logging.WARNING):
        session = enable(llama, store, session=resumed_by)
        assert torch.equal(generate(llama, ids), expected)
        assert "computed anew" in caplog.text and session.last.is_kept
        caplog.clear()
        assert torch.equal(generate(llama, ids), expected)
        assert session.last.num_tokens == 599 and "anew" not in caplog.text
        assert [name for name in names(store, "") if "." in name] == []


def test_damage_in_the_middle_of_an_answer(llama, enable, store, name, prompt, caplog, monkeypatch):
    """Tokens that were shown already are not shown again, and none is another."""
    ids = prompt(600)
    expected = plain(llama, ids)
    calls = []
    attend = kvfs.Store.attend

    def fail_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 11:
            raise kvfs.errors.NvmeStatusError(0x02, Status.UNRECOVERED_READ_ERROR, lba=5)
        return attend(*arguments, **options)

    monkeypatch.setattr(kvfs.Store, "attend", fail_once)
    session, streamer = enable(llama, store, session=name), Streamed()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(greedy(llama, ids, streamer=streamer), expected)
    assert streamer.tokens == expected[0].tolist()
    assert "605 tokens are computed anew" in caplog.text and session.last.is_kept


@pytest.mark.parametrize("way", ["sampling", "beams", "several answers", "chunked prefill", "prompt lookup"])
def test_a_full_drive(sdpa_or_eager, enable, store, name, prompt, caplog, monkeypatch, way):
    """The answer goes on in memory, says so once, and leaves nothing behind."""
    model = sdpa_or_eager
    generate, options = WAYS[way]
    ids = prompt(150).repeat(1, 2)
    expected = plain(model, ids, generate, **options)
    session = enable(model, store, session=name)
    appended = []
    append = kvfs.Sequence.append

    def fail_late(sequence, layer, keys, values):
        appended.append(layer)
        if len(appended) > 9:
            raise kvfs.errors.OutOfSpace(1 << 20, 4096)
        append(sequence, layer, keys, values)

    monkeypatch.setattr(kvfs.Sequence, "append", fail_late)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(model, ids, **options), expected)
    assert len(caplog.records) == 1 and "is full" in caplog.text and "goes on in memory" in caplog.text
    assert not session.last.is_kept and names(store, name) == []


def test_a_drive_that_is_really_full(llama, enable, tmp_path, prompt, caplog):
    """Conversation after conversation on a small drive: right tokens, one line each when no more goes on it."""
    kvfs.format(tmp_path / "drive.kvfs", size="16MiB")
    with kvfs.open(tmp_path / "drive.kvfs", cache_bytes="8MiB", writeback_tokens=1) as store:
        kept = []
        for number in range(5):
            session = enable(llama, store, session=f"chat-{number}")
            ids = prompt(600, num_rows=4, seed=number)
            expected = plain(llama, ids, num_tokens=3)
            assert torch.equal(greedy(llama, ids, num_tokens=3), expected)
            kept.append(session.last.is_kept)
        assert kept[0] and not kept[-1], "the drive is larger than this test thinks"
        assert "full" in caplog.text
        assert len(names(store, "chat")) == 4 * sum(kept)
        assert store.check() == []


def test_a_cap(llama, enable, tmp_path, name, prompt, caplog):
    """An answer under a cap that has no room for it is an answer; it is told once, and counted."""
    ids = prompt(150)
    kvfs.format(tmp_path / "capped", "48MiB")
    with kvfs.open(tmp_path / "capped", cache_bytes="8MiB", num_workers=2) as store:
        pinned = store.add_model("pinned", num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=64)
        store.set_quota(capacity_bytes=64 << 10)
        kept = store.create_sequence(pinned, "pinned", {"user.kvfs.pinned": b"1"})
        rows = np.zeros((256, 1, 64), np.float16)
        kept.append(0, rows, rows)
        session = enable(llama, store, session=name)
        expected = plain(llama, ids)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert torch.equal(greedy(llama, ids), expected)
        assert len(caplog.records) == 1 and "cap of all models" in caplog.records[0].message
        assert session.num_refused == 3
        assert not session.last.is_kept and [row.name for row in store.catalogue_rows()] == ["pinned"]


def test_two_clients_with_one_session(llama, enable, store, name, prompt, client_of, tmp_path):
    """Two processes on one mount answer in the same session at once: right tokens for both."""
    models = [llama, copy.deepcopy(llama)]
    ids = [prompt(400), torch.cat([prompt(300), prompt(100, seed=1)], dim=1)]
    expected = [plain(llama, row) for row in ids]
    results = [[], []]

    def talk(number, remote):
        enable(models[number], remote, session=name)
        for _ in range(3):
            results[number].append(greedy(models[number], ids[number]))

    with client_of(store, tmp_path / "a") as one, client_of(store, tmp_path / "b") as other:
        threads = [threading.Thread(target=talk, args=pair) for pair in enumerate((one, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert names(store, name) == [name]
    for number in range(2):
        assert len(results[number]) == 3
        assert all(torch.equal(result, expected[number]) for result in results[number])


def test_a_session_is_deleted_meanwhile(llama, enable, store, name, prompt):
    """`kvfsctl rm` while an answer is under way, or another process that cleans up."""
    ids = prompt(300)
    expected = plain(llama, ids)
    session = enable(llama, store, session=name)

    def delete(count):
        if count == 305:
            for row_name in names(store, name):
                store.delete_sequence(row_name)

    assert torch.equal(greedy(llama, ids, streamer=Streamed(delete)), expected)
    assert not session.last.is_kept
    assert torch.equal(greedy(llama, ids), expected)
    assert session.last.is_kept


def test_leftovers_of_killed_processes(llama, enable, store, name, prompt):
    """Without it: every kill leaves a conversation on the drive that nobody will ever ask for."""
    greedy(llama, prompt(60), past_key_values=KvfsCache(store, f"{name}.999999999-1.0"))
    greedy(llama, prompt(60), past_key_values=KvfsCache(store, f"{name}.mine"))
    store.flush()
    enable(llama, store, session=name)
    assert names(store, name) == [f"{name}.mine"]


def test_an_interrupted_answer_leaves_nothing(llama, enable, store, name, prompt):
    def interrupt(count):
        if count == 305:
            raise KeyboardInterrupt

    enable(llama, store, session=name)
    with pytest.raises(KeyboardInterrupt):
        greedy(llama, prompt(300), streamer=Streamed(interrupt))
    assert names(store, name) == []
    assert torch.equal(greedy(llama, prompt(300)), plain(llama, prompt(300)))


# -- refusals, and what is left alone --------------------------------------------------------------------------


def test_other_caches_are_refused(llama, enable, store, name, prompt):
    """Without it: a user believes that the drive is used, and it is not."""
    enable(llama, store, session=name)
    for implementation in ("static", "quantized", "offloaded", "paged"):
        with pytest.raises(UnsupportedOption, match="cache_implementation"):
            greedy(llama, prompt(20), cache_implementation=implementation)
    for call in (
        llama.generate_batch,
        llama.init_continuous_batching,
        llama.continuous_batching_context_manager,
    ):
        with pytest.raises(UnsupportedOption, match="continuous batching"):
            call([[1, 2, 3]])


def test_models_that_are_refused(tiny_model, enable, store, name):
    """At once, not in the middle of the first answer."""
    latent = tiny_model(
        "DeepseekV3",
        num_hidden_layers=2,
        first_k_dense_replace=2,
        kv_lora_rank=32,
        q_lora_rank=32,
        head_dim=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
    )
    with pytest.raises(UnsupportedModel, match="latent"):
        enable(latent, store, session=name)
    with pytest.raises(UnsupportedModel, match="no Transformers model"):
        enable(torch.nn.Linear(2, 2), store, session=name)


def test_bad_arguments(llama, enable, store, name):
    for options in ({"session": "a/b"}, {"session": name, "dtype": "fp16"}, {"session": name, "tenant": 3}):
        with pytest.raises(kvfs.errors.InvalidArgument):
            enable(llama, store, **options)
    assert "generate" not in llama.__dict__


def test_somebody_elses_sequence_is_left_alone(llama, enable, store, name, prompt):
    """Without it: a session deletes what happens to have its name."""
    greedy(llama, prompt(60), past_key_values=KvfsCache(store, name))
    enable(llama, store, session=name)
    with pytest.raises(CacheMismatch, match="another name"):
        greedy(llama, prompt(60))
    assert store.sequence(name).num_tokens == 71


def test_a_closed_store_says_so(llama, enable, tmp_path, prompt):
    kvfs.format(tmp_path / "drive.kvfs", size="16MiB")
    with kvfs.open(tmp_path / "drive.kvfs", cache_bytes="8MiB") as store:
        enable(llama, store, session="chat")
    with pytest.raises(kvfs.errors.StoreClosed):
        greedy(llama, prompt(60))


def test_what_asks_for_no_cache_of_ours(llama, enable, store, name, prompt):
    """A cache of the caller's own, none at all, and the model called directly."""
    ids = prompt(60)
    expected = plain(llama, ids)
    enable(llama, store, session=name)
    assert torch.equal(greedy(llama, ids, past_key_values=DynamicCache()), expected)
    assert torch.equal(greedy(llama, ids, use_cache=False), expected)
    assert torch.equal(greedy(llama, ids, past_key_values=KvfsCache(store, f"{name}-own")), expected)
    with torch.inference_mode():
        assert torch.equal(llama(ids).logits, copy.deepcopy(llama)(ids).logits)
    assert names(store, name) == [f"{name}-own"]


def test_disabled(tiny_model, enable, store, name, prompt):
    """Everything as before, of copies too."""
    model = tiny_model("GptOss", num_local_experts=4, num_experts_per_tok=2)
    before = dict(model.__dict__)
    enable(model, store, session=name)
    assert model.config._attn_implementation == "kvfs"
    assert "generate" not in vars(copy.deepcopy(model)) or copy.deepcopy(model).generate.__self__ is not model
    enable(model, store, session=f"{name}-b")
    disable(model)
    disable(model)
    assert model.config._attn_implementation == "eager"
    assert model.__dict__.keys() == before.keys()
    greedy(model, prompt(20))
    assert names(store, name) == []
