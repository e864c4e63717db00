"""Settings from files and variables: which one counts, and what a broken one says."""

import pytest

from kvfs.configuration import FIELDS, export, files, load, variable_of
from kvfs.errors import BadConfiguration


def environment(tmp_path, content: str, **variables: str) -> dict[str, str]:
    file = tmp_path / "kvfs.toml"
    file.write_text(content)
    return {"KVFS_CONFIG": str(file), **variables}


def test_defaults(tmp_path):
    """Without a file nothing is set, and all is known."""
    found = load({"HOME": str(tmp_path)})
    assert found["open.cache_bytes"] == 256 << 20
    assert found.given("open") == {}
    assert [str(path) for path in files({"HOME": "/x"})] == ["/etc/kvfs/kvfs.toml", "/x/.config/kvfs/kvfs.toml"]


def test_variables_are_above_files(tmp_path):
    """The environment overrides a file; each setting says where it is from."""
    content = '[open]\ncache_bytes = "1GiB"\nnum_workers = 2\n[mount]\nallow_other = true\n'
    found = load(environment(tmp_path, content, KVFS_OPEN_CACHE_BYTES="2GiB"))
    assert found.given("open") == {"cache_bytes": 2 << 30, "num_workers": 2}
    assert found.given("mount") == {"allow_other": True}
    assert found.settings["open.cache_bytes"].source == "KVFS_OPEN_CACHE_BYTES"
    assert found.settings["open.num_workers"].source.endswith("kvfs.toml")


def test_users_file_is_above_the_systems(tmp_path, monkeypatch):
    system, home = tmp_path / "system.toml", tmp_path / "kvfs"
    home.mkdir()
    system.write_text('[serve]\nlisten = "0.0.0.0:1"\nworker = "reference"\n')
    (home / "kvfs.toml").write_text('[serve]\nlisten = "[::1]:2"\n')
    monkeypatch.setattr("kvfs.configuration.SYSTEM_FILE", system)
    found = load({"XDG_CONFIG_HOME": str(tmp_path)})
    assert (found["serve.listen"], found["serve.worker"]) == ("[::1]:2", "reference")


@pytest.mark.parametrize(
    ("content", "field", "words"),
    [
        ("[open", None, "not TOML"),
        ("\0", None, "not TOML"),
        ("[typo]", "typo", "there are fpga, mount, open, serve"),
        ("open = 1", "open", "written [open]"),
        ("[open]\ncache = 1", "open.cache", "has cache_bytes"),
        ('[open]\ncache_bytes = "lots"', "open.cache_bytes", "'lots' is not a size"),
        ("[open]\ncache_bytes = -1", "open.cache_bytes", "negative"),
        ("[open]\nnum_workers = 0", "open.num_workers", "from 1 on"),
        ("[open]\nnum_workers = true", "open.num_workers", "from 1 on"),
        ("[open]\nwriteback_tokens = 1.5", "open.writeback_tokens", "from 1 on"),
        ('[open]\ncollection = "lazy"', "open.collection", "greedy, cost-benefit"),
        ('[mount]\nallow_other = "maybe"', "mount.allow_other", "true nor false"),
        ("[serve]\nlisten = 5", "serve.listen", "one line"),
    ],
)
def test_errors_name_the_field(tmp_path, content, field, words):
    """A broken file: which one, which field, and what would be right."""
    with pytest.raises(BadConfiguration) as caught:
        load(environment(tmp_path, content))
    assert caught.value.field == field
    assert words in str(caught.value) and "kvfs.toml" in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_errors_name_the_variable(name):
    """A broken variable is named, of every field there is."""
    with pytest.raises(BadConfiguration) as caught:
        load({"HOME": "/nonexistent", variable_of(name): "\n"})
    assert str(caught.value).startswith(variable_of(name))


def test_a_file_that_is_named_is_there(tmp_path):
    with pytest.raises(BadConfiguration, match="no such file"):
        load({"KVFS_CONFIG": str(tmp_path / "missing")})
    with pytest.raises(BadConfiguration, match="directory"):
        load({"KVFS_CONFIG": str(tmp_path)})


def test_layers_below_see_it_in_the_environment(tmp_path):
    """The FPGA worker reads no files: what is set of its section is put where it looks, and it takes that."""
    from accel.fpga.options import Options, read_options

    content = '[fpga]\nxclbin = "a.xclbin"\ndevice = 0\nrows = 4\nfallback = false'
    seen = {}
    export(load(environment(tmp_path, content)), "fpga", seen)
    assert seen == {
        "KVFS_FPGA_XCLBIN": "a.xclbin",
        "KVFS_FPGA_DEVICE": "0",
        "KVFS_FPGA_ROWS": "4",
        "KVFS_FPGA_FALLBACK": "0",
    }
    assert read_options(seen) == Options(xclbin="a.xclbin", rows=4, fallback=False)
    assert {f"fpga.{name}" for name in Options.__dataclass_fields__} == {
        name for name in FIELDS if name.startswith("fpga.")
    }
