"""Fixtures of the engine tests: stores that spill early, and tiny models with random weights.

torch and transformers are imported where they are used: without them the test modules skip themselves.
"""

import contextlib
import itertools
import json
import os

import pytest

import kvfs
from kvfs.remote.remote_store import RemoteStore
from kvfs.remote.server import RemoteServer
from kvfs.tree import Caller

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
        "num_hidden_layers": 2,
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
def llama(tiny_model):
    """A tiny model with grouped-query attention."""
    return tiny_model("Llama")


@pytest.fixture(params=["Llama", "GptOss"])
def sdpa_or_eager(request, tiny_model):
    """A model whose attention sdpa computes, and one with sinks, which has to go on without it."""
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2} if request.param == "GptOss" else {}
    return tiny_model(request.param, **changes)


@pytest.fixture
def enable(name):
    """Transformers' `enable` for a tenant of the test's own; undone at its end."""
    from kvfs.engines import transformers

    models = []

    def enable_for_now(model, store, **options):
        models.append(model)
        return transformers.enable(model, store, **{"tenant": name, **options})

    yield enable_for_now
    for model in models:
        transformers.disable(model)


@pytest.fixture
def prompt():
    """prompt(num_tokens, num_rows=1, seed=0): random ids without the pad token."""
    import torch

    def make(num_tokens, num_rows=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, VOCABULARY, (num_rows, num_tokens), generator=generator)

    return make


@pytest.fixture(scope="session")
def client_of():
    """client_of(store, folder): a client of a store, as kvfs.open of a mounted folder gives."""

    @contextlib.contextmanager
    def client(store, folder):
        (folder / ".kvfs").mkdir(parents=True)
        with RemoteServer(store, folder / "socket") as server:
            invitation = server.invite(Caller(os.geteuid(), os.getegid(), os.getpid()))
            assert "token" in json.loads(invitation)
            (folder / ".kvfs" / "connect").write_bytes(invitation)
            with kvfs.open(folder) as remote:
                assert isinstance(remote, RemoteStore)
                yield remote

    return client
