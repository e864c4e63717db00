"""Engines that only know paths, unmodified, with what they keep in the mount."""

import importlib.util
import json
import subprocess
import sys

import pytest

from kvfsctl.demo_document import MODEL_DIR


def test_transformers_keeps_models_there(drive_mount, kvfsctl, drive):
    """save_pretrained and from_pretrained, in shards, again after a restart: the same weights and tokens."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch transformers")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    folder = drive_mount.mountpoint / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    ids = torch.arange(40)[None]
    options = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert drive_mount.stop() == 0
    try:
        kvfsctl("mount", drive, drive_mount.mountpoint, check=True)
        found = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for name, weight in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], weight), name
        assert torch.equal(found.generate(ids, **options), expected)
    finally:
        kvfsctl("umount", drive_mount.mountpoint)


def test_safetensors_maps_files_there(drive_mount):
    """The library's own reader maps its files: whole tensors and slices of them."""
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np
    from safetensors import safe_open

    tensors = {"a": np.arange(1 << 18, dtype=np.float32).reshape(512, -1), "b": np.ones(3, np.int8)}
    path = drive_mount.mountpoint / "file.safetensors"
    numpy.save_file(tensors, path)
    with safe_open(path, "numpy") as file:
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor)
        np.testing.assert_array_equal(file.get_slice("a")[100:200, 7:], tensors["a"][100:200, 7:])


@pytest.mark.skipif(importlib.util.find_spec("lmcache") is None, reason="needs LMCache: pip install lmcache")
@pytest.mark.parametrize("adapter", ["fs", "fs_native"])
@pytest.mark.parametrize("is_direct", [False, True])
def test_lmcache_keeps_chunks_there(drive_mount, adapter, is_direct):
    """LMCache's own check of its file adapters: what is stored is found and comes back as it was."""
    folder = str(drive_mount.mountpoint / "chunks")
    target = {"type": adapter, "base_path": folder, "use_odirect": is_direct}
    command = [sys.executable, "-m", "lmcache.cli.main", "bench", "l2", "--l2-adapter", json.dumps(target)]
    command += ["--num-keys", "8", "--data-size-kb", "1024", "--rounds", "2", "--no-skip-verify"]
    command += ["--lookup-max-hit-rate", "1.0", "--l1-align-bytes", "4096", "--format", "json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = result.stdout
    assert found.count('"total_success": 16') == 3, found  # stored, looked up and loaded
