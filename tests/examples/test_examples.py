"""The examples run as they are written: whoever begins with one that fails does not come back."""

import importlib.util
import runpy
from pathlib import Path

import pytest

from accel import workers
from kvfs.mount.mountpoints import FUSE_DEVICE

EXAMPLES = Path(__file__).resolve().parents[2] / "tools" / "examples"
SAYS = {
    "attend": "1000 tokens, out (1, 1, 8, 64), lse (1, 1, 8)",
    "prefix_reuse": "second: 90 of 602 tokens computed",
    "async_server": "6 conversations, batches of up to ",
    "torch_tensors": "torch.Size([1, 1, 8, 64])",
    "mounted_files": "keys.npy: float16 (300, 64)",
    "chat_resumed": "71 of 76 tokens were on the drive; same tokens: True",
    "own_worker": "differs by less than 1e-5: True",
    "remote_drive": "600 tokens, out (1, 1, 8, 64)",
}
NEEDS = {"torch_tensors": ["torch"], "chat_resumed": ["torch", "transformers"]}


def test_all_are_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SAYS.keys()


@pytest.mark.parametrize("name", SAYS)
def test_example(name, capfd, monkeypatch):
    """It runs to its end and says what it should."""
    monkeypatch.setattr(workers, "WORKERS", dict(workers.WORKERS))  # an example adds one
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install kvfs[transformers]")
    if name == "mounted_files" and not FUSE_DEVICE.exists():
        pytest.skip(f"{FUSE_DEVICE} is not there")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capfd.readouterr().out
