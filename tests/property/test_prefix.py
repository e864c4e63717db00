"""The longest stored prefix against a plain dictionary, through forks, truncations, deletions and restarts."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvfs

GROUP = 4
TENANTS = ("", "red")
NUM_LAYERS = 2
ALPHABET = st.integers(0, 1)  # so that prompts share prefixes
TOKENS = st.lists(ALPHABET, min_size=1, max_size=3 * GROUP)


def rows_of(tokens, layer: int):
    """Keys and values that say which tokens came before: float32 [num_tokens, 1, 32]."""
    past = np.cumsum(np.asarray(tokens, np.float32) + 1 + layer)[:, None, None]
    return np.broadcast_to(past, (len(tokens), 1, 32)), np.broadcast_to(-past, (len(tokens), 1, 32))


class PrefixMachine(RuleBasedStateMachine):
    """tokens: of each sequence, all flushed after each rule; published: of each sequence, the tenants of each
    of its groups' entries, as sets that those who share the group share."""

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "drive.kvfs")
        kvfs.format(self.path, "24MiB")
        self.store = None
        self.tokens: dict[str, list[int]] = {}
        self.entries: dict[str, list[set[str]]] = {}  # of whole groups
        self.publishing: dict[str, str] = {}
        self.next_name = 0
        self._open()

    def _open(self):
        self.store = kvfs.open(self.path, cache_bytes="8MiB", num_workers=1, worker="reference")
        shape = {"num_query_heads": 1, "num_kv_heads": 1, "head_dim": 32, "dtype": "float32"}
        self.model = self.store.add_model("m", num_layers=NUM_LAYERS, group_tokens=GROUP, **shape)

    def teardown(self):
        if getattr(self, "store", None):
            self.store.close()
            self.folder.cleanup()

    def _new_name(self) -> str:
        self.next_name += 1
        return f"s{self.next_name}"

    def _settle(self, name: str) -> None:
        """A flush: new groups are the sequence's own, and get its tenant's entry."""
        self.store.sequence(name).flush()
        entries = self.entries[name]
        del entries[len(self.tokens[name]) // GROUP :]
        entries.extend(set() for _ in range(len(self.tokens[name]) // GROUP - len(entries)))
        if name in self.publishing:
            for tenants in entries:
                tenants.add(self.publishing[name])

    def _append(self, name: str, tokens: list[int]) -> None:
        old, sequence = self.tokens[name], self.store.sequence(name)
        for layer in range(NUM_LAYERS):
            keys, values = rows_of(old + tokens, layer)
            sequence.append(layer, keys[len(old) :], values[len(old) :])
        sequence.append_tokens(tokens)
        self.tokens[name] = old + tokens
        self._settle(name)

    def _expected(self, prompt: list[int], tenant: str) -> int:
        best = 0
        for name, tokens in self.tokens.items():
            count = 0
            for position, tenants in enumerate(self.entries[name]):
                part = slice(position * GROUP, (position + 1) * GROUP)
                if tenant not in tenants or tokens[part] != prompt[part]:
                    break
                count = position + 1
            best = max(best, count)
        return best * GROUP

    @rule(tokens=TOKENS)
    def create(self, tokens):
        name = self._new_name()
        self.store.create_sequence(self.model, name)
        self.tokens[name], self.entries[name] = [], []
        self._append(name, tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), tokens=TOKENS)
    def append(self, data, tokens):
        self._append(data.draw(st.sampled_from(sorted(self.tokens))), tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), tenant=st.sampled_from(TENANTS))
    def publish(self, data, tenant):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        assert self.store.sequence(name).publish(tenant) == len(self.tokens[name]) // GROUP * GROUP
        self.publishing[name] = tenant
        self._settle(name)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        name, child = data.draw(st.sampled_from(sorted(self.tokens))), self._new_name()
        self.store.sequence(name).fork(child)
        self.tokens[child], self.entries[child] = self.tokens[name], list(self.entries[name])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        keep = data.draw(st.integers(0, len(self.tokens[name])))
        self.store.sequence(name).truncate(keep)
        self.tokens[name] = self.tokens[name][:keep]
        self._settle(name)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        self.store.delete_sequence(name)
        self.store.flush()
        del self.tokens[name], self.entries[name]
        self.publishing.pop(name, None)

    @rule()
    def restart(self):
        self.store.close()
        self._open()

    @rule(tenant=st.sampled_from(TENANTS))
    def drop(self, tenant):
        self.store.drop_prefixes(tenant)
        for entries in self.entries.values():
            for tenants in entries:
                tenants.discard(tenant)
        self.publishing = {name: other for name, other in self.publishing.items() if other != tenant}

    @rule(prompt=st.lists(ALPHABET, max_size=6 * GROUP), tenant=st.sampled_from((*TENANTS, "green")))
    def find(self, prompt, tenant):
        assert self.store.find_prefix(self.model, prompt, tenant).num_tokens == self._expected(prompt, tenant)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), tenant=st.sampled_from(TENANTS), more=TOKENS)
    def restore(self, data, tenant, more):
        prompt = self.tokens[data.draw(st.sampled_from(sorted(self.tokens)))] + more
        match = self.store.find_prefix(self.model, prompt, tenant)
        assert match.num_tokens == self._expected(prompt, tenant)
        name = self._new_name()
        sequence = self.store.restore_prefix(match, name)
        source = next(
            (
                other
                for other, row in ((n, self.store.sequence(n)) for n in self.tokens)
                if match.num_tokens and row._groups[:1] == sequence._groups[:1]
            ),
            None,
        )
        self.tokens[name] = prompt[: match.num_tokens]
        self.entries[name] = self.entries[source][: match.num_tokens // GROUP] if source else []
        if source:
            groups = self.store.sequence(source)._groups[: len(self.entries[name])]
            assert [group.id for group in groups] == [group.id for group in sequence._groups]
        for layer in range(NUM_LAYERS):
            for found, wanted in zip(sequence.read(layer), rows_of(self.tokens[name], layer), strict=True):
                assert np.array_equal(found, wanted)
        assert sequence.tokens.tolist() == self.tokens[name]

    @invariant()
    def consistent(self):
        if getattr(self, "store", None):
            assert self.store._catalogue.problems() == self.store._catalogue.prefixes.leftovers() == []


PrefixMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
test_longest_prefix = PrefixMachine.TestCase
