"""Two prompts that begin alike: the second computes only what the first has not; forks share what they have."""

import tempfile
from pathlib import Path

import numpy as np

import kvfs


def prefill(sequence: kvfs.Sequence, token_ids: list[int]) -> None:
    """What an engine does: keys and values of the tokens that the sequence does not have yet."""
    new = np.array(token_ids[sequence.num_tokens :])
    for layer in range(sequence.model.num_layers):
        rows = np.repeat(np.sin(new + layer), 2 * 64).reshape(-1, 2, 64).astype(np.float16)
        sequence.append(layer, rows, rows)
    sequence.append_tokens(new)
    print(f"{sequence.name}: {len(new)} of {len(token_ids)} tokens computed")


def main(folder: Path) -> None:
    drive = folder / "drive.kvfs"
    kvfs.format(drive, size="64MiB")
    system_prompt = list(range(600))
    with kvfs.open(drive) as store:
        model = store.add_model("demo", num_layers=2, num_query_heads=8, num_kv_heads=2, head_dim=64)
        first = store.create_sequence(model, "first")
        prefill(first, [*system_prompt, 7, 7, 7])
        first.publish(tenant="acme")

    with kvfs.open(drive) as store:  # after a restart
        model = store.model("demo")
        prompt = [*system_prompt, 8, 8]
        match = store.find_prefix(model, prompt, tenant="acme")
        second = store.restore_prefix(match, "second")  # shares whole groups of 256 tokens, copies nothing
        prefill(second, prompt)
        print(f"another tenant finds {store.find_prefix(model, prompt, tenant='other').num_tokens} tokens")

        for beam in range(3):  # beams, samples, agents: each goes on by itself
            fork = second.fork(f"beam-{beam}")
            prefill(fork, [*prompt, 100 + beam])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
