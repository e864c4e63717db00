"""A drive, a sequence, attention over it, and the same tomorrow: the store in one screen."""

import tempfile
from pathlib import Path

import numpy as np

import kvfs

NUM_TOKENS, NUM_KV_HEADS, NUM_QUERY_HEADS, HEAD_DIM = 1000, 2, 8, 64


def main(folder: Path) -> None:
    random = np.random.default_rng(0)
    drive = folder / "drive.kvfs"
    kvfs.format(drive, size="64MiB")
    with kvfs.open(drive) as store:
        model = store.add_model(
            "demo", num_layers=2, num_query_heads=NUM_QUERY_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM
        )
        sequence = store.create_sequence(model, "chat-42")
        for layer in range(model.num_layers):
            keys, values = random.standard_normal((2, NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM), np.float32)
            sequence.append(layer, keys, values)
        sequence.flush()  # from here on it survives a power cut

    queries = random.standard_normal((1, 1, NUM_QUERY_HEADS, HEAD_DIM), np.float32)
    with kvfs.open(drive) as store:
        sequence = store.sequence("chat-42")
        out, lse = store.attend(0, queries, [sequence])  # computed in the drive
        print(f"{sequence.num_tokens} tokens, out {out.shape}, lse {lse.shape}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
