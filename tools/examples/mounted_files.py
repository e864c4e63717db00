"""A mounted drive: the KV cache as NPY files, and the store interface from other processes."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import kvfs

KVFSCTL = [sys.executable, "-m", "kvfsctl"]


def main(folder: Path) -> None:
    drive, mountpoint = folder / "drive.kvfs", folder / "mount"
    kvfs.format(drive, size="64MiB")
    mountpoint.mkdir()
    subprocess.run([*KVFSCTL, "mount", drive, mountpoint], check=True)
    try:
        with kvfs.open(mountpoint) as store:  # through shared memory, as any number of processes may
            model = store.add_model("demo", num_layers=2, num_query_heads=8, num_kv_heads=2, head_dim=64)
            sequence = store.create_sequence(model, "chat-42")
            rows = np.random.default_rng(0).standard_normal((300, 2, 64)).astype(np.float16)
            for layer in range(2):
                sequence.append(layer, rows, rows)

        file = mountpoint / "kv" / "demo" / "chat-42" / "layer_01" / "kv_head_00" / "keys.npy"
        keys = np.load(file)
        assert (keys == rows[:, 0]).all()
        print(f"{file.relative_to(mountpoint)}: {keys.dtype} {keys.shape}")
    finally:
        subprocess.run([*KVFSCTL, "umount", mountpoint], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
