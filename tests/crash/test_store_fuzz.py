"""Damaged drives opened through the whole store: a clear error, or a store whose every read is right or is one.

Where checksums hold over other content, or OOB is damaged by blocks, the drive cannot know; then only what kind
of errors come out is looked at. tests/unit/ftl/test_page_chain.py has what is promised of single records.

KVFS_FUZZ_IMAGES=10000 for the long run, KVFS_FUZZ_SEED to replay one.
"""

import logging
import os
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import kvfs
from ftl.direct_io.api import crc32c_pages, crc32c_records
from ftl.drive_layout import HEADERS_BYTES, DriveLayout
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, DRIVE_HEADER, PAGE_OOB
from kvfs.embedded_drive import DriveConfig, format_drive, open_drive
from kvfs.errors import KvfsError
from kvfs.formatting import format_volume
from spdk_glue import dma
from spdk_glue.status import NvmeError

from .token_content import MODEL_SHAPES

NUM_IMAGES = int(os.environ.get("KVFS_FUZZ_IMAGES", "150"))
FIRST_SEED = int(os.environ.get("KVFS_FUZZ_SEED", "0"))
FOUND_SEEDS = (316, 597)  # SQLite's own error at opening; parity that names no members
OPTIONS = {"cache_bytes": 8 << 20, "num_workers": 1, "worker": "reference", "writeback_tokens": 8}
METADATA_LBAS = (44, 40)
CLEAR = (KvfsError, NvmeError)


def make_geometry(parity: int) -> Geometry:
    return Geometry(num_channels=4, pages_per_erase_block=8, num_superblocks=20, parity=parity)


@pytest.fixture(scope="module")
def folder():
    """Memory where there is some to write files to: thousands of synced images would wear a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module", params=[0, 1], ids=["plain", "parity"])
def image(request, folder):
    """(bytes of a drive, what its sequences hold): words per layer and token ids, by name."""
    path = folder / f"whole-{request.param}"
    format_drive(path, 0, make_geometry(request.param))
    drive = open_drive(path, DriveConfig(8 << 20, 1, "reference"))
    format_volume(drive, path, METADATA_LBAS)
    drive.close()
    held, next_stamp = {}, 1
    with kvfs.open(path, **OPTIONS) as store:
        for number, shape in enumerate(MODEL_SHAPES[:3]):
            sequence = store.create_sequence(store.add_model(shape.name, **shape.arguments), f"s{number}")
            stamps = np.arange(next_stamp, next_stamp + 50 + 40 * number, dtype=np.uint32)
            next_stamp += len(stamps)
            for part in np.array_split(stamps, 3):
                for layer in range(shape.num_layers):
                    sequence.append(layer, *shape.rows(layer, part))
                sequence.append_tokens(part)
                store.flush()
            words = [shape.words(layer, stamps) for layer in range(shape.num_layers)]
            held[f"s{number}"] = words, stamps
        store.create_sequence(store.models()[0], "gone")
        store.delete_sequence("gone")
    return np.frombuffer(path.read_bytes(), np.uint8), held


class Mutation:
    """One way to damage a drive's file. is_forged: the drive cannot know of it."""

    def __init__(self, image: np.ndarray, random: np.random.Generator):
        self.random, self.bytes, self.is_forged = random, image.copy(), False
        self.layout = DriveLayout.read("image", image[:HEADERS_BYTES].tobytes())
        geometry = self.layout.geometry
        oob = [self._oob(image, superblock) for superblock in range(geometry.num_superblocks)]
        self.programmed = np.flatnonzero(np.concatenate(oob)["magic"])
        ways = (
            self.noise,
            self.noise_in_page,
            self.noise_in_page,
            self.bit_flip,
            self.truncate,
            self.grow,
            self.no_header,
            self.lie_in_header,
            self.lie_in_oob,
            self.forge_page,
            self.exchange_pages,
            self.zero_blocks,
        )
        way = ways[random.integers(len(ways))]
        self.name = way.__name__
        for _ in range(1 if way == self.truncate else int(random.integers(1, 4))):
            way()
        oob = slice(self.layout.oob_start, self.layout.oob_end)
        self.is_forged |= self.bytes[oob].tobytes() != image[oob].tobytes()

    def _oob(self, image: np.ndarray, superblock: int) -> np.ndarray:
        start = self.layout.oob_of(superblock)
        return image[start : start + self.layout.geometry.pages_per_superblock * PAGE_OOB.itemsize].view(
            PAGE_OOB
        )

    def _record(self, page: int) -> np.ndarray:
        """PAGE_OOB [1] of a page, to be changed."""
        superblock, index = divmod(page, self.layout.geometry.pages_per_superblock)
        return self._oob(self.bytes, superblock)[index : index + 1]

    def _page(self, page: int) -> np.ndarray:
        size = self.layout.geometry.page_size
        return self.bytes[self.layout.data_start + page * size :][:size]

    def _any_page(self) -> int:
        return int(self.random.choice(self.programmed))

    def _fill(self, target: np.ndarray) -> None:
        target[:] = self.random.integers(0, 256, len(target), np.uint8)

    def noise(self) -> None:
        layout = self.layout
        areas = ((0, HEADERS_BYTES), (layout.table_start, layout.oob_start), (layout.oob_start, layout.oob_end))
        start, stop = areas[self.random.integers(len(areas))]
        at, length = int(self.random.integers(start, stop)), int(self.random.choice([1, 8, 64, 5000]))
        self._fill(self.bytes[at : at + length])

    def noise_in_page(self) -> None:
        page = self._page(self._any_page())
        at = int(self.random.integers(len(page)))
        self._fill(page[at : at + int(self.random.choice([1, 16, 4096]))])

    def bit_flip(self) -> None:
        self.bytes[self.random.integers(len(self.bytes))] ^= 1 << int(self.random.integers(8))

    def truncate(self) -> None:
        self.bytes = self.bytes[: int(self.random.integers(len(self.bytes) + 1))]
        self.is_forged = True

    def grow(self) -> None:
        more = np.zeros(int(self.random.integers(1, 1 << 16)), np.uint8)
        self._fill(more)
        self.bytes = np.concatenate([self.bytes, more])

    def no_header(self) -> None:
        self.bytes[: int(self.random.choice([16, BLOCK_BYTES, HEADERS_BYTES]))] = 0

    def lie_in_header(self) -> None:
        """A version or geometry that is not this drive's, with a checksum that holds."""
        self.is_forged = True
        names = [name for name in DRIVE_HEADER.names if DRIVE_HEADER[name].kind == "u" and name != "crc32c"]
        name = str(self.random.choice(names))
        limit = (1 << (DRIVE_HEADER[name].itemsize * 8)) - 1
        value = [0, 1, 2, 3, 8, limit, limit // 2, int(self.random.integers(1 << 20))][self.random.integers(8)]
        for start in (0, BLOCK_BYTES):
            header = self.bytes[start : start + BLOCK_BYTES].view(DRIVE_HEADER)
            header[name] = value
            header["crc32c"] = crc32c_records(header.copy())

    def lie_in_oob(self) -> None:
        """A record that holds and says something else."""
        record = self._record(self._any_page())
        name = str(self.random.choice([name for name in PAGE_OOB.names if name not in ("magic", "oob_crc32c")]))
        limit = (1 << (PAGE_OOB[name].itemsize * 8)) - 1
        value = [0, 1, limit, limit // 2, int(self.random.integers(300)), int(record[name][0]) + 1]
        record[name] = value[self.random.integers(len(value))] & limit
        record["oob_crc32c"] = crc32c_records(record.copy())

    def forge_page(self) -> None:
        """Other content with checksums that hold: the catalogue, the log, a checkpoint."""
        self.is_forged = True
        page = self._any_page()
        payload = self._page(page)
        at = int(self.random.integers(len(payload)))
        self._fill(payload[at : at + int(self.random.choice([1, 4, 100]))])
        record = self._record(page)
        record["payload_crc32c"] = crc32c_of(payload)
        record["oob_crc32c"] = crc32c_records(record.copy())

    def exchange_pages(self) -> None:
        """Payloads of two pages change places."""
        first, second = self._page(self._any_page()), self._page(self._any_page())
        first[:], second[:] = second.copy(), first.copy()

    def zero_blocks(self) -> None:
        start = int(self.random.integers(len(self.bytes) // BLOCK_BYTES)) * BLOCK_BYTES
        self.bytes[start : start + BLOCK_BYTES * int(self.random.integers(1, 4))] = 0


def crc32c_of(payload: np.ndarray) -> int:
    copy = dma.allocate(len(payload))
    copy[:] = payload
    return int(crc32c_pages(dma.page_addresses(copy, len(copy)), len(copy))[0])


def is_clear(error: Exception) -> bool:
    return isinstance(error, CLEAR) and bool(str(error)) and "\n" not in str(error)


def read_all(store, held, is_forged: bool) -> int:
    """How many of the sequences are right; raises what is neither that nor a clear error."""
    num_right = 0
    names = [row.name for row in store.catalogue_rows()]
    assert is_forged or sorted(names) == sorted(held), f"the store holds {names}"
    for name in names:
        try:
            sequence = store.sequence(name)
            found = [np.stack(sequence.read(layer)) for layer in range(sequence.model.num_layers)]
            tokens = sequence.tokens
        except CLEAR as error:
            assert is_clear(error), repr(error)
            continue
        if not is_forged:
            words, stamps = held[name]
            assert all(np.array_equal(a.view(b.dtype), b) for a, b in zip(found, words, strict=True)), name
            assert np.array_equal(tokens, stamps), name
        num_right += 1
    return num_right


def use(store) -> None:
    """What a user might go on with."""
    for line in store.check():
        assert "\n" not in line
    shape = MODEL_SHAPES[3]
    sequence = store.create_sequence(store.add_model(shape.name, **shape.arguments), "new")
    sequence.append(0, *shape.rows(0, np.arange(40, dtype=np.uint32)))
    store.flush()
    assert np.array_equal(
        np.stack(sequence.read(0)).view(shape.word), shape.words(0, np.arange(40, dtype=np.uint32))
    )


def check(path: Path, image: np.ndarray, held, seed: int) -> str:
    """One mutated image: how it ended."""
    mutation = Mutation(image, np.random.default_rng(seed))
    path.write_bytes(mutation.bytes.tobytes())
    try:
        store = kvfs.open(path, **OPTIONS)
    except CLEAR as error:
        assert is_clear(error), repr(error)
        return "refused"
    try:
        num_right = read_all(store, held, mutation.is_forged)
        use(store)
        store.close()
    except CLEAR as error:
        assert is_clear(error), repr(error)
        return "error"
    finally:
        with suppress(*CLEAR):
            store.close()
    return "whole" if num_right == len(held) else "damaged"


def test_mutated_drives(image, folder):
    """A crash, a hang, somebody else's tokens, or an error that only the developers understand."""
    outcomes: Counter[str] = Counter()
    logging.disable(logging.CRITICAL)
    try:
        for seed in (*range(FIRST_SEED, FIRST_SEED + NUM_IMAGES), *FOUND_SEEDS):
            try:
                outcomes[check(folder / "image", *image, seed)] += 1
            except BaseException as error:
                error.add_note(f"KVFS_FUZZ_SEED={seed} KVFS_FUZZ_IMAGES=1 replays it")
                raise
    finally:
        logging.disable(logging.NOTSET)
    print(dict(outcomes))
    assert NUM_IMAGES < 100 or all(outcomes[end] for end in ("refused", "whole"))
