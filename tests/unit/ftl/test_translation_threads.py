"""Several threads of a host, collection in the background: each reads what it wrote, nothing waits for ever."""

import threading

import numpy as np
import pytest

from ftl.check import check
from ftl.geometry import Geometry
from ftl.media_file import FileMedia
from ftl.translation import FlashTranslationLayer
from spdk_glue import dma

NUM_THREADS = 4
STEPS = 150


def work(ftl, number, failures):
    """Writes, deallocates, reads and flushes in a part of the LBAs that no other thread touches."""
    try:
        random = np.random.default_rng(number)
        share = ftl.num_lbas // NUM_THREADS
        content = np.zeros(share, np.uint64)
        buffer = dma.allocate(share * ftl.page_size)
        words = buffer.view("<u8").reshape(share, -1)
        addresses = dma.page_addresses(buffer, ftl.page_size)
        for step in range(STEPS):
            count = int(random.integers(1, share // 2))
            first = int(random.integers(0, share - count))
            part = slice(first, first + count)
            lbas = number * share + np.arange(first, first + count)
            choice = random.random()
            if choice < 0.6:
                content[part] = step + 1
                words[part] = step + 1
                ftl.write(lbas, addresses[part], stream=int(random.integers(0, 9)))
            elif choice < 0.75:
                content[part] = 0
                ftl.deallocate([[int(lbas[0]), count]])
            elif choice < 0.8:
                ftl.flush()
            else:
                words[part] = 7e7
                ftl.read(lbas, addresses[part])
                assert (words[part] == content[part][:, None]).all()
                for index in range(first, first + min(count, 50)):  # collection moves pages meanwhile
                    page = buffer[index * ftl.page_size :][: ftl.page_size]
                    page[:] = 7
                    if ftl.read_run(number * share + index, page):
                        assert (words[index] == content[index]).all()
    except BaseException as error:
        failures.append(error)
        raise


def read_all(ftl):
    buffer = dma.allocate(ftl.num_lbas * ftl.page_size)
    ftl.read(np.arange(ftl.num_lbas), dma.page_addresses(buffer, ftl.page_size))
    return buffer


@pytest.mark.parametrize("parity", [0, 1])
def test_threads(tmp_path, parity):
    shape = Geometry(num_channels=4, pages_per_erase_block=32, num_superblocks=48, parity=parity)
    media = FileMedia.create(tmp_path / "flash", shape)
    ftl = FlashTranslationLayer.format(media, background=True, checkpoint_pages=1000)
    failures = []
    threads = [threading.Thread(target=work, args=(ftl, n, failures), daemon=True) for n in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    assert ftl.counters.gc_pages_written
    ftl.flush()
    assert check(ftl._state) == []
    before = read_all(ftl)
    ftl.close()
    media.close()
    media = FileMedia.open(tmp_path / "flash")
    ftl = FlashTranslationLayer.open(media)
    np.testing.assert_array_equal(read_all(ftl), before)
    ftl.close()
    media.close()
