"""The list of the RTL's mutations follows its code: one that is stale, or no Python, shows nothing."""

from collections import Counter

import pytest

from tests.crash.mutations import ROOT, find
from tests.unit.accel.fpga.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_is_one_line_broken(mutation):
    assert find(mutation, ROOT) == 1
    text = (ROOT / mutation.file).read_text()
    broken = text.replace(mutation.old, mutation.new)
    assert broken != text
    compile(broken, mutation.file, "exec")


def test_names_are_of_one_mutation_each():
    assert Counter(mutation.name for mutation in MUTATIONS).most_common(1)[0][1] == 1
