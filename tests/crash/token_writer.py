"""A process that appends, truncates, forks and flushes without end, until it or its drive is killed."""

import subprocess
import sys
import textwrap

import numpy as np

import kvfs

WRITER = textwrap.dedent(
    """
    import sys
    import numpy as np
    import kvfs

    path, seed = sys.argv[1], int(sys.argv[2])
    random = np.random.default_rng(seed)

    def rows(start, count):
        # row t holds t and the layer, so a reader can tell right from wrong
        return np.broadcast_to(np.arange(start, start + count, dtype=np.float32)[:, None, None], (count, 2, 32))

    with kvfs.open(path, cache_bytes="8MiB", num_workers=1, worker="reference", writeback_tokens=64) as store:
        shape = dict(num_layers=2, num_query_heads=2, num_kv_heads=2, head_dim=32)
        model = store.add_model("m", dtype="float32", **shape)
        names = [row.name for row in store.catalogue_rows()]
        sequence = store.sequence("s") if "s" in names else store.create_sequence(model, "s")
        print("ready", flush=True)
        round_number = 0
        while True:
            round_number += 1
            if sequence.num_tokens > 3000:
                keep = int(random.integers(0, 1000))
                sequence.truncate(keep)
                sequence.flush()
                print("flushed", keep, flush=True)
            start, count = sequence.num_tokens, int(random.integers(1, 400))
            print("flushing", start + count, flush=True)  # a fork may make it durable before the flush does
            for layer in range(2):
                sequence.append(layer, rows(start, count), rows(start, count) + layer)
            if random.random() < 0.5:
                scratch = f"scratch-{round_number}"
                fork = sequence.fork(scratch)
                fork.append(0, rows(0, 100), rows(0, 100))
                store.delete_sequence(scratch)
            sequence.flush()
            print("flushed", start + count, flush=True)
    """
)


def start_writer(location, seed) -> subprocess.Popen:
    """The process, once it is at work."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(location), str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # communicate() reads the pipe itself: what a buffer took with the first line would be lost
    )
    assert writer.stdout.readline() == b"ready\n"
    return writer


def check_what_is_left(location, flushed: int, output: bytes) -> int:
    """Open the drive after the writer's end: nothing that was flushed is missing, nothing is wrong.

    flushed: tokens before this writer; output: what it printed. Returns the tokens that are there now.
    """
    under_way = None
    for line in output.decode().split("\n")[:-1]:  # a line cut short says nothing
        word, count = line.split()
        if word == "flushed":
            flushed, under_way = int(count), None
        else:
            under_way = int(count)
    with kvfs.open(location, cache_bytes="8MiB", worker="reference") as store:
        assert store.check() == []
        rows = {row.name: row for row in store.catalogue_rows()}
        if "s" not in rows:
            assert flushed == 0
            return 0
        sequence = store.sequence("s")
        # a truncation or an append whose flush was under way may or may not have happened
        assert sequence.num_tokens in {flushed, under_way} or sequence.num_tokens < 1000
        flushed = sequence.num_tokens
        for layer in range(2):
            keys, values = sequence.read(layer)
            np.testing.assert_array_equal(keys[:, 0, 0], np.arange(flushed))
            np.testing.assert_array_equal(values[:, 1, 5], np.arange(flushed) + layer)
        return flushed
