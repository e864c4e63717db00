"""torch in and out: bfloat16 tensors as they are, results into tensors of one's own, no copies on the way."""

import tempfile
from pathlib import Path

import torch

import kvfs


def main(folder: Path) -> None:
    drive = folder / "drive.kvfs"
    kvfs.format(drive, size="64MiB")
    keys, values = torch.randn(2, 500, 2, 64).bfloat16()
    with kvfs.open(drive) as store:
        model = store.add_model(
            "demo", num_layers=1, num_query_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16"
        )
        sequence = store.create_sequence(model, "chat-42")
        sequence.append(0, keys, values)

        again = torch.empty_like(keys), torch.empty_like(values)
        sequence.read(0, out=again)  # NumPy has no bfloat16 to return: into tensors
        assert torch.equal(again[0], keys) and torch.equal(again[1], values)

        queries = torch.randn(1, 1, 8, 64).bfloat16()
        out, lse = torch.empty(1, 1, 8, 64), torch.empty(1, 1, 8)
        store.attend(0, queries, [sequence], out=(out, lse))

        wanted = torch.nn.functional.scaled_dot_product_attention(
            queries[0].transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), enable_gqa=True
        )
        difference = (out[0].transpose(0, 1) - wanted.float()).abs().max().item()
        print(f"largest difference to torch's own attention in bfloat16: {difference:.4f}")
        assert difference < 0.02

        # what comes without `out` is NumPy, which torch and others take by DLPack
        print(torch.from_dlpack(store.attend(0, queries, [sequence])[0]).shape)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
