"""kvfsctl nvme gen-dhchap-key, as an administrator runs it."""

import json
import stat

import pytest

from spdk_glue.fabrics.authentication import Hash, read_key_file
from tests.unit.kvfsctl.command_line import kvfsctl


def gen_dhchap_key(*arguments):
    return kvfsctl("nvme", "gen-dhchap-key", *arguments)


@pytest.mark.parametrize(
    "options, transform, num_bytes",
    [
        ((), Hash.SHA256, 32),
        (("--hmac", 0), None, 32),
        (("-m", 3), Hash.SHA512, 64),
        (("-m", 2, "-l", 32), Hash.SHA384, 32),
    ],
)
def test_new_key(tmp_path, options, transform, num_bytes):
    """The key is in the file and nowhere else: what is printed ends up in logs."""
    path = tmp_path / "key"
    result = gen_dhchap_key(path, *options)
    assert result.returncode == 0, result.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = read_key_file(path)
    assert (key.transform, key.num_bytes) == (transform, num_bytes)
    secret = path.read_text().split(":")[2]
    assert secret not in result.stdout + result.stderr and str(path) in result.stdout


def test_json(tmp_path):
    document = json.loads(gen_dhchap_key(tmp_path / "key", "--json").stdout)
    assert document["hmac"] == 1 and document["key_length"] == 32


def test_what_cannot_be(tmp_path):
    """One line each, and no key that was there is lost."""
    path = tmp_path / "key"
    gen_dhchap_key(path)
    before = path.read_bytes()
    for arguments, why in [
        ((path,), "there is a file already"),
        ((tmp_path / "a" / "b",), "cannot be made"),
        ((tmp_path / "c", "--hmac", 4), "hmac 4"),
        ((tmp_path / "c", "--key-length", 33), "not 33"),
    ]:
        result = gen_dhchap_key(*arguments)
        assert result.returncode == 1 and why in result.stderr and result.stderr.count("\n") == 1
    assert path.read_bytes() == before and not (tmp_path / "c").exists()
