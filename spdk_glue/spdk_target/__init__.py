"""A kvfs drive exported by SPDK's NVMe over fabrics target: TCP, vfio-user, RDMA. Built where SPDK is."""

from importlib import import_module

__all__ = ["available"]


def available() -> tuple[bool, str]:
    """(whether the plug-in was built and loads, else why not). Starts nothing."""
    try:
        import_module("spdk_glue.spdk_target._spdk_target")
    except ModuleNotFoundError:
        return False, (
            "the plug-in for SPDK's target was not built: install SPDK so that `pkg-config --exists "
            "spdk_event_nvmf` succeeds, then reinstall kvfs"
        )
    except ImportError as error:
        return False, f"the plug-in for SPDK's target does not load: {error}"
    return True, ""
