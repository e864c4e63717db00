"""X-cache: the same tokens as Transformers alone, from half the bytes, or a clear refusal."""

import copy
import threading

import numpy as np
import pytest

pytest.importorskip("torch", reason="engine tests need torch: pip install torch transformers")
pytest.importorskip("transformers", reason="engine tests need transformers: pip install torch transformers")

import torch

import kvfs
from kvfs.engines.errors import CacheMismatch, UnsupportedModel
from kvfs.engines.transformers import KvfsCache, XCache
from kvfs.engines.x_cache.share import best_share, layers_of_share
from kvfs.engines.x_cache.x_layers import XLayers
from kvfs.errors import InvalidArgument, NvmeStatusError

MULTI_HEAD = {"num_key_value_heads": 4, "num_hidden_layers": 4}
FAMILIES = {
    "llama, multi-head": ("Llama", MULTI_HEAD),
    "llama, grouped": ("Llama", {}),
    "qwen3, norms of heads": ("Qwen3", {}),
    "phi3, one projection": ("Phi3", {"num_key_value_heads": 4}),
    "gpt-neox, partial rotation": ("GPTNeoX", {}),
    "opt, no rotation": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 128, "init_std": 0.3}),
    "gemma3, two rotations": (
        "Gemma3",
        {
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.fixture
def multi_head(tiny_model):
    return tiny_model("Llama", **MULTI_HEAD)


@pytest.fixture
def x_cache(store, name):
    """x_cache(model, share, name, ...): closed at the end of the test."""
    opened = []

    def make(model, share=0.5, own_name=name, placement="drive", in_store=store):
        opened.append(XCache(in_store, own_name, model=model, x_share=share, x_placement=placement))
        return opened[-1]

    yield make
    for cache in opened:
        cache.close()


def generate(model, ids, cache=None, num_tokens=20, **options):
    options.setdefault("attention_mask", torch.ones_like(ids))
    options.setdefault("do_sample", False)
    return model.generate(ids, past_key_values=cache, max_new_tokens=num_tokens, **options)


# -- the same tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "placement"), [(1.0, "drive"), (0.5, "host")])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family, share, placement, tiny_model, x_cache, prompt):
    """Without it: a family whose keys come out differently the second time."""
    kind, changes = FAMILIES[family]
    model = tiny_model(kind, **changes)
    ids = prompt(60, num_rows=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = generate(model, ids, attention_mask=mask)
    assert len(expected[0, 60:].unique()) > 5, "a model that repeats itself shows nothing"
    assert torch.equal(
        generate(model, ids, x_cache(model, share, placement=placement), attention_mask=mask), expected
    )


@pytest.mark.parametrize("placement", ["drive", "host"])
def test_beams(multi_head, x_cache, prompt, placement):
    """Without it: one beam's X under another's tokens."""
    ids = prompt(50)
    options = {"num_beams": 3, "num_return_sequences": 1}
    expected = generate(multi_head, ids, **options)
    assert torch.equal(generate(multi_head, ids, x_cache(multi_head, placement=placement), **options), expected)


@pytest.mark.parametrize("placement", ["drive", "host"])
def test_candidates_that_are_taken_back(multi_head, x_cache, prompt, placement):
    """Without it: X of rejected tokens attended to."""
    ids = torch.cat([prompt(30)] * 3, dim=1)
    expected = generate(multi_head, ids, num_tokens=20)
    options = {"prompt_lookup_num_tokens": 4}
    cache = x_cache(multi_head, placement=placement)
    assert torch.equal(generate(multi_head, ids, cache, num_tokens=20, **options), expected)


def test_sampling_with_a_seed(multi_head, x_cache, prompt):
    torch.manual_seed(7)
    expected = generate(multi_head, prompt(40), do_sample=True)
    torch.manual_seed(7)
    assert torch.equal(generate(multi_head, prompt(40), x_cache(multi_head), do_sample=True), expected)


@pytest.mark.parametrize("placement", ["drive", "host"])
def test_several_turns_in_chunks(multi_head, x_cache, prompt, placement):
    """Without it: a second message whose positions start anew."""
    cache = x_cache(multi_head, placement=placement)
    ids = generate(multi_head, prompt(60), cache, num_tokens=20)
    ids = torch.cat([ids, prompt(70, seed=1)], dim=1)
    expected = generate(multi_head, ids)
    assert torch.equal(generate(multi_head, ids, cache, prefill_chunk_size=16), expected)


@pytest.mark.parametrize("placement", ["drive", "host"])
def test_another_process_goes_on(multi_head, prompt, tmp_path, x_cache, placement):
    """Without it: X that only its own process understands."""
    kvfs.format(tmp_path / "drive", size="64MiB")
    with kvfs.open(tmp_path / "drive") as store:
        first = x_cache(multi_head, own_name="chat", in_store=store, placement=placement)
        ids = generate(multi_head, prompt(300), first)
        first.close()
    with kvfs.open(tmp_path / "drive") as store:
        cache = x_cache(multi_head, own_name="chat", in_store=store, placement=placement)
        assert cache.get_seq_length() == ids.shape[1] - 1
        ids = torch.cat([ids, prompt(10, seed=3)], dim=1)
        assert torch.equal(generate(multi_head, ids, cache), generate(multi_head, ids))
        cache.close()


def test_two_conversations_of_one_model(multi_head, x_cache, prompt, name):
    """Without it: rotary embeddings of the one are forgotten while the other is at work."""
    caches = [x_cache(multi_head, own_name=f"{name}-{number}") for number in range(2)]
    ids = [prompt(60, seed=number) for number in range(2)]
    for _ in range(2):
        for number, cache in enumerate(caches):
            expected = generate(multi_head, ids[number])
            ids[number] = generate(multi_head, ids[number], cache)
            assert torch.equal(ids[number], expected)


def test_bfloat16(tiny_model, x_cache, prompt):
    """X in bfloat16 is X as it was: keys and values come out as the model made them."""
    model = copy.deepcopy(tiny_model("Llama", **MULTI_HEAD)).to(torch.bfloat16)
    ids = prompt(80)
    expected, got = (
        generate(model, ids, num_tokens=10),
        generate(model, ids, x_cache(model, 1.0), num_tokens=10),
    )
    assert (expected == got).float().mean() > 0.9


def test_a_part_that_is_behind(multi_head, store, name, x_cache, prompt):
    """Without it: a process killed between two layers continues with X of other tokens than its K and V."""
    cache = x_cache(multi_head)
    ids = generate(multi_head, prompt(60), cache, num_tokens=11)
    cache.close()
    sequence = store.sequence(f"{name}-x")
    sequence.truncate(50)
    again = x_cache(multi_head)
    assert again.get_seq_length() == 50
    assert torch.equal(generate(multi_head, ids, again), generate(multi_head, ids))


# -- bytes -----------------------------------------------------------------------------------------------------


def test_half_the_bytes_cross(multi_head, x_cache, prompt, store, name):
    """X on the drive is read over the link, half as long as K and V; in host memory nothing is."""

    def read_bytes(placement):
        cache = x_cache(multi_head, 1.0, f"{name}-{placement}", placement)
        ids = generate(multi_head, prompt(600), cache, num_tokens=1)
        cache.flush()
        before = store.counters()["link"]["bytes_from_drive"]
        generate(multi_head, ids, cache, num_tokens=8)
        return store.counters()["link"]["bytes_from_drive"] - before

    x_bytes = 4 * 128 * 4  # of a token, in all layers: half of K and V
    assert 0.9 < read_bytes("drive") / (8 * 600 * x_bytes) < 1.3
    assert read_bytes("host") < 600 * x_bytes / 10


def test_the_next_layers_are_computed_ahead(multi_head, x_cache, prompt, monkeypatch):
    """Without it: the drive waits for X and X for the drive, and nothing is gained."""
    threads = []
    compute = XLayers._keys_and_values

    def noted(self, *args):
        threads.append(threading.current_thread().name)
        return compute(self, *args)

    monkeypatch.setattr(XLayers, "_keys_and_values", noted)
    generate(multi_head, prompt(60), x_cache(multi_head), num_tokens=20)
    ahead = [name for name in threads if name.startswith("kvfs-x-computer")]
    assert len(ahead) > 0.8 * len(threads) > 20


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.1, 1.1, "half", None, True])
def test_shares_that_are_none(multi_head, x_cache, share):
    with pytest.raises(InvalidArgument, match="x_share is a number from 0 to 1"):
        x_cache(multi_head, share)


def test_an_unknown_placement(multi_head, x_cache):
    with pytest.raises(InvalidArgument, match="x_placement is one of drive, host"):
        x_cache(multi_head, placement="moon")


def test_rotary_embeddings_that_change_with_the_length(tiny_model, x_cache):
    """Without it: keys of old tokens turned by the angles of today."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("Llama", rope_parameters=rope, **MULTI_HEAD)
    with pytest.raises(UnsupportedModel, match="change with the length"):
        x_cache(model)


def test_a_dtype_that_the_store_has_not(tiny_model, x_cache):
    model = copy.deepcopy(tiny_model("Llama", **MULTI_HEAD)).to(torch.float64)
    with pytest.raises(UnsupportedModel, match="float64"):
        x_cache(model)


def test_keys_that_come_out_differently(tiny_model, x_cache, prompt):
    """Without it: a module that is not a function of its inputs gives wrong tokens without a word."""
    model = copy.deepcopy(tiny_model("Llama", **MULTI_HEAD))
    calls = iter(range(1000))
    model.model.layers[3].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: out * (1 + next(calls))
    )
    with pytest.raises(UnsupportedModel, match="cannot be computed anew"):
        generate(model, prompt(40), x_cache(model))


def test_another_share_than_stored(multi_head, x_cache, prompt):
    generate(multi_head, prompt(40), x_cache(multi_head, 0.5))
    for share in (0.0, 1.0):
        with pytest.raises(CacheMismatch, match="another x_share"):
            x_cache(multi_head, share)


def test_a_sequence_of_an_ordinary_cache(multi_head, store, name, x_cache, prompt):
    generate(multi_head, prompt(40), KvfsCache(store, name))
    with pytest.raises(CacheMismatch, match="or cache"):
        x_cache(multi_head)


def test_compiled_models_are_refused(tiny_model, x_cache, prompt):
    model = copy.deepcopy(tiny_model("Llama", **MULTI_HEAD))
    cache = x_cache(model)
    model.compile(backend="eager")
    with pytest.raises(UnsupportedModel, match="compile"), torch.no_grad():
        model(prompt(8), past_key_values=cache, use_cache=True)


def test_damage_is_an_error(multi_head, tmp_path, prompt, x_cache):
    """Without it: K and V computed from damaged X, or a thread whose exceptions nobody sees."""
    path = tmp_path / "drive"
    kvfs.format(path, size="64MiB")
    with kvfs.open(path, writeback_tokens=1) as store:
        cache = x_cache(multi_head, 1.0, own_name="chat", in_store=store)
        ids = generate(multi_head, prompt(300), cache, num_tokens=2)
        cache.close()
        sequence = store.sequence("chat-x")
        lba = sequence._groups[0].base_lba + sequence._layout.layer_lbas
        page = int(store._drive.ftl.resolve(np.array([lba]))[0])
        place = store._drive.ftl.media.layout.data_start + page * 4096 + 99
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))
    with kvfs.open(path) as store:
        cache = x_cache(multi_head, 1.0, own_name="chat", in_store=store)
        with pytest.raises(NvmeStatusError) as raised:
            generate(multi_head, ids, cache)
        assert raised.value.lba == lba


# -- formulas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "drive", "group_size", "placement", "share"),
    [
        (1e9, 1e9, 1, "drive", 1.0),
        (1e9, 3e9, 1, "drive", 0.5),  # 2 * 1 / (3 + 1)
        (1e9, 3e9, 2, "drive", 0.0),  # X is as long as K and V
        (1e9, 3e9, 8, "drive", 0.0),
        (1e9, 2e9, 1, "host", 0.5),  # 2 * 1 / (2 + 2 * 1)
        (1e9, 1e9, 4, "host", 1 / 3),
    ],
)
def test_the_best_share(link, drive, group_size, placement, share):
    assert best_share(link, drive, group_size, placement) == pytest.approx(share)


def test_shares_of_impossible_machines():
    for arguments in ((0, 1, 1), (1, -1, 1), (1, 1, 0), (1, float("nan"), 1)):
        with pytest.raises(InvalidArgument):
            best_share(*arguments)


@pytest.mark.parametrize(
    ("share", "num_layers", "layers"),
    [(0.5, 4, [1, 3]), (0, 4, []), (1, 3, [0, 1, 2]), (2 / 3, 6, [1, 2, 4, 5]), (0.25, 8, [3, 7])],
)
def test_layers_of_a_share(share, num_layers, layers):
    assert layers_of_share(share, num_layers) == layers
