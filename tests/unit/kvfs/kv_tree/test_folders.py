"""Sequences through their folders: made, found, renamed, removed; who owns them; what is noted of them."""

import errno
import os
import stat

import pytest

import kvfs
from kvfs.errors import InvalidArgument
from kvfs.kv_tree.inodes import MAX_IDLE
from kvfs.kv_tree.tree import XATTR_CREATE, XATTR_REPLACE, KvTree
from kvfs.tree import KV_INODE_BIT, ROOT_INODE, AttributeChanges, Caller
from tests.unit.kvfs.conftest import random_kv
from tests.unit.kvfs.kv_tree.client import ME, Client, errno_of
from tests.unit.kvfs.kv_tree.conftest import append

OTHER = Caller(uid=1234, gid=5678, pid=1)


def test_listing(client, sequence, store):
    """ls -R: each name leads to what lookup finds, with the same inode."""
    assert client.names("kv") == ["bf", "m"]
    assert client.names("kv/m") == ["model.json", "a"]
    assert client.names("kv/bf") == ["model.json"]
    assert client.names("kv/m/a")[:3] == ["sequence.json", "tokens.npy", "sequence.safetensors"]
    assert client.names("kv/m/a/layer_01") == ["attend", "kv_head_00", "kv_head_01"]
    assert client.names("kv/m/a/layer_01/kv_head_00") == ["keys.npy", "values.npy"]
    for folder in ("kv", "kv/m", "kv/m/a", "kv/m/a/layer_00", "kv/m/a/layer_00/kv_head_01"):
        handle = client.tree.open_folder(client.inode(folder), ME)
        for name, attributes, _ in client.tree.read_folder(handle, 0):
            assert client.tree.lookup(client.inode(folder), name) == attributes
            assert attributes.inode & KV_INODE_BIT


def test_listing_in_parts(client, store):
    """readdir goes on where it stopped, whatever came and went meanwhile: no entry twice, none forgotten."""
    for number in range(20):
        store.create_sequence(store.model("m"), f"s{number:02}")
    handle = client.tree.open_folder(client.inode("kv/m"), ME)
    names, start = [], 0
    while True:
        part = [(name, next_id) for name, _, next_id in client.tree.read_folder(handle, start)][:3]
        if not part:
            break
        names += [name for name, _ in part]
        start = part[-1][1]
        if start == 6:
            store.delete_sequence("s10")
            store.create_sequence(store.model("m"), "a-new-one")
    assert names == [b"model.json", *(b"s%02d" % number for number in range(20) if number != 10)]


def test_dots(client, sequence):
    """ ".." of a top folder is the root, whose attributes are the other tree's."""
    model, layer = client.walk("kv/m"), client.walk("kv/m/a/layer_00")
    assert client.tree.lookup(layer.inode, b"..").inode == client.inode("kv/m/a")
    assert client.tree.lookup(layer.inode, b".").inode == layer.inode
    assert client.tree.lookup(client.inode("kv"), b"..").inode == ROOT_INODE
    assert client.tree.lookup(model.inode, b"..").inode == client.inode("kv")


@pytest.mark.parametrize(
    "missing",
    [
        "kv/nobody",
        "kv/m/nobody",
        "kv/bf/a",
        "kv/m/a/layer_02",
        "kv/m/a/layer_1",
        "kv/m/a/layer_٠٠",
        "kv/m/a/layer_00/kv_head_02",
        "kv/m/a/layer_00/kv_head_00/other.npy",
        ".kvfs/nothing",
    ],
)
def test_what_is_not_there(client, sequence, missing):
    """ENOENT, also for numbers that are only nearly right."""
    assert errno_of(client.walk, missing) == errno.ENOENT


def test_mkdir_makes_a_sequence(client, store):
    """mkdir in a model's folder; the name is taken then, for all models."""
    attributes = client.tree.make_folder(*client.place("kv/m/new"), 0o755, ME)
    assert stat.S_ISDIR(attributes.mode)
    assert store.sequence("new").model.name == "m"
    assert errno_of(client.tree.make_folder, *client.place("kv/m/new"), 0o755, ME) == errno.EEXIST
    assert errno_of(client.tree.make_folder, *client.place("kv/bf/new"), 0o755, ME) == errno.EEXIST
    for path in ("kv/model", "kv/m/new/folder", ".kvfs/x", "kv/m/new/layer_00/x"):
        assert errno_of(client.tree.make_folder, *client.place(path), 0o755, ME) == errno.EPERM


def test_names(client, store):
    """Any UTF-8 up to 255 bytes; what is none says so, and nothing crashes."""
    for name in ("with space", 'quote"', "ü" * 127, "new\nline", "-rf", "a" * 255):
        client.tree.make_folder(*client.place(f"kv/m/{name}"), 0o755, ME)
        assert client.walk(f"kv/m/{name}").inode & KV_INODE_BIT
    folder = client.inode("kv/m")
    for operation in (client.tree.lookup, client.tree.unlink, client.tree.remove_folder):
        assert errno_of(operation, folder, b"a" * 256) == errno.ENAMETOOLONG
        assert errno_of(operation, folder, b"\xff") == errno.EILSEQ
    assert errno_of(client.tree.make_folder, folder, "ü".encode() * 128, 0o755, ME) == errno.ENAMETOOLONG
    rename = client.tree.rename
    assert errno_of(rename, folder, b"-rf", folder, b"a" * 256, 0) == errno.ENAMETOOLONG


def test_rename(client, sequence, store):
    """mv of a sequence; never onto another, never into another model."""
    store.create_sequence(store.model("m"), "b")
    store.create_sequence(store.model("bf"), "c")
    inode, model = client.inode("kv/m/a"), client.inode("kv/m")
    rename = client.tree.rename
    assert errno_of(rename, model, b"a", model, b"b", 0) == errno.ENOTEMPTY
    assert errno_of(rename, model, b"a", model, b"b", 1) == errno.EEXIST
    assert errno_of(rename, model, b"a", model, b"c", 0) == errno.ENOTEMPTY
    assert errno_of(rename, model, b"a", model, b"b", 2) == errno.EINVAL
    assert errno_of(rename, model, b"a", client.inode("kv/bf"), b"x", 0) == errno.EPERM
    assert errno_of(rename, model, b"nobody", model, b"x", 0) == errno.ENOENT
    assert errno_of(rename, model, b"model.json", model, b"x", 0) == errno.ENOENT
    assert errno_of(rename, inode, b"tokens.npy", inode, b"x", 0) == errno.EPERM
    rename(model, b"a", model, b"z", 0)
    assert client.inode("kv/m/z") == inode
    assert errno_of(client.walk, "kv/m/a") == errno.ENOENT
    assert store.sequence("z").num_tokens == 700


def remove_tree(client, path):
    """As rm -r does: what is below first."""
    for name in client.names(path):
        below = f"{path}/{name}"
        if stat.S_ISDIR(client.walk(below).mode):
            remove_tree(client, below)
        else:
            client.tree.unlink(*client.place(below))
    client.tree.remove_folder(*client.place(path))


def test_rm_r_removes_a_sequence(client, sequence, store):
    """Stopped on its way it has removed nothing: a sequence goes as a whole."""
    client.tree.unlink(*client.place("kv/m/a/tokens.npy"))
    client.tree.remove_folder(*client.place("kv/m/a/layer_00"))
    assert client.load("kv/m/a/tokens.npy").shape == (700,)
    assert client.load("kv/m/a/layer_00/kv_head_00/keys.npy").shape == (700, 64)
    remove_tree(client, "kv/m/a")
    assert client.names("kv/m") == ["model.json"]
    assert store.catalogue_rows() == []


def test_what_cannot_be_removed_or_made(client, sequence):
    """Models, what describes them, and whatever is no sequence."""
    assert errno_of(client.tree.unlink, *client.place("kv/m/model.json")) == errno.EPERM
    assert errno_of(client.tree.remove_folder, *client.place("kv/m")) == errno.EPERM
    assert errno_of(client.tree.remove_folder, *client.place("kv/m/nobody")) == errno.ENOENT
    assert errno_of(client.tree.unlink, *client.place("kv/m/a/nothing")) == errno.ENOENT
    assert errno_of(client.tree.make_symlink, *client.place("kv/m/l"), b"a", ME) == errno.EPERM
    assert errno_of(client.tree.make_node, *client.place("kv/m/f"), stat.S_IFIFO, 0, ME) == errno.EPERM
    assert errno_of(client.tree.link, client.inode("kv/m/model.json"), *client.place("kv/m/l")) == errno.EPERM
    for path in ("kv/m/a/file", "kv/m/file", "kv/file", ".kvfs/file"):
        assert errno_of(client.create, path) == errno.EPERM


def test_permissions(client, sequence, store, path):
    """chmod and chown protect a sequence with all that is below, and are there after a restart."""
    inode = client.inode("kv/m/a")
    changed = client.tree.set_attributes(inode, AttributeChanges(mode=0o750, uid=1234, gid=5678), ME)
    expected = {"kv/m/a": 0o750, "kv/m/a/layer_00": 0o750, "kv/m/a/tokens.npy": 0o440}
    expected |= {"kv/m/a/layer_00/attend": 0o660, "kv/m/a/layer_00/kv_head_00/keys.npy": 0o440}
    assert stat.S_IMODE(changed.mode) == 0o750
    store.flush()
    store.close()
    with kvfs.open(path, cache_bytes="8MiB") as again:
        client = Client(KvTree(again))
        for below, mode in expected.items():
            attributes = client.walk(below)
            assert stat.S_IMODE(attributes.mode) == mode, below
            assert (attributes.uid, attributes.gid) == (1234, 5678)


def test_owner_is_who_makes(client):
    """mkdir by another user: it is theirs, with their mode."""
    attributes = client.tree.make_folder(*client.place("kv/m/theirs"), 0o700, OTHER)
    assert (attributes.uid, attributes.gid, stat.S_IMODE(attributes.mode)) == (1234, 5678, 0o700)
    attributes = client.walk("kv/m")
    assert (attributes.uid, attributes.gid, stat.S_IMODE(attributes.mode)) == (os.getuid(), os.getgid(), 0o755)


def test_fork_is_whose_copies(client, sequence, store):
    """Copied by another user: theirs, as protected as what it was copied from."""
    sequence.set_attribute("mode", b"%d" % 0o750)
    source = client.open("kv/m/a/sequence.safetensors")
    file, _ = client.tree.create(*client.place("kv/m/b.safetensors"), 0o644, os.O_WRONLY, OTHER)
    client.tree.copy_range(source, 0, file.handle, 0, 1 << 40)
    client.tree.flush(file.handle)
    attributes = client.walk("kv/m/b")
    assert (attributes.uid, attributes.gid, stat.S_IMODE(attributes.mode)) == (1234, 5678, 0o750)


def test_virtual_files_keep_their_mode(client, sequence):
    """chmod of a file that is only a view is refused; times, which the kernel sends by itself, are not kept."""
    for path in ("kv/m/a/tokens.npy", "kv/m/a/layer_00", "kv/m", ".kvfs/metrics"):
        before = client.walk(path)
        set_attributes = client.tree.set_attributes
        assert errno_of(set_attributes, before.inode, AttributeChanges(mode=0o777), ME) == errno.EPERM
        assert errno_of(set_attributes, before.inode, AttributeChanges(size=0), ME) == errno.EPERM
        after = set_attributes(before.inode, AttributeChanges(mtime_ns=1), ME)
        assert after.mtime_ns == before.mtime_ns


def test_times(client, sequence):
    """mtime is that of the tokens: flushing does not move it, appending does."""
    before = client.walk("kv/m/a").mtime_ns
    sequence.flush()
    assert client.walk("kv/m/a").mtime_ns == before == sequence.changed_ns
    append(sequence, 1)
    assert client.walk("kv/m/a/tokens.npy").mtime_ns > before


# extended attributes


def test_xattrs(client, sequence, store, path):
    """Kept across a restart; what tells of the sequence is there and cannot be set."""
    inode, tree = client.inode("kv/m/a"), client.tree
    tree.set_xattr(inode, b"user.kvfs.pinned", b"1", 0)
    tree.set_xattr(inode, b"user.anything", bytes(range(256)), 0)
    assert tree.get_xattr(inode, b"user.kvfs.num_tokens") == b"700"
    assert tree.get_xattr(inode, b"user.kvfs.model") == b"m"
    assert set(tree.list_xattrs(inode)) == {
        b"user.kvfs.pinned", b"user.anything", b"user.kvfs.num_tokens", b"user.kvfs.dtype", b"user.kvfs.model",
    }  # fmt: skip
    store.close()
    with kvfs.open(path, cache_bytes="8MiB") as again:
        client = Client(KvTree(again))
        inode, tree = client.inode("kv/m/a"), client.tree
        assert tree.get_xattr(inode, b"user.anything") == bytes(range(256))
        tree.remove_xattr(inode, b"user.anything")
        assert errno_of(tree.get_xattr, inode, b"user.anything") == errno.ENODATA
        assert errno_of(tree.remove_xattr, inode, b"user.anything") == errno.ENODATA


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("user.kvfs.pinned", b"yes", errno.EINVAL),
        ("user.kvfs.ttl", b"0", errno.EINVAL),
        ("user.kvfs.ttl", b"-1", errno.EINVAL),
        ("user.kvfs.ttl", b"9" * 5000, errno.EINVAL),
        ("user.kvfs.tenant", b"", errno.EINVAL),
        ("user.kvfs.tenant", b"\xff", errno.EINVAL),
        ("user.kvfs.tenent", b"a", errno.EINVAL),
        ("user.kvfs.num_tokens", b"3", errno.EPERM),
        ("user.big", b"x" * 70_000, errno.EINVAL),
        ("security.selinux", b"x", errno.EOPNOTSUPP),
        ("trusted.x", b"x", errno.EOPNOTSUPP),
        ("mode", b"x", errno.EOPNOTSUPP),
    ],
)
def test_bad_xattrs(client, sequence, name, value, expected):
    """A value that means nothing is refused when it is set, not when it matters."""
    inode = client.inode("kv/m/a")
    assert errno_of(client.tree.set_xattr, inode, name.encode(), value, 0) == expected
    assert client.tree.get_xattr(inode, b"user.kvfs.num_tokens") == b"700"


def test_xattr_flags_and_other_nodes(client, sequence):
    """XATTR_CREATE and XATTR_REPLACE; files and models have none."""
    inode, tree = client.inode("kv/m/a"), client.tree
    assert errno_of(tree.set_xattr, inode, b"user.x", b"1", XATTR_REPLACE) == errno.ENODATA
    tree.set_xattr(inode, b"user.x", b"1", XATTR_CREATE)
    assert errno_of(tree.set_xattr, inode, b"user.x", b"2", XATTR_CREATE) == errno.EEXIST
    tree.set_xattr(inode, b"user.x", b"2", XATTR_REPLACE)
    assert tree.get_xattr(inode, b"user.x") == b"2"
    for path in ("kv/m", "kv/m/a/tokens.npy", "kv/m/a/layer_00"):
        other = client.inode(path)
        assert tree.list_xattrs(other) == []
        assert errno_of(tree.get_xattr, other, b"user.x") == errno.ENODATA
        assert errno_of(tree.set_xattr, other, b"user.x", b"1", 0) == errno.EOPNOTSUPP


def test_attributes_of_forks(sequence, store):
    """A fork is its parent's tenant's, with its parent's permissions; how long to keep it is not inherited."""
    for name, value in (("user.kvfs.pinned", b"1"), ("user.kvfs.ttl", b"60"), ("user.kvfs.tenant", b"t")):
        sequence.set_attribute(name, value)
    sequence.set_attribute("mode", b"448")
    child = sequence.fork("child")
    assert child.attributes() == {"mode": b"448", "user.kvfs.tenant": b"t"}
    with pytest.raises(InvalidArgument):
        child.set_attribute("owner", b"me")
    store.delete_sequence("a")
    assert store.create_sequence(store.model("m"), "a").attributes() == {}


# what the kernel refers to


def test_table_of_inodes_is_bounded(client, store):
    """A listing without lookups, over and over: the table must not grow with every version ever listed."""
    sequence = store.create_sequence(store.model("m"), "a")
    table = client.tree._inodes
    for _ in range(MAX_IDLE // 4):
        append(sequence, 1)
        client.names("kv/m/a")
    assert len(table) <= MAX_IDLE + 10


def test_forget(client, sequence):
    """A node lives as long as the kernel refers to it, however many others come, and no longer."""
    path = "kv/m/a/layer_00/kv_head_00/keys.npy"
    first, again = client.walk(path), client.walk(path)
    assert first.inode == again.inode
    for _ in range(MAX_IDLE // 4 + 10):
        sequence.append(0, *random_kv(1))
        sequence.append(1, *random_kv(1))
        client.names("kv/m/a")
    client.tree.forget(first.inode, 1)
    assert client.tree.attributes(first.inode) == first
    client.tree.forget(first.inode, 1)
    assert errno_of(client.tree.attributes, first.inode) == errno.ESTALE
