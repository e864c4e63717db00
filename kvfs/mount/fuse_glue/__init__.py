"""pyfuse3, with the operations that it lacks: import it from here alone.

The extension has to be loaded first, with its symbols for all to see (see glue.c).
"""

import os
import sys

_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL)
try:
    from kvfs.mount.fuse_glue._fuse_glue import ffi, lib
finally:
    sys.setdlopenflags(_flags)

import pyfuse3  # noqa: E402

__all__ = ["ffi", "lib", "pyfuse3"]
