"""Fixtures of the engine tests: stores that spill early, and tiny models with random weights.

torch and transformers are imported where they are used: without them the test modules skip themselves.
"""

import itertools

import pytest

import kvfs

VOCABULARY = 97


@pytest.fixture(scope="session")
def drive_path(tmp_path_factory):
    """A drive for all tests of the session; each test has sequences of its own."""
    path = tmp_path_factory.mktemp("engines") / "drive.kvfs"
    kvfs.format(path, size="256MiB")
    return path


@pytest.fixture(scope="module")
def store(drive_path):
    """An open store that writes every full page at once: even short sequences are mostly on the drive."""
    with kvfs.open(drive_path, cache_bytes="32MiB", writeback_tokens=1) as opened:
        yield opened


_names = itertools.count()


@pytest.fixture
def name():
    """A sequence name that no other test uses."""
    return f"chat-{next(_names)}"


def tiny(family, **changes):
    """A model of the family (a prefix such as "Llama") with random weights, ready for generate()."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    text_config = getattr(transformers, f"{family}TextConfig", None)
    config_class = text_config or getattr(transformers, f"{family}Config")
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,  # large: otherwise greedy tokens barely depend on the context
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**settings | changes)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="session")
def tiny_model():
    """The factory `tiny`, which keeps what it made."""
    made = {}

    def get(family, **changes):
        key = family, repr(sorted(changes.items()))
        if key not in made:
            made[key] = tiny(family, **changes)
        return made[key]

    return get


@pytest.fixture
def prompt():
    """prompt(num_tokens, num_rows=1, seed=0): random ids without the pad token."""
    import torch

    def make(num_tokens, num_rows=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, VOCABULARY, (num_rows, num_tokens), generator=generator)

    return make
