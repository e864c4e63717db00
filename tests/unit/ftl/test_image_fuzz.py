"""Damaged images: whatever the bytes, one clear error or an opening that tells the truth, never a crash.

KVFS_FUZZ_IMAGES=10000 for the long run, KVFS_FUZZ_SEED to replay one.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ftl.direct_io.api import crc32c_records
from ftl.drive_layout import HEADERS_BYTES, DriveLayout
from ftl.errors import FormatVersionTooNew, NandRuleViolation, NotADrive, ReadOnlyMedia, TruncatedDrive
from ftl.geometry import Geometry
from ftl.layout import BLOCK_BYTES, DRIVE_HEADER, ERASE_BLOCK, OOB_MAGIC, PAGE_OOB
from ftl.media_file import FileMedia
from spdk_glue import dma

NUM_IMAGES = int(os.environ.get("KVFS_FUZZ_IMAGES", "300"))
FIRST_SEED = int(os.environ.get("KVFS_FUZZ_SEED", "0"))
GEOMETRY = Geometry(num_channels=2, pages_per_erase_block=4, num_superblocks=24)
PAGES = np.arange(20)
REFUSALS = (NotADrive, FormatVersionTooNew, TruncatedDrive)


def program(media, pages):
    buffer = dma.allocate(len(pages) * GEOMETRY.page_size)
    buffer.view("<u8").reshape(len(pages), -1)[:] = pages[:, None] + 1
    oob = np.zeros(len(pages), PAGE_OOB)
    oob["magic"], oob["lba"] = OOB_MAGIC, pages
    media.program(pages, dma.page_addresses(buffer, GEOMETRY.page_size), oob)


@pytest.fixture(scope="module")
def folder():
    """Memory where there is some to write files to: thousands of synced images would wear a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def image(folder):
    """The bytes of a drive with content, wear and a bad block."""
    path = folder / "whole"
    media = FileMedia.create(path, GEOMETRY)
    program(media, PAGES)
    media.erase(5)
    media.mark_bad(6, np.array([1]))
    media.close()
    return np.frombuffer(path.read_bytes(), np.uint8)


class Mutation:
    """One way to damage an image. What it leaves alone: `header`, `table`, `oob`, `data`."""

    def __init__(self, image, random):
        self.random, self.bytes = random, image.copy()
        layout = DriveLayout.read("image", image[:HEADERS_BYTES].tobytes())
        self.areas = {
            "header": (0, HEADERS_BYTES),
            "table": (
                layout.table_start,
                layout.table_start + GEOMETRY.num_erase_blocks * ERASE_BLOCK.itemsize,
            ),
            "oob": (layout.oob_start, layout.oob_end),
            "data": (layout.data_start, layout.size_bytes),
        }
        names = ("noise", "bit_flip", "zeros", "truncate", "lie", "copy_over")
        self.name = str(random.choice(names))
        getattr(self, self.name)()
        changed = np.zeros(len(image), bool)
        changed[: len(self.bytes)] = self.bytes[: len(image)] != image[: len(self.bytes)]
        changed[len(self.bytes) :] = True
        self.touched = {name for name, (start, stop) in self.areas.items() if changed[start:stop].any()}
        self.copies_touched = [bool(changed[start : start + BLOCK_BYTES].any()) for start in (0, BLOCK_BYTES)]

    def place(self, length):
        """Somewhere in one of the areas, all equally likely however large."""
        start, stop = self.areas[str(self.random.choice(list(self.areas)))]
        at = int(self.random.integers(start, max(stop - length, start + 1)))
        return slice(at, min(at + length, len(self.bytes)))

    def noise(self):
        for _ in range(int(self.random.integers(1, 4))):
            place = self.place(int(self.random.choice([1, 4, 16, 300, 5000])))
            self.bytes[place] = self.random.integers(0, 256, place.stop - place.start, np.uint8)

    def bit_flip(self):
        self.bytes[self.place(1)] ^= 1 << int(self.random.integers(8))

    def zeros(self):
        self.bytes[self.place(int(self.random.choice([16, 64, 4096, 9000])))] = 0

    def truncate(self):
        self.bytes = self.bytes[
            : int(self.random.choice([0, 1, 4096, 8192, self.random.integers(len(self.bytes))]))
        ]

    def lie(self):
        """A field with another value and a checksum that holds, in one copy or both."""
        fields = [name for name in DRIVE_HEADER.names if DRIVE_HEADER[name].kind == "u" and name != "crc32c"]
        copies = self.random.choice([[0], [1], [0, 1]][int(self.random.integers(3))], 2)
        for field in self.random.choice(fields, int(self.random.integers(1, 4))):
            limit = (1 << (DRIVE_HEADER[field].itemsize * 8)) - 1
            value = [0, 1, limit, limit // 2, int(self.random.integers(1 << 20)), int(self.random.integers(64))]
            for copy in set(copies.tolist()):
                header = self.bytes[copy * BLOCK_BYTES : (copy + 1) * BLOCK_BYTES].view(DRIVE_HEADER)
                header[field] = value[int(self.random.integers(len(value)))]
                header["crc32c"] = crc32c_records(header.copy())

    def copy_over(self):
        """Blocks of the image in the place of others: a misdirected write of the disk below."""
        source = int(self.random.integers(len(self.bytes) // BLOCK_BYTES)) * BLOCK_BYTES
        start = self.place(1).start // BLOCK_BYTES * BLOCK_BYTES
        self.bytes[start : start + BLOCK_BYTES] = self.bytes[source : source + BLOCK_BYTES].copy()


def exercise(media):
    """Everything a layer above may ask. What the flash holds may be nonsense; errors must be ours."""
    size = media.geometry.pages_per_superblock
    assert media.bad_blocks().shape == (media.geometry.num_superblocks, media.geometry.num_planes)
    assert len(media.erase_counts()) == len(media.bad_superblocks()) == media.geometry.num_superblocks
    for superblock in media.programmed_superblocks().tolist():
        assert len(media.read_oob(superblock)) == size
    with suppress(NandRuleViolation, ReadOnlyMedia):
        media.mark_bad(3, np.array([0]))
        media.erase(3)
        media.erase(7)
        program(media, 7 * size + np.arange(size))
    media.sync()


def check(path, image, seed):
    """One mutated image: raises AssertionError, or whatever should not have come out."""
    mutation = Mutation(image, np.random.default_rng(seed))
    path.write_bytes(mutation.bytes.tobytes())
    try:
        media = FileMedia.open(path)
    except REFUSALS as error:
        assert str(path) in str(error) or isinstance(error, FormatVersionTooNew)
        assert "\n" not in str(error)
        whole = len(mutation.bytes) >= len(image)
        lied_of_version = isinstance(error, FormatVersionTooNew) and mutation.name == "lie"
        assert lied_of_version or not whole or all(mutation.copies_touched), f"refused for no reason: {error}"
        return "refused"
    try:
        if media.geometry == GEOMETRY:
            assert media.read_only or "table" not in mutation.touched, "damage of the table unnoticed"
            buffer = dma.allocate(len(PAGES) * GEOMETRY.page_size)
            media.read(PAGES, dma.page_addresses(buffer, GEOMETRY.page_size))
            if "data" not in mutation.touched:
                words = buffer.view("<u8").reshape(len(PAGES), -1)
                assert (words == PAGES[:, None] + 1).all(), "other content than was written"
        exercise(media)
        return "read-only" if media.read_only else "opened"
    finally:
        media.close()


def test_mutated_images(image, folder, caplog):
    """Damage must be told or harmless: a crash, or an answer made up from it, would lose the caller's data."""
    outcomes = {"refused": 0, "read-only": 0, "opened": 0}
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_IMAGES):
        try:
            outcomes[check(folder / "image", image, seed)] += 1
        except BaseException as error:
            error.add_note(f"KVFS_FUZZ_SEED={seed} KVFS_FUZZ_IMAGES=1 replays it")
            raise
        caplog.clear()
    print(outcomes)
    assert NUM_IMAGES < 100 or all(outcomes.values())
