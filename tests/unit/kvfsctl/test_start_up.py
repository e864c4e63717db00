"""What kvfsctl loads before it does anything: a status that takes seconds is not looked at."""

import json
import subprocess
import sys

import pytest

SLOW = {"numba", "torch", "scipy", "matplotlib", "apsw", "trio", "prometheus_client"}
PROGRAM = """
import json, sys
sys.argv = ["kvfsctl", *sys.argv[1:]]
from kvfsctl.main import run
try:
    run()
except SystemExit as end:
    assert end.code in (None, 0, 4), end.code  # 4: a mount of somebody else is degraded
print(json.dumps([*sys.modules]), file=sys.stderr)
"""


def loaded(*arguments) -> list[str]:
    """Modules, of kvfsctl called like this."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def packages(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("arguments", [["--help"], ["status", "--json"], ["config", "path"]], ids=" ".join)
def test_neither_kernels_nor_numpy(arguments):
    assert not packages(loaded(*arguments)) & {*SLOW, "numpy", "rich"}


@pytest.mark.parametrize(
    ("arguments", "verbs", "most"),
    [(["--help"], set(), 220), (["status", "--json"], {"status", "repeating"}, 400)],
    ids=["--help", "status"],
)
def test_only_the_verb_that_is_called(arguments, verbs, most):
    """A verb added, or a library, that every call of kvfsctl would wait for."""
    modules = loaded(*arguments)
    own = {name.partition(".")[2] for name in modules if name.startswith("kvfsctl.")}
    assert own == {"main", "output", "verbs", *verbs}
    assert len(modules) < most


def test_status_of_a_mount():
    """What `status` asks a mount with is loaded without what opens a drive."""
    asks = "import kvfs.administration.condition, kvfs.mount.mountpoints, kvfs.sizes, kvfsctl.status"
    program = f"{asks}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not packages(done.stdout.split()) & {*SLOW, "numpy", "rich"}


def test_client_of_a_mount():
    """What verbs ask a mount's socket with: `df` and `ls` of a mount wait for no kernels."""
    asks = (
        "import kvfs.remote.mounted, kvfs.administration.remote_care, kvfsctl.opening, kvfsctl.df, kvfsctl.ls"
    )
    program = f"{asks}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not packages(done.stdout.split()) & (SLOW - {"apsw"})


def test_names_of_the_package():
    """`import kvfs` is quick, and all that it promises is there when it is asked for."""
    program = (
        "import sys, kvfs\nassert 'numba' not in sys.modules\nfor name in kvfs.__all__: getattr(kvfs, name)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
