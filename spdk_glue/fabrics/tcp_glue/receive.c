/* Whole PDUs out of a stream of bytes, by the same rules as take_pdu of spdk_glue/fabrics/pdu.py. */
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { COMMON_BYTES = 8, DIGEST_BYTES = 4, MAX_TERMINATE_DATA_BYTES = 128, NUM_RULES = 16 };
enum { IS_HEADER_DIGEST = 1, IS_DATA_DIGEST = 2 };
enum { NO_DATA = 0, HAS_DATA = 2 };
enum { H2C_TERMINATE = 2, C2H_TERMINATE = 3 };
enum { INVALID_HEADER_FIELD = 1, HEADER_DIGEST_ERROR = 3, LIMIT_EXCEEDED = 5 };
enum { AT_TYPE = 0, AT_FLAGS = 1, AT_HLEN = 2, AT_PDO = 3, AT_PLEN = 4 };

static uint32_t load32(const uint8_t *at)
{
    uint32_t word;
    memcpy(&word, at, 4);
    return word;
}

static int refuse(tcp_frame *frame, int fes, uint32_t fei)
{
    frame->fes = fes;
    frame->fei = fei;
    return 1;
}

/* Fills in the frame of the PDU at `at`, of which `have` bytes are there, and its length. 1: there is a frame,
 * whole or refused; 0: more has to arrive, `*length` bytes in all where that is known. */
static int take_frame(const tcp_rule *rules, const tcp_framing *framing, const uint8_t *at, uint64_t have,
                      tcp_frame *frame, uint64_t *length)
{
    *length = COMMON_BYTES;
    if (have < COMMON_BYTES)
        return 0;
    uint8_t type = at[AT_TYPE], flags = at[AT_FLAGS], hlen = at[AT_HLEN], pdo = at[AT_PDO];
    uint32_t plen = load32(at + AT_PLEN);
    const tcp_rule *rule = &rules[type < NUM_RULES ? type : NUM_RULES - 1];
    memset(frame, 0, sizeof *frame);
    memcpy(frame->header, at, have < sizeof frame->header ? have : sizeof frame->header);
    frame->is_data_intact = 1;
    if (!rule->hlen || rule->from_host != framing->from_host)
        return refuse(frame, INVALID_HEADER_FIELD, AT_TYPE);
    if (hlen != rule->hlen)
        return refuse(frame, INVALID_HEADER_FIELD, AT_HLEN);
    int has_header_digest = rule->may_have_digests && framing->header_digest;
    if (!!(flags & IS_HEADER_DIGEST) != has_header_digest)
        return refuse(frame, INVALID_HEADER_FIELD, AT_FLAGS);
    uint32_t head = hlen + (has_header_digest ? DIGEST_BYTES : 0);
    if (plen < head || rule->data == (plen > head ? NO_DATA : HAS_DATA))
        return refuse(frame, INVALID_HEADER_FIELD, AT_PLEN);
    uint32_t data_at = head, tail = 0;
    if (plen > head && (type == H2C_TERMINATE || type == C2H_TERMINATE)) {
        if (plen > head + MAX_TERMINATE_DATA_BYTES)
            return refuse(frame, INVALID_HEADER_FIELD, AT_PLEN);
    } else if (plen > head) {
        if (!!(flags & IS_DATA_DIGEST) != !!framing->data_digest)
            return refuse(frame, INVALID_HEADER_FIELD, AT_FLAGS);
        tail = framing->data_digest ? DIGEST_BYTES : 0;
        if (pdo < head || pdo % 4 || (uint64_t)pdo + tail >= plen)
            return refuse(frame, INVALID_HEADER_FIELD, AT_PDO);
        data_at = pdo;
        if (plen - pdo - tail > framing->max_data_bytes)
            return refuse(frame, LIMIT_EXCEEDED, AT_PLEN);
    }
    *length = plen;
    if (have < head)
        return 0;
    if (has_header_digest && load32(at + hlen) != tcp_crc32c(at, hlen))
        return refuse(frame, HEADER_DIGEST_ERROR, load32(at + hlen));
    if (have < plen)
        return 0;
    memset(frame->header + hlen, 0, sizeof frame->header - hlen);
    frame->data_at = data_at;
    frame->data_length = plen - data_at - tail;
    if (frame->data_length && tail)
        frame->is_data_intact = load32(at + plen - DIGEST_BYTES) == tcp_crc32c(at + data_at, frame->data_length);
    return 1;
}

/* Frames of the whole PDUs at the start of `size` bytes, the last of them a refused one if there is any.
 * `*taken`: the bytes that they have; `*wanted`: what the PDU behind them has, as far as that is known. */
static int tcp_take_frames(const tcp_rule *rules, const tcp_framing *framing, const uint8_t *bytes, uint64_t size,
                           tcp_frame *frames, int max_frames, uint64_t *taken, uint64_t *wanted)
{
    int count = 0;
    uint64_t at = 0, length = 0;
    while (count < max_frames && take_frame(rules, framing, bytes + at, size - at, &frames[count], &length)) {
        frames[count].data_at += at;
        if (frames[count++].fes)
            break;
        at += length;
    }
    *taken = at;
    *wanted = length;
    return count;
}

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}

/* 1: the socket has something, 0: the time is over, TCP_WOKEN, or -errno. The first `spin_us` without sleep, where
 * the wait before this one was not longer: to be woken costs more than a small command. */
static int wait_for(tcp_stream *stream, int timeout_ms, int spin_us)
{
    struct pollfd fds[2] = {{.fd = stream->fd, .events = POLLIN}, {.fd = stream->wake_fd, .events = POLLIN}};
    int64_t began = now_us(), spin_until = began + (stream->last_wait_us <= spin_us ? spin_us : 0);
    int ready;
    while (!(ready = poll(fds, 2, 0)) && now_us() < spin_until)
        sched_yield();
    if (!ready && timeout_ms)
        ready = poll(fds, 2, timeout_ms);
    stream->last_wait_us = now_us() - began;
    if (ready < 0)
        return errno == EINTR ? TCP_WOKEN : -errno;
    if (!ready)
        return 0;
    if (fds[1].revents) {
        uint64_t count;
        if (read(stream->wake_fd, &count, sizeof count) < 0 && errno != EAGAIN)
            return -errno;
        return TCP_WOKEN;
    }
    return 1;
}

/* Frees what the frames of the call before occupied, and takes the whole PDUs that are there, waiting for one at
 * most timeout_ms. Returns their number, 0 when the time is over, TCP_WOKEN, TCP_CLOSED, or -errno. */
static int tcp_receive(tcp_stream *stream, const tcp_rule *rules, const tcp_framing *framing, tcp_frame *frames,
                       int max_frames, int timeout_ms, int spin_us)
{
    uint64_t wanted = 0, taken = 0;
    stream->start = stream->taken;
    for (;;) {
        int count = tcp_take_frames(rules, framing, stream->buffer + stream->start, stream->end - stream->start,
                                    frames, max_frames, &taken, &wanted);
        if (count) {
            stream->taken = stream->start + taken;
            for (int i = 0; i < count; i++)
                frames[i].data_at += stream->start;
            return count;
        }
        if (stream->start == stream->end)
            stream->start = stream->taken = stream->end = 0;
        if (stream->start && (stream->start + wanted > stream->capacity || stream->end == stream->capacity)) {
            memmove(stream->buffer, stream->buffer + stream->start, stream->end - stream->start);
            stream->end -= stream->start;
            stream->start = stream->taken = 0;
        }
        if (wanted > stream->capacity || stream->end == stream->capacity)
            return -EMSGSIZE;
        ssize_t got = recv(stream->fd, stream->buffer + stream->end, stream->capacity - stream->end, MSG_DONTWAIT);
        if (got == 0)
            return TCP_CLOSED;
        if (got > 0) {
            stream->end += got;
            continue;
        }
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            return -errno;
        int ready = wait_for(stream, timeout_ms, spin_us);
        if (ready != 1)
            return ready;
    }
}
