"""Listing a folder of very many: all of them, once each, whatever the kernel asks for."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from kvfs.kv_tree.listing import Listing

from .client import ME


@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 9)), max_size=9),
)
def test_any_reads(page_sizes, reads):
    """A name that a seek or a full buffer skips is a sequence that rm -r leaves."""
    names = iter(range(100))
    pages = [[str(next(names)) for _ in range(size)] for size in page_sizes]
    every = [name for page in pages for name in page]
    listing = Listing(lambda: iter(pages))
    for position, count in [*reads, (0, 100)]:
        found = list(islice(listing.behind(position), count))
        assert found == [(name, place) for place, name in enumerate(every, 1)][position : position + count]


def test_sequences_by_the_page(client, store, monkeypatch):
    """Deleting while listing, as rm -r does, leaves none and lists none twice."""
    monkeypatch.setattr("kvfs.kv_tree.folders.PAGE_ROWS", 3)
    for number in range(10):
        store.create_sequence(store.model("m" if number % 2 else "bf"), f"s{number}")
    assert sorted(client.names("kv/m")) == ["model.json", "s1", "s3", "s5", "s7", "s9"]
    folder = client.inode("kv/m")
    handle = client.tree.open_folder(folder, ME)
    for name, _, _ in client.tree.read_folder(handle, 0):
        if name != b"model.json":
            client.tree.remove_folder(folder, name)
    client.tree.release_folder(handle)
    assert client.names("kv/m") == ["model.json"] and len(client.names("kv/bf")) == 6
