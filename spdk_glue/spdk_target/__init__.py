"""A kvfs drive exported by SPDK's NVMe over fabrics target: TCP, vfio-user, RDMA. Built where SPDK is."""


def available() -> tuple[bool, str]:
    """(whether it can be used, why not)."""
    try:
        import spdk_glue.spdk_target._spdk_target  # noqa: F401
    except ImportError as error:
        return False, f"the plug-in for SPDK's target is not built or does not load: {error}"
    return True, ""
