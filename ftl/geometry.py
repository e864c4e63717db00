"""The shape of a drive's flash, and how physical pages are numbered.

A stripe is one page on every plane of the drive; a superblock is the same erase-block index on all planes,
written stripe by stripe. Pages are numbered in that order:

    page = superblock * pages_per_superblock + page_in_erase_block * num_planes + plane

so consecutive pages of a superblock use every channel in turn and lie side by side in a backing file. Planes
are numbered channel first, then die, then plane of the die:

    plane % num_dies = die, die % num_channels = channel
"""

from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20

PAGE_SIZE_MIN, PAGE_SIZE_MAX = 4 * KIB, 64 * KIB
CAPACITY_MIN = 16 * MIB
# A superblock is the unit of collection: small against a sequence, large against a request.
SUPERBLOCK_MIN, SUPERBLOCK_MAX = 1 * MIB, 16 * MIB
SUPERBLOCKS_WANTED = 128
PARITY_DIES_MAX = 32  # a parity page's OOB has a bit for each


@dataclass(frozen=True)
class Geometry:
    """Checked on construction; ValueError names the field."""

    page_size: int = 4096
    num_channels: int = 8
    dies_per_channel: int = 1
    planes_per_die: int = 1
    pages_per_erase_block: int = 256
    num_superblocks: int = 64
    spare_percent: int = 7  # of the flash, kept from the logical blocks: see provisioning.py
    parity: int = 0  # 1: a page of every row is parity across dies

    def __post_init__(self):
        for name, value in vars(self).items():
            lowest = 0 if name == "parity" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        if self.spare_percent > 50:
            raise ValueError(f"spare_percent must be 1 to 50, not {self.spare_percent}")
        if self.parity > 1 or (self.parity and not 2 <= self.num_dies <= PARITY_DIES_MAX):
            raise ValueError(f"parity is 0, or 1 on a drive of 2 to {PARITY_DIES_MAX} dies, not {self.parity}")
        if self.page_size & (self.page_size - 1) or not PAGE_SIZE_MIN <= self.page_size <= PAGE_SIZE_MAX:
            raise ValueError(f"page_size must be a power of two from 4 KiB to 64 KiB, not {self.page_size}")
        if self.num_superblocks < 8:
            raise ValueError(f"num_superblocks must be at least 8, not {self.num_superblocks}")
        if self.num_pages >= 1 << 48:
            raise ValueError(f"num_superblocks: {self.num_pages} pages are more than 2**48")

    @property
    def num_planes(self) -> int:
        """Planes of the whole drive: pages in a stripe, erase blocks in a superblock."""
        return self.num_channels * self.dies_per_channel * self.planes_per_die

    @property
    def num_dies(self) -> int:
        """Dies of the whole drive; die d has the planes d, d + num_dies, and so on."""
        return self.num_channels * self.dies_per_channel

    @property
    def pages_per_superblock(self) -> int:
        return self.num_planes * self.pages_per_erase_block

    @property
    def superblock_bytes(self) -> int:
        return self.pages_per_superblock * self.page_size

    @property
    def num_pages(self) -> int:
        return self.num_superblocks * self.pages_per_superblock

    @property
    def capacity_bytes(self) -> int:
        return self.num_pages * self.page_size

    @property
    def num_erase_blocks(self) -> int:
        """Erase blocks are numbered superblock * num_planes + plane."""
        return self.num_superblocks * self.num_planes

    @classmethod
    def for_capacity(cls, size_bytes: int, page_size: int = 4096, **options: int) -> "Geometry":
        """A geometry of at most size_bytes of physical flash. options: spare_percent, parity.

        The superblock is about size / 128, from 1 MiB to 16 MiB. Raises ValueError below 16 MiB.
        """
        if size_bytes < CAPACITY_MIN:
            raise ValueError(f"a drive needs at least {CAPACITY_MIN // MIB} MiB, not {size_bytes} bytes")
        wanted = min(max(size_bytes // SUPERBLOCKS_WANTED, SUPERBLOCK_MIN), SUPERBLOCK_MAX)
        superblock_bytes = 1 << (wanted.bit_length() - 1)
        shape = cls(page_size=page_size)
        pages_per_erase_block = max(1, superblock_bytes // (page_size * shape.num_planes))
        superblock_bytes = pages_per_erase_block * page_size * shape.num_planes
        return cls(
            page_size=page_size,
            pages_per_erase_block=pages_per_erase_block,
            num_superblocks=size_bytes // superblock_bytes,
            **options,
        )
