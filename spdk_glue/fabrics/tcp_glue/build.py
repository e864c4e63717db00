"""Builds `spdk_glue.fabrics.tcp_glue._tcp_glue`: run this file to build in place; packaging uses `ffibuilder`."""

import shutil
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
CRC32C = HERE.parents[2] / "ftl" / "direct_io" / "crc32c.c"  # the CRC of flash pages is that of digests

HEADERS = ["records.h", "host_records.h"]
SOURCES = ["digest.c", "host_queue.c", "host_io.c"]
CDEF = """
uint32_t tcp_digest(const uint8_t *at, size_t size);
int dio_crc32c_force_software(int on);

typedef struct host_queue host_queue;

host_queue *host_create(const host_options *options);
void host_destroy(host_queue *queue);
int host_check(const host_queue *queue, const host_batch *batch, size_t *wrong);
int host_start(host_queue *queue, const tcp_entry *entry, uint64_t address, uint64_t length, tcp_completion *to);
size_t host_take_output(host_queue *queue, uint8_t *bytes, size_t size);
int host_feed(host_queue *queue, const uint8_t *bytes, size_t size);
void host_abort(host_queue *queue);
int host_fault_of(const host_queue *queue, uint32_t *detail);
size_t host_take_arrived(host_queue *queue, tcp_completion *completions, size_t max);
int host_transfer(host_queue *queue, int fd, const host_batch *batch, uint32_t depth, tcp_completion *completions,
                  uint32_t timeout_ms, size_t *wrong);
int host_submit(host_queue *queue, int fd, const host_batch *batch, size_t *wrong);
int host_poll(host_queue *queue, int fd, tcp_completion *completions, uint32_t max, uint32_t wait_ms,
              uint32_t timeout_ms, uint64_t *quiet_since);
"""

ffibuilder = FFI()
ffibuilder.cdef("".join((HERE / name).read_text() for name in HEADERS) + CDEF)
ffibuilder.set_source(
    "spdk_glue.fabrics.tcp_glue._tcp_glue",
    "#include <errno.h>\n#include <poll.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <stdlib.h>\n"
    "#include <string.h>\n#include <sys/socket.h>\n#include <sys/uio.h>\n#include <time.h>\n"
    + "".join(f'#include "{name}"\n' for name in HEADERS)
    + "typedef struct host_queue host_queue;\n"
    + f'#include "{CRC32C}"\n'
    + "".join(f'#include "{name}"\n' for name in SOURCES),
    include_dirs=[str(HERE)],
    extra_compile_args=["-O2", "-std=gnu11", "-pthread", "-Wno-unused-function"],
    extra_link_args=["-pthread"],
)


def build_in_place() -> Path:
    """Compiles in a scratch directory and leaves only the shared object beside this file."""
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(ffibuilder.compile(tmpdir=scratch))
        fresh = shutil.copy2(built, HERE / f".{built.name}")
        return Path(fresh).replace(HERE / built.name)  # processes that run with the old one keep it


if __name__ == "__main__":
    print(build_in_place())
