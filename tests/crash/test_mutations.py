"""The list of mutations follows the code: one that is stale, or that only breaks the syntax, shows nothing."""

from collections import Counter

import pytest

from .mutation_list import MUTATIONS
from .mutations import ROOT, WANTED, Outcome, find, score

LEAST = 60


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_is_one_line_broken(mutation):
    """A text that is gone, or there twice, or whose replacement is no Python: nothing would be shown by it."""
    assert find(mutation, ROOT) == 1
    text = (ROOT / mutation.file).read_text()
    broken = text.replace(mutation.old, mutation.new)
    assert broken != text
    compile(broken, mutation.file, "exec")


def test_the_list_is_long():
    """A list that shrinks to what is killed anyway, or two mutations of one name."""
    assert len(MUTATIONS) >= LEAST
    assert Counter(mutation.name for mutation in MUTATIONS).most_common(1)[0][1] == 1


def test_score():
    """Survivors that do not lower the score, or stale ones that raise it."""
    states = ["killed"] * 3 + ["survived"] + ["stale"] * 4
    assert score([Outcome(MUTATIONS[0], state, "", 0.0) for state in states]) == 0.75
    assert score([]) == 0
    assert 0.9 < WANTED < 1
