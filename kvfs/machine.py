"""What this machine lets kvfs use: asked by `kvfsctl doctor`."""

from kvfs.embedded_drive import host_target_name, io_uring_works

__all__ = ["host_target_name", "io_uring_works", "spdk_usable"]


def spdk_usable() -> tuple[bool, str]:
    """(whether kvfs can start SPDK's driver, else why not). Starts nothing."""
    from spdk_glue import pyspdk

    return pyspdk.available()
