"""Builds `ftl.direct_io._direct_io`: for packaging, and tools/build_glue.py."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

CDEF = """
typedef struct dio_ring dio_ring;

dio_ring *dio_ring_create(unsigned depth);
void dio_ring_destroy(dio_ring *ring);
int dio_read_pages(dio_ring *ring, int fd, const int64_t *pages, const uint64_t *addresses, size_t n,
                   size_t page_size, uint64_t data_start, size_t max_request_bytes, uint32_t *crc,
                   uint64_t *failed_at);
int dio_program_pages(dio_ring *ring, int fd, const int64_t *pages, const uint64_t *addresses, size_t n,
                      size_t page_size, uint64_t data_start, size_t max_request_bytes, uint8_t *oob,
                      const dio_oob_piece *pieces, size_t num_pieces, const dio_extent *extents,
                      size_t num_extents, uint64_t *failed_at);
int dio_transfer_extents(dio_ring *ring, int fd, int write, const dio_extent *extents, size_t n,
                         size_t max_request_bytes, uint64_t *failed_at);
void dio_complete_oob(const uint64_t *addresses, size_t n, size_t page_size, uint8_t *oob);
int dio_find_run(const dio_map *map, uint64_t first_lba, uint64_t num_pages, dio_run *run);
int dio_read_run(const dio_map *map, const dio_run *run, uint8_t *to);
int dio_punch_hole(int fd, uint64_t offset, uint64_t length);
void dio_copy_pages(const uint64_t *to, const uint64_t *from, size_t n, size_t page_size);
void dio_xor_pages(const uint64_t *to, const uint64_t *from, size_t n, size_t page_size);
void dio_zero_pages(const uint64_t *addresses, size_t n, size_t page_size);
void dio_crc32c_pages(const uint64_t *addresses, size_t n, size_t size, uint32_t *out);
void dio_crc32c_records(const uint8_t *records, size_t n, size_t size, uint32_t *out);
int dio_crc32c_force_software(int on);
"""

ffibuilder = FFI()
ffibuilder.cdef((HERE / "records.h").read_text() + CDEF)
ffibuilder.set_source(
    "ftl.direct_io._direct_io",
    "#include <stddef.h>\n#include <stdint.h>\n"
    '#include "records.h"\n#include "crc32c.c"\n#include "ring.c"\n#include "mapped_read.c"\n',
    include_dirs=[str(HERE)],
    extra_compile_args=["-O3", "-std=gnu11"],
)
