"""Readers beside a writer: reading holds no lock while flash is read."""

import errno
import io
import threading

import numpy as np

from kvfs.tree import FileError
from tests.unit.kvfs.conftest import NUM_LAYERS, random_kv

PATH = "kv/m/a/layer_01/kv_head_01/keys.npy"
NUM_ROUNDS = 60


def test_readers_beside_a_writer(client, store):
    """Blocks that a cut has given up are another's soon: a reader gets its snapshot or ESTALE, never theirs."""
    sequence = store.create_sequence(store.model("m"), "a")
    other = store.create_sequence(store.model("m"), "other")
    changing = threading.Lock()  # held while the sequence and what is expected of it differ
    expected = np.zeros((0, 64), np.float16)
    is_over = threading.Event()
    problems, num_whole = [], [0]

    def read():
        while not is_over.is_set():
            with changing:
                size, handle, wanted = client.walk(PATH).size, client.open(PATH), expected
            try:
                found = np.load(io.BytesIO(client.read_handle(handle, size, piece_bytes=30_000)))
                num_whole[0] += 1
                if not np.array_equal(found, wanted):
                    problems.append(f"{len(wanted)} tokens are not as they were")
            except FileError as error:
                if error.errno != errno.ESTALE:
                    problems.append(str(error))
            client.tree.release(handle)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    random = np.random.default_rng(0)
    try:
        for number in range(NUM_ROUNDS):
            keys, values = random_kv(int(random.integers(1, 700)), seed=number)
            with changing:
                for layer in range(NUM_LAYERS):
                    sequence.append(layer, keys, values)
                expected = np.concatenate([expected, keys[:, 1].astype(np.float16)])
            if number % 3 == 2:
                with changing:
                    num_tokens = int(random.integers(0, len(expected)))
                    sequence.truncate(num_tokens)
                    expected = expected[:num_tokens]
                store.flush()  # what was cut off is free from here on
                other.truncate(0)
                for layer in range(NUM_LAYERS):
                    other.append(layer, *random_kv(600, seed=1000 + number))
    finally:
        is_over.set()
        for reader in readers:
            reader.join()
    assert not problems
    assert num_whole[0] > 0
