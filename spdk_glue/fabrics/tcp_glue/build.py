"""Builds `spdk_glue.fabrics.tcp_glue._tcp_glue`: for packaging, and tools/build_glue.py."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
CRC32C = HERE.parents[2] / "ftl" / "direct_io"  # its crc32c.c

CDEF = """
static const int TCP_WOKEN, TCP_CLOSED;

uint32_t tcp_crc32c(const uint8_t *at, size_t length);
int tcp_take_frames(const tcp_rule *rules, const tcp_framing *framing, const uint8_t *bytes, uint64_t size,
                    tcp_frame *frames, int max_frames, uint64_t *taken, uint64_t *wanted);
int tcp_receive(tcp_stream *stream, const tcp_rule *rules, const tcp_framing *framing, tcp_frame *frames,
                int max_frames, int timeout_ms, int spin_us);
int tcp_send(int fd, const tcp_piece *pieces, size_t n, int timeout_ms);

typedef struct host_queue host_queue;

host_queue *host_create(const host_options *options);
void host_destroy(host_queue *queue);
int host_check(const host_queue *queue, const host_batch *batch, size_t *wrong);
int host_start(host_queue *queue, const host_entry *entry, uint64_t address, uint64_t length,
               host_completion *to);
size_t host_take_output(host_queue *queue, uint8_t *bytes, size_t size);
int host_feed(host_queue *queue, const uint8_t *bytes, size_t size);
void host_abort(host_queue *queue);
int host_fault_of(const host_queue *queue, uint32_t *detail);
size_t host_take_arrived(host_queue *queue, host_completion *completions, size_t max);
int host_transfer(host_queue *queue, int fd, const host_batch *batch, uint32_t depth,
                  host_completion *completions, uint32_t timeout_ms, size_t *wrong);
int host_submit(host_queue *queue, int fd, const host_batch *batch, size_t *wrong);
int host_poll(host_queue *queue, int fd, host_completion *completions, uint32_t max, uint32_t wait_ms,
              uint32_t timeout_ms, uint64_t *quiet_since);
"""
HEADERS = ["records.h", "host_records.h"]
SOURCES = ["crc32c.c", "digest.c", "receive.c", "send.c", "host_queue.c", "host_input.c", "host_io.c"]

ffibuilder = FFI()
ffibuilder.cdef("".join((HERE / name).read_text() for name in HEADERS) + CDEF)
ffibuilder.set_source(
    "spdk_glue.fabrics.tcp_glue._tcp_glue",
    "#include <stddef.h>\n#include <stdint.h>\n"
    "enum { TCP_WOKEN = -100000, TCP_CLOSED = -100001 };  /* no errno */\n"
    + "".join(f'#include "{name}"\n' for name in HEADERS + SOURCES),
    include_dirs=[str(HERE), str(CRC32C)],
    extra_compile_args=["-O3", "-std=gnu11", "-pthread", "-Wno-unused-function"],
    extra_link_args=["-pthread"],
)
