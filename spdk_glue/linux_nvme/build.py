"""Builds `spdk_glue.linux_nvme._linux_nvme`: for packaging, and tools/build_glue.py."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

CDEF = """
#define LENGTH_REFUSED 1
static const uint32_t ADMIN_32, IO_32, ADMIN_64, IO_64, URING_IO;

typedef struct nvme_ring nvme_ring;

nvme_ring *nvme_ring_create(const nvme_device *device, unsigned depth);
void nvme_ring_destroy(nvme_ring *ring);
int nvme_ring_transfer(nvme_ring *ring, const nvme_batch *batch, unsigned depth, nvme_completion *completions,
                       size_t *failed_at);
int nvme_ring_submit(nvme_ring *ring, const nvme_batch *batch, size_t *failed_at);
int nvme_ring_poll(nvme_ring *ring, int wait, nvme_completion *completions);
int nvme_check_lengths(const nvme_device *device, const nvme_batch *batch, size_t *failed_at);
int nvme_ioctl_transfer(const nvme_device *device, const nvme_batch *batch, unsigned depth,
                        nvme_completion *completions, size_t *failed_at);
"""

ffibuilder = FFI()
ffibuilder.cdef((HERE / "records.h").read_text() + CDEF)
ffibuilder.set_source(
    "spdk_glue.linux_nvme._linux_nvme",
    "#include <stddef.h>\n#include <stdint.h>\n"
    '#include "records.h"\n#include "passthrough.c"\n#include "ioctl.c"\n#include "ring.c"\n',
    include_dirs=[str(HERE)],
    extra_compile_args=["-O2", "-std=gnu11", "-pthread"],
    extra_link_args=["-pthread"],
)
