"""Keys in their standard form, and the files that hold them."""

import base64
import os
import pickle
import stat
import traceback
import zlib

import pytest

from spdk_glue.fabrics.authentication import BadKey, Hash, Key, KeyFileError, read_key_file, write_key_file

HOST_NQN = "nqn.2026-11.io.kvfs:host"
# `nvme gen-dhchap-key --hmac=H --nqn=HOST_NQN --secret=000102...` of nvme-cli 2.3: H 0 is the secret as it
# is, H 1 to 3 are the bytes that the transform makes of it.
NVME_CLI = {
    None: "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
    Hash.SHA256: "DHHC-1:01:VpIzGGPlKLJdpSgrTjItopx8mDLGk3Mz5bG9MQF3H/RBzAGI:",
    Hash.SHA384: "DHHC-1:02:fCDnjXGd459b84f3rAKbuLrhN12OfeTfzJVId2SEYNu/RlodilsjyOuwnt2ClZYN5+eRAQ==:",
    Hash.SHA512: "DHHC-1:03:vL4DrZbjinVY45uQsSDYdplpaga9NGhQesK6WxAG9k4Bq44gJrPmqTn4erRX8+KB"
    "HniMFO/J8h3m6CqcJWc5mX55Wbw=:",
}
SECRET = bytes(range(32))
TEXT = NVME_CLI[None]


def standard_form(content, hash_="00"):
    return f"DHHC-1:{hash_}:{base64.b64encode(content + zlib.crc32(content).to_bytes(4, 'little')).decode()}:"


def test_standard_form_of_nvme_cli():
    """A key made by another tool than ours is not a key."""
    assert Key(SECRET).standard_form() == TEXT
    assert Key.parse(TEXT).bound_to(HOST_NQN) == SECRET


@pytest.mark.parametrize("transform", Hash, ids=lambda one: one.name)
def test_transform_of_nvme_cli(transform):
    """A key that is bound to a name in another way than elsewhere fits no peer."""
    bound = Key(bytes(range(transform.num_bytes)), transform).bound_to(HOST_NQN)
    other = Key.parse(NVME_CLI[transform])
    assert other.transform is transform
    assert bound == Key.parse(NVME_CLI[transform].replace(f":{transform:02x}:", ":00:")).bound_to("")


@pytest.mark.parametrize("transform", [None, *Hash])
@pytest.mark.parametrize("num_bytes", [32, 48, 64])
def test_new_keys(transform, num_bytes):
    """Keys that are not random, or do not survive their file."""
    key = Key.generate(transform, num_bytes)
    again = Key.parse(key.standard_form())
    assert again.has_secret_of(key) and again.transform is transform
    assert not Key.generate(transform, num_bytes).has_secret_of(key)


def test_length_of_new_keys():
    assert len(base64.b64decode(Key.generate(Hash.SHA384).standard_form().split(":")[2])) == 48 + 4
    with pytest.raises(BadKey):
        Key.generate(num_bytes=16)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "DHHC-1",
        "DHHC-1:00::",
        TEXT[:-1],
        TEXT + "x",
        TEXT + "\n",
        " " + TEXT,
        TEXT.replace("DHHC-1", "DHHC-2"),
        TEXT.replace(":00:", ":04:"),
        TEXT.replace(":00:", ":0:"),
        TEXT.replace(":00:", ":-1:"),
        TEXT.replace("AAEC", "AAED"),  # checksum
        TEXT.replace("AAEC", "AAE"),
        TEXT.replace("AAEC", "AA EC"),
        standard_form(bytes(31)),
        standard_form(bytes(33)),
        standard_form(b""),
        standard_form(bytes(1000)),
        "NVMeTLSkey-1:01:" + TEXT[10:],
    ],
)
def test_what_is_no_key(text):
    """A damaged key that is taken fails much later, as a wrong one."""
    with pytest.raises(BadKey):
        Key.parse(text)


@pytest.mark.parametrize("position", range(10, len(TEXT) - 1))
def test_every_character_counts(position):
    for letter in "Az9+/":
        changed = TEXT[:position] + letter + TEXT[position + 1 :]
        if changed != TEXT:
            with pytest.raises(BadKey):
                Key.parse(changed)


def test_secrets_stay_inside():
    """A key in a log is a key that is lost."""
    key = Key.parse(TEXT)
    secret_texts = [TEXT[10:-1], TEXT[10:30], repr(SECRET), SECRET.hex()]
    for shown in (repr(key), str(key), f"{key!r}"):
        assert not any(secret in shown for secret in secret_texts)
    with pytest.raises(TypeError):
        pickle.dumps(key)
    with pytest.raises(BadKey) as caught:
        Key.parse(TEXT.replace("AAEC", "AAED"))
    shown = "".join(traceback.format_exception(caught.value))
    assert "BAUGBwg" not in shown.replace(TEXT, "")


def key_file(folder, text=TEXT + "\n", mode=0o600):
    path = folder / "key"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_key_file(tmp_path, mode, end):
    assert read_key_file(key_file(tmp_path, TEXT + end, mode)).has_secret_of(Key(SECRET))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o620, 0o602, 0o610, 0o601, 0o777])
def test_key_file_open_to_others(tmp_path, mode):
    """A secret that others can read, or exchange for theirs."""
    with pytest.raises(KeyFileError, match=f"others than its owner can read it.*{mode:04o}"):
        read_key_file(key_file(tmp_path, mode=mode))


def test_key_file_of_another_user(tmp_path, monkeypatch):
    path = key_file(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    if os.stat(path).st_uid == 0:
        assert read_key_file(path)  # root's are anyone's to use who can open them
        os.chown(path, 4712, -1)
    with pytest.raises(KeyFileError, match="belongs to another user"):
        read_key_file(path)


def test_key_file_that_is_none(tmp_path):
    """Each in one line that names the file; none waits for a pipe to be written."""
    with pytest.raises(KeyFileError, match="there is no such file"):
        read_key_file(tmp_path / "absent")
    with pytest.raises(KeyFileError, match="not a regular file"):
        read_key_file(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(KeyFileError, match="not a regular file"):
        read_key_file(tmp_path / "pipe")
    with pytest.raises(KeyFileError, match="longer than"):
        read_key_file(key_file(tmp_path, "x" * 5000))
    with pytest.raises(KeyFileError, match="DHHC-1"):
        read_key_file(key_file(tmp_path, "\u00e4\u00f6"))
    with pytest.raises(KeyFileError, match="checksum"):
        read_key_file(key_file(tmp_path, TEXT.replace("AAEC", "AAED")))
    with pytest.raises(KeyFileError, match="DHHC-1"):
        read_key_file(key_file(tmp_path, TEXT + "\n" + TEXT))


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens everything")
def test_unreadable_key_file(tmp_path):
    with pytest.raises(KeyFileError, match="cannot be opened"):
        read_key_file(key_file(tmp_path, mode=0o000))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_new_key_file(tmp_path, umask):
    """A new key is readable by its owner, and by nobody else for any moment."""
    path = tmp_path / "key"
    key = Key.generate()
    before = os.umask(umask)
    try:
        write_key_file(path, key)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key_file(path).has_secret_of(key)


def test_key_files_are_not_overwritten(tmp_path):
    """Whoever overwrites a key in use locks its hosts out."""
    path = key_file(tmp_path)
    with pytest.raises(KeyFileError, match="already"):
        write_key_file(path, Key.generate())
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError, match="already"):
        write_key_file(tmp_path / "link", Key.generate())
    with pytest.raises(KeyFileError, match="cannot be made"):
        write_key_file(tmp_path / "absent" / "key", Key.generate())
    assert read_key_file(path).has_secret_of(Key(SECRET))
