"""`enable`: generate() begins with what is stored, and its tokens are those of Transformers, always."""

import copy
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install kvfs[transformers]")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install kvfs[transformers]")

import torch

import kvfs
from kvfs.engines.transformers import disable
from tests.engines.answers import WAYS, greedy, names, plain

GROUP = 256


class Computed:
    """How many tokens the model has taken in, by call."""

    def __init__(self, model):
        self.counts = []
        self._hook = model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: self.counts.append(inputs[0].shape[1])
        )

    def __enter__(self):
        return self.counts

    def __exit__(self, *exception):
        self._hook.remove()


# -- reuse -----------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_where_it_was(llama, enable, store, name, prompt):
    """Without it: each message of a chat has the whole conversation computed again."""
    session = enable(llama, store, session=name)
    ids = prompt(600)
    for turn in range(3):
        expected = plain(llama, ids)
        with Computed(llama) as counts:
            assert torch.equal(greedy(llama, ids), expected)
        assert counts == [600 if turn == 0 else 31] + [1] * 11
        assert session.last.is_kept and (turn == 0) == (session.last.num_tokens == 0)
        ids = torch.cat([expected, prompt(30, seed=turn)], dim=1)
    assert names(store, name) == [name]


def test_resumed_by_another_process(tiny_model, enable, tmp_path, prompt):
    """Without it: what was computed yesterday is computed again today."""
    kvfs.format(tmp_path / "drive.kvfs", size="64MiB")
    script = """if True:
        import sys
        sys.path[:0] = sys.argv[1:]
        import torch, kvfs
        from conftest import tiny
        from kvfs.engines.transformers import enable
        model = tiny("Llama")
        ids = torch.randint(1, 97, (1, 600), generator=torch.Generator().manual_seed(0))
        with kvfs.open("drive.kvfs", cache_bytes="8MiB") as store:
            enable(model, store, session="chat-42")
            print(model.generate(ids, max_new_tokens=12, do_sample=False).tolist())
    """
    folders = [str(tmp_path.parent), *sys.path]
    from_folder = __file__.rpartition("/")[0]
    output = subprocess.run(
        [sys.executable, "-c", script, from_folder, *folders],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    model = tiny_model("Llama")
    ids, expected = prompt(600), plain(model, prompt(600))
    assert output.strip() == str(expected.tolist())
    with kvfs.open(tmp_path / "drive.kvfs", cache_bytes="8MiB") as store:
        for name, num_new in (("chat-42", 1), ("another", 600 - 2 * GROUP)):
            session = enable(model, store, session=name, tenant="")
            with Computed(model) as counts:
                assert torch.equal(greedy(model, ids), expected)
            assert counts[0] == num_new
            assert session.last.num_tokens == 600 - num_new
        disable(model)


def test_a_prompt_of_whole_groups(llama, enable, store, name, prompt):
    """All of it is stored, but the last token has to go through the model: nobody asks it otherwise."""
    ids = prompt(2 * GROUP)
    expected = plain(llama, ids)
    for session in (name, f"{name}-other"):
        enable(llama, store, session=session)
        assert torch.equal(greedy(llama, ids), expected)


def test_a_prompt_that_turns_off(llama, enable, store, name, prompt):
    """A message edited: what comes before it is reused, what came after it is not."""
    session = enable(llama, store, session=name)
    first = prompt(600)
    greedy(llama, first)
    second = first.clone()
    second[0, 400] = first[0, 400] % 96 + 1
    assert torch.equal(greedy(llama, second), plain(llama, second))
    assert session.last.num_tokens == 400
    assert torch.equal(greedy(llama, first), plain(llama, first))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate(sdpa_or_eager, enable, store, name, prompt, way):
    """After nothing, after a restored prefix, after what it left itself: the tokens of Transformers."""
    model = sdpa_or_eager
    if way == "drafts of its own first layer" and model.config.model_type == "gpt_oss":
        pytest.skip("Transformers itself fails: its cache has as many layers as layer_types")
    generate, options = WAYS[way]
    ids = prompt(150).repeat(1, 2)
    expected = plain(model, ids, generate, **options)
    session = enable(model, store, session=name)
    for reused in (0, 299):
        assert torch.equal(generate(model, ids, **options), expected)
        assert session.last.num_tokens == reused
    enable(model, store, session=f"{name}-b")
    assert torch.equal(generate(model, ids, **options), expected)
    assert names(store, name) == [name, f"{name}-b"]


def test_a_draft_model(llama, enable, tiny_model, store, name, prompt):
    """Both enabled, each with a session of its own."""
    draft = tiny_model("Qwen2")
    ids = prompt(300)
    expected = plain(llama, ids)
    enable(llama, store, session=name)
    enable(draft, store, session=f"{name}-draft")
    for _ in range(2):
        assert torch.equal(greedy(llama, ids, assistant_model=draft), expected)


def test_batches(llama, enable, store, name, prompt):
    """Rows begin with as much as is stored of all of them."""
    ids = prompt(400, num_rows=2)
    ids[1, :300] = ids[0, :300]
    session = enable(llama, store, session=name)
    greedy(llama, ids[:1])
    for reused in (GROUP, 399):
        assert torch.equal(greedy(llama, ids), plain(llama, ids))
        assert session.last.num_tokens == reused
    assert names(store, name) == [name, f"{name}.0", f"{name}.1"]


@pytest.mark.parametrize("with_mask", [True, False])
def test_padding_is_not_kept(llama, enable, store, name, prompt, with_mask):
    """Ids do not tell what was computed of a padded prompt: whoever took it would get other tokens."""
    ids = prompt(300, num_rows=2)
    ids[0, :40] = 0
    mask = (ids != 0).long() if with_mask else None
    session = enable(llama, store, session=name)
    for _ in range(2):
        assert torch.equal(greedy(llama, ids, attention_mask=mask), plain(llama, ids, attention_mask=mask))
        assert not session.last.num_tokens and not session.last.is_kept
    assert names(store, name) == []


def test_what_is_no_matter_of_ids(llama, enable, store, name, prompt):
    """Embeddings and positions of one's own: computed, neither looked for nor kept."""
    ids = prompt(300)
    enable(llama, store, session=name)
    greedy(llama, ids)
    shifted = {"position_ids": torch.arange(300)[None] * 2}
    assert torch.equal(greedy(llama, ids, **shifted), plain(llama, ids, **shifted))
    embeds = {"inputs_embeds": llama.get_input_embeddings()(prompt(300, seed=1))}
    generate = lambda model, _, **options: model.generate(max_new_tokens=8, do_sample=False, **options)  # noqa: E731
    assert torch.equal(generate(llama, None, **embeds), plain(llama, None, generate, **embeds))
    assert names(store, name) == [name] and store.sequence(name).num_tokens == 311


# -- never another's K/V ---------------------------------------------------------------------------------------


def other_weights(model):
    torch.manual_seed(5)
    other = type(model)(model.config).eval()
    other.generation_config = model.generation_config
    return other


def last_layer_tuned(model):
    other = copy.deepcopy(model)
    other.model.layers[-1].mlp.down_proj.weight.data *= 1.5
    return other


def other_positions(model):
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] *= 4
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    return other


def in_half(model):
    return copy.deepcopy(model).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "miss"),
    [
        (other_weights, "other_model"),
        (last_layer_tuned, "other_model"),
        (other_positions, "other_settings"),
        (in_half, "other_dtype"),
    ],
)
@pytest.mark.parametrize("same_session", [True, False])
def test_another_model(llama, enable, store, name, prompt, change, miss, same_session):
    """Same shapes, same ids, other keys: a miss that says why, and right tokens."""
    ids = prompt(600)
    enable(llama, store, session=name)
    greedy(llama, ids)
    other = change(llama)
    session = enable(other, store, session=name if same_session else f"{name}-b")
    for reused in (0, 599):
        assert torch.equal(greedy(other, ids), plain(other, ids))
        assert session.last.num_tokens == reused
        assert session.last.miss == (None if reused else miss)
    rows = store.counters()["prefix"]["tenants"]
    assert sum(row[f"miss_{miss}"] for row in rows if row["tenant"] == name) == 1


def test_another_storage_dtype(llama, enable, store, name, prompt):
    """Rounded keys are not taken for exact ones."""
    ids = prompt(600)
    enable(llama, store, session=name, dtype="float16")
    greedy(llama, ids)
    session = enable(llama, store, session=name)
    assert torch.equal(greedy(llama, ids), plain(llama, ids))
    assert (session.last.num_tokens, session.last.miss) == (0, "other_dtype")


def tokenizer_of(words):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))


def test_another_tokenizer(llama, enable, store, name, prompt):
    """Its ids mean other text: what they find is another model's by all that is known of it."""
    ids = prompt(600)
    for words, miss in (("abc", "unknown"), ("acb", "other_settings"), ("abc", None)):
        session = enable(llama, store, session=f"{name}-{miss}", tokenizer=tokenizer_of(words))
        greedy(llama, ids)
        assert session.last.miss in (miss, "unknown")  # the end of a prompt is never found by groups
        assert session.last.num_tokens == (2 * GROUP if miss is None else 0)


def test_weights_that_change_while_enabled(llama, enable, store, name, prompt):
    """An adapter merged in between: what the model computed before is not its own any more."""
    model = copy.deepcopy(llama)
    session = enable(model, store, session=name)
    ids = prompt(600)
    greedy(model, ids)
    model.model.layers[0].self_attn.k_proj.weight.data *= 1.2
    assert torch.equal(greedy(model, ids), plain(model, ids))
    assert session.last.num_tokens == 0


def test_another_tenant_finds_nothing(llama, enable, store, name, prompt):
    """Neither under the same session's name nor under another."""
    ids = prompt(600)
    for session_name, tenant in ((name, "a"), (name, "b"), (f"{name}-c", "c")):
        session = enable(llama, store, session=session_name, tenant=f"{name} {tenant}")
        greedy(llama, ids)
        assert session.last.num_tokens == 0 and session.last.is_kept
