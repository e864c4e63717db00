"""An attention worker of your own: NumPy in float32 over float16 pages; the rest is left to the definition.

A worker is a module with a name and two functions; tools/guides/workers.md says more. This file is one.
"""

import ctypes
import tempfile
from pathlib import Path

import numpy as np

import kvfs
from accel.workers import WORKERS, AttentionBatch, UnitRange, check_shape, reference

name = "mine"


def rows_of(pages: np.ndarray, num_rows: np.ndarray, head_dim: int) -> np.ndarray:
    """float32 [sum of num_rows, head_dim]: rows in use, which stand at the beginning of each page."""
    return np.concatenate(
        [
            np.frombuffer((ctypes.c_char * (rows * head_dim * 2)).from_address(address), np.float16)
            for address, rows in zip(pages.tolist(), num_rows.tolist(), strict=True)
        ]
    ).reshape(-1, head_dim).astype(np.float32)  # fmt: skip


def attend_units(batch: AttentionBatch, units: UnitRange, out: np.ndarray, lse: np.ndarray) -> None:
    is_plain = not (batch.softcap or len(batch.alibi_slopes) or len(batch.page_first_row))
    if batch.dtype != "float16" or not is_plain:
        reference.attend_units(batch, units, out, lse)
        return
    for unit in units:  # other threads take units of the same range meanwhile
        pages = slice(int(batch.unit_first_page[unit]), int(batch.unit_first_page[unit + 1]))
        num_rows, first = batch.page_num_tokens[pages], batch.page_first_token[pages]
        keys = rows_of(batch.key_pages[pages], num_rows, batch.head_dim)
        values = rows_of(batch.value_pages[pages], num_rows, batch.head_dim)
        position = np.concatenate([np.arange(a, a + n) for a, n in zip(first, num_rows, strict=True)])
        item, first_head = batch.unit_item[unit], batch.unit_kv_head[unit] * batch.group_size
        queries = batch.queries[
            item, :, first_head : first_head + batch.group_size
        ]  # [queries, heads, head_dim]
        scores = batch.scale * queries @ keys.T
        seen = (position >= batch.visible_start[item][:, None]) & (position < batch.visible_stop[item][:, None])
        scores = np.where(seen[:, None], scores, -np.inf)
        top = np.maximum(scores.max(axis=-1, keepdims=True), np.finfo(np.float32).min)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        out[unit] = weights @ values / np.maximum(total, np.finfo(np.float32).tiny)
        with np.errstate(divide="ignore"):
            lse[unit] = (top + np.log(total))[..., 0]  # -inf where a query sees nothing


def prepare(dtype: str, head_dim: int, group_size: int) -> float:
    check_shape(dtype, head_dim, group_size)
    return 0.0  # seconds of compiling


def answer(drive: Path, worker: str, queries: np.ndarray) -> np.ndarray:
    with kvfs.open(drive, worker=worker) as store:
        out, _ = store.attend(0, queries, [store.sequence("chat-42")], window=700)
        return out


def main(folder: Path) -> None:
    random = np.random.default_rng(0)
    drive = folder / "drive.kvfs"
    kvfs.format(drive, size="64MiB")
    with kvfs.open(drive) as store:
        model = store.add_model("demo", num_layers=1, num_query_heads=8, num_kv_heads=2, head_dim=64)
        sequence = store.create_sequence(model, "chat-42")
        sequence.append(0, *random.standard_normal((2, 1000, 2, 64), np.float32))
        sequence.flush()
    queries = random.standard_normal((1, 1, 8, 64), np.float32)
    WORKERS[name] = __name__
    difference = np.abs(answer(drive, name, queries) - answer(drive, "reference", queries)).max()
    print(f"own worker beside the definition: differs by less than 1e-5: {difference < 1e-5}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
