"""Builds `kvfs.mount.fuse_glue._fuse_glue`: for packaging, and tools/build_glue.py."""

import subprocess
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

CALLBACKS = """
void serve_read(fuse_req_t request, uint64_t handle, uint64_t offset, size_t size);
void serve_write(fuse_req_t request, uint64_t handle, uint64_t offset, void *data, size_t size);
void serve_sync(fuse_req_t request, uint64_t handle, bool data_only);
void serve_sync_folder(fuse_req_t request, uint64_t handle, bool data_only);
void serve_allocate(fuse_req_t request, uint64_t handle, int mode, uint64_t offset, uint64_t length);
void serve_seek(fuse_req_t request, uint64_t inode, uint64_t handle, uint64_t offset, int whence);
void serve_copy_range(fuse_req_t request, uint64_t source, uint64_t source_offset, uint64_t target,
                      uint64_t target_offset, size_t length);
"""
CDEF = f"""
typedef struct fuse_req *fuse_req_t;

int fuse_reply_err(fuse_req_t request, int error);
int fuse_reply_buf(fuse_req_t request, const char *data, size_t size);
int fuse_reply_write(fuse_req_t request, size_t size);
int fuse_reply_lseek(fuse_req_t request, int64_t offset);
int syncfs(int descriptor);
void give_back_buffer(void *buffer);

extern "Python" {{ {CALLBACKS} }}
"""
FORWARD_DECLARATIONS = "#include <fuse_lowlevel.h>\n#include <stdbool.h>\n" + CALLBACKS.replace(
    "\nvoid", "\nstatic void"
)


def pkg_config(option: str) -> list[str]:
    try:
        found = subprocess.run(["pkg-config", option, "fuse3"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        wanted = "libfuse 3 with its headers, and pkg-config"
        raise SystemExit(f"kvfs needs {wanted}: apt-get install fuse3 libfuse3-dev pkg-config") from error
    return found.stdout.split()


ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source(
    "kvfs.mount.fuse_glue._fuse_glue",
    f'#define FUSE_USE_VERSION 34\n{FORWARD_DECLARATIONS}\n#include "glue.c"\n',
    include_dirs=[str(HERE)],
    extra_compile_args=["-O2", "-std=gnu11", *pkg_config("--cflags")],
    extra_link_args=pkg_config("--libs"),
)
