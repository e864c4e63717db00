"""A drive on another machine, by NVMe/TCP: its flash, cache and attention are there, the store is here."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import kvfs

NQN = "nqn.2026-11.io.example:drive"


def main(folder: Path) -> None:
    drive = folder / "drive.kvfs"
    kvfs.format(drive, size="64MiB")
    serve = [sys.executable, "-m", "kvfsctl", "serve", str(drive), "--listen", "127.0.0.1:0", "--nqn", NQN]
    server = subprocess.Popen([*serve, "--json"], stdout=subprocess.PIPE, text=True)
    try:
        facts = ""
        for line in server.stdout:
            facts += line
            if line.startswith("}"):
                break
        location = f"nvme+tcp://127.0.0.1:{json.loads(facts)['port']}/{NQN}"
        with kvfs.open(location) as store:
            model = store.add_model("demo", num_layers=1, num_query_heads=8, num_kv_heads=2, head_dim=64)
            sequence = store.create_sequence(model, "chat-42")
            rows = np.random.default_rng(0).standard_normal((600, 2, 64)).astype(np.float16)
            sequence.append(0, rows, rows)
            out, _ = store.attend(0, np.ones((1, 1, 8, 64), np.float32), [sequence])  # computed there
            print(f"{location}: {sequence.num_tokens} tokens, out {out.shape}")
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
