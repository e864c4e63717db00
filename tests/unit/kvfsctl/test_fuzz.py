"""All verbs with arguments that make no sense: a traceback tells an administrator nothing."""

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.kvfsctl.fuzzing import command_line, complaint_about, leaves, make_places


def test_no_traceback(tmp_path_factory, monkeypatch):
    """Whatever is given, a verb ends with a code of the table and at most one line."""
    folder = tmp_path_factory.mktemp("fuzz")
    make_places(folder)
    monkeypatch.chdir(folder)
    verbs = leaves()

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, (1 << 32) - 1))
    def run(seed: int) -> None:
        line = command_line(random.Random(seed), verbs)
        assert complaint_about(line) is None, line

    run()
