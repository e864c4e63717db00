"""The KV tree against NumPy arrays: whatever is appended, cut off, forked, renamed or removed, in any order."""

import errno
import io
import os
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

import kvfs
from kvfs.kv_tree.tree import KvTree
from kvfs.tree import FileError
from tests.unit.kvfs.kv_tree.client import ME, Client

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, GROUP_TOKENS = 2, 2, 40, 64  # pages with slack, groups of few pages
NAMES = st.sampled_from(["a", "b", "c", "d"])
LENGTHS = st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(0, 200))


class KvTreeMachine(RuleBasedStateMachine):
    """expected: by name, KV [layer, K | V, token, head, dim] as it must be read."""

    snapshots = Bundle("snapshots")

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "drive.kvfs"
        kvfs.format(path, "48MiB")
        self.store = kvfs.open(path, cache_bytes="8MiB", num_workers=1)
        self.model = self.store.add_model(
            "m", num_layers=NUM_LAYERS, num_query_heads=2, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM,
            dtype="float32", group_tokens=GROUP_TOKENS,
        )  # fmt: skip
        self.client = Client(KvTree(self.store))
        self.expected: dict[str, np.ndarray] = {}
        self.random = np.random.default_rng(0)

    def teardown(self):
        self.store.close()
        self.folder.cleanup()

    def is_there(self, name):
        return name in self.expected

    @rule(name=NAMES)
    def make(self, name):
        place = self.client.place(f"kv/m/{name}")
        if self.is_there(name):
            try:
                self.client.tree.make_folder(*place, 0o755, ME)
            except FileError as error:
                assert error.errno == errno.EEXIST
                return
            raise AssertionError("made twice")
        self.store.create_sequence(self.model, name)
        self.expected[name] = np.zeros((NUM_LAYERS, 2, 0, NUM_KV_HEADS, HEAD_DIM), np.float32)

    @rule(name=NAMES, num_tokens=LENGTHS)
    def append(self, name, num_tokens):
        if not self.is_there(name):
            return
        shape = (NUM_LAYERS, 2, num_tokens, NUM_KV_HEADS, HEAD_DIM)
        new = self.random.standard_normal(shape, np.float32)
        for layer in range(NUM_LAYERS):
            self.store.sequence(name).append(layer, *new[layer])
        self.expected[name] = np.concatenate([self.expected[name], new], axis=2)

    @rule(name=NAMES, share=st.floats(0, 1))
    def truncate(self, name, share):
        if self.is_there(name):
            num_tokens = int(share * self.expected[name].shape[2])
            self.store.sequence(name).truncate(num_tokens)
            self.expected[name] = self.expected[name][:, :, :num_tokens]

    @rule(name=NAMES, child=NAMES, by_copy=st.booleans())
    def fork(self, name, child, by_copy):
        if not self.is_there(name) or self.is_there(child):
            return
        if by_copy:
            source = self.client.open(f"kv/m/{name}/sequence.safetensors")
            target = self.client.create(f"kv/m/{child}.safetensors")
            self.client.tree.copy_range(source, 0, target, 0, 1 << 40)
            self.client.tree.flush(target)
            self.client.tree.release(target)
        else:
            self.store.sequence(name).fork(child)
        self.expected[child] = self.expected[name]

    @rule(name=NAMES, child=NAMES)
    def copy(self, name, child):
        if self.is_there(name) and not self.is_there(child):
            data = self.client.read(f"kv/m/{name}/sequence.safetensors")
            self.client.write(f"kv/m/{child}.safetensors", data)
            self.expected[child] = self.expected[name]

    @rule(name=NAMES)
    def remove(self, name):
        if self.is_there(name):
            self.client.tree.remove_folder(*self.client.place(f"kv/m/{name}"))
            del self.expected[name]

    @rule(name=NAMES, new_name=NAMES)
    def rename(self, name, new_name):
        if self.is_there(name) and not self.is_there(new_name):
            folder = self.client.inode("kv/m")
            self.client.tree.rename(folder, os.fsencode(name), folder, os.fsencode(new_name), 0)
            self.expected[new_name] = self.expected.pop(name)

    @precondition(lambda self: self.expected)
    @rule(target=snapshots, name=NAMES, layer=st.integers(0, 1), head=st.integers(0, 1))
    def open(self, name, layer, head):
        """Open keys.npy, to be read later."""
        if not self.is_there(name):
            return None
        path = f"kv/m/{name}/layer_{layer:02}/kv_head_{head:02}/keys.npy"
        size = self.client.walk(path).size
        return self.client.open(path), size, self.expected[name][layer, 0, :, head].copy()

    @rule(snapshot=snapshots)
    def read_snapshot(self, snapshot):
        """What was open is what it was, or ESTALE, never anything else."""
        if snapshot is None:
            return
        handle, size, rows = snapshot
        try:
            data = self.client.read_handle(handle, size)
        except FileError as error:
            assert error.errno == errno.ESTALE
            return
        assert np.array_equal(np.load(io.BytesIO(data)), rows)

    @rule()
    def flush(self):
        self.store.flush()

    @invariant()
    def files_are_the_arrays(self):
        assert self.client.names("kv/m") == ["model.json", *sorted(self.expected)]
        for name, rows in self.expected.items():
            layer, kind, head = self.random.integers(0, 2, 3)
            kind_name = ("keys", "values")[kind]
            found = self.client.load(f"kv/m/{name}/layer_{layer:02}/kv_head_{head:02}/{kind_name}.npy")
            assert np.array_equal(found, rows[layer, kind, :, head])


TestKvTree = KvTreeMachine.TestCase
TestKvTree.settings = settings(
    deadline=None, max_examples=12, stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
