"""The benchmark of resumed prompts at its smallest: that it runs and keeps its schema, never how fast."""

from dataclasses import replace

import pytest

from kvfs_bench import resume
from kvfs_bench.figures import report
from kvfsctl.demo_document import MODEL_DIR

torch = pytest.importorskip("torch", reason="bench resume needs torch: pip install kvfs[transformers]")
pytest.importorskip("transformers", reason="bench resume needs transformers: pip install kvfs[transformers]")


def test_schema_and_names(tmp_path, monkeypatch):
    """Figures compared over time: a name that vanishes breaks every comparison."""
    monkeypatch.setattr(resume, "_run", lambda turn, session: resume._turn(replace(turn, session=session)))
    ids = torch.randint(1, 4096, (1024 + resume.WARM_UP_TOKENS,), generator=torch.Generator().manual_seed(0))
    figures = {
        figure["name"]: figure
        for figure in report("resume", resume.measure(tmp_path, MODEL_DIR, ids.tolist(), True))["figures"]
    }
    for way in ("same_session", "other_session"):
        assert figures[f"resume.{way}.first_token"]["rival_value"] > 0
        assert figures[f"resume.{way}.speedup"]["goal"] == 5
        assert figures[f"resume.{way}.reused"]["value"] == 1023
    assert figures["resume.open_drive"]["value"] > 0
    assert list(tmp_path.iterdir()) == []
