"""What a package installs beside the wheel."""

import re
import runpy
import subprocess
import tomllib
from pathlib import Path

from kvfs.configuration import load

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def test_the_installed_configuration_is_good(tmp_path):
    """As it is installed, and with everything uncommented that it suggests."""
    text = (TOOLS / "packaging" / "kvfs.toml").read_text()
    used = tmp_path / "kvfs.toml"
    used.write_text(re.sub(r"(?m)^# (\w+ = )", r"\1", text))
    assert sum(map(len, tomllib.loads(used.read_text()).values())) == 4
    installed = load({"KVFS_CONFIG": str(TOOLS / "packaging" / "kvfs.toml")})
    suggested = load({"KVFS_CONFIG": str(used)})
    for name, setting in installed.settings.items():
        assert setting.source is None
        assert setting.value == suggested[name], "what is suggested is the default"


def test_the_launchers_lead_somewhere():
    """Each command of the package is one of the wheel's."""
    package = (TOOLS / "packaging" / "make_deb.py").read_text()
    wheel = (TOOLS.parent / "setup.py").read_text()
    entries = dict(re.findall(r'"usr/s?bin/([\w.]+)": "([\w.:]+)"', package))
    assert entries == dict(re.findall(r'"([\w.]+)=(kvfsctl\.[\w.:]+)"', wheel))


def test_removal_leaves_nothing(tmp_path):
    """dpkg leaves folders with files that it has not put there: bytecode, kernels that numba compiled."""
    package = runpy.run_path(str(TOOLS / "packaging" / "make_deb.py"))
    library = f"/{package['LIBRARY']}"
    for path in ("kvfs/__pycache__/store.pyc", "kvfs/a b/__pycache__/kernel.nbi", "kvfs/store.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    assert package["PRERM"].count(library) == 1
    subprocess.run(["sh", "-c", package["PRERM"].replace(library, str(tmp_path))], check=True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["store.py"]
