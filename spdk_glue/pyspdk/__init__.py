"""pyspdk: SPDK's NVMe driver from Python, where SPDK is installed.

from spdk_glue import pyspdk
usable, why_not = pyspdk.available()
"""

from importlib import import_module

__all__ = ["available"]


def available() -> tuple[bool, str]:
    """(whether the bindings were built and load, else why not). Starts nothing."""
    try:
        import_module("spdk_glue.pyspdk._pyspdk")
    except ModuleNotFoundError:
        return False, (
            "pyspdk was not built: install SPDK so that `pkg-config --exists spdk_nvme` succeeds, "
            "then reinstall kvfs"
        )
    except ImportError as error:
        return False, f"pyspdk does not load: {error}"
    return True, ""
