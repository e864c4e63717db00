/* Batches of PDUs into a socket: headers, padding, data and digests gathered, nothing copied. */
#include <sys/uio.h>

enum { PIECES_AT_ONCE = 128, VECTORS_PER_PIECE = 5, MAX_PADDING = 128 };

static void store32(uint8_t *at, uint32_t word)
{
    memcpy(at, &word, 4);
}

/* The parts of one PDU; how many there are. digests: room for both. */
static int gather(const tcp_piece *piece, uint8_t *digests, struct iovec *parts)
{
    static const uint8_t zeros[MAX_PADDING];
    uint8_t *header = (uint8_t *)(uintptr_t)piece->header_address;
    void *data = (void *)(uintptr_t)piece->data_address;
    int count = 0;
    uint32_t at = header[AT_HLEN];
    parts[count++] = (struct iovec){header, at};
    if (header[AT_FLAGS] & IS_HEADER_DIGEST) {
        store32(digests, tcp_crc32c(header, header[AT_HLEN]));
        parts[count++] = (struct iovec){digests, DIGEST_BYTES};
        at += DIGEST_BYTES;
    }
    if (!piece->data_length)
        return count;
    if (header[AT_PDO] > at && header[AT_PDO] - at <= MAX_PADDING)
        parts[count++] = (struct iovec){(void *)zeros, header[AT_PDO] - at};
    parts[count++] = (struct iovec){data, piece->data_length};
    if (header[AT_FLAGS] & IS_DATA_DIGEST) {
        store32(digests + DIGEST_BYTES, tcp_crc32c(data, piece->data_length));
        parts[count++] = (struct iovec){digests + DIGEST_BYTES, DIGEST_BYTES};
    }
    return count;
}

static int send_all(int fd, struct iovec *parts, int count, int timeout_ms)
{
    int first = 0;
    while (first < count) {
        struct msghdr message = {.msg_iov = parts + first, .msg_iovlen = count - first};
        ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            struct pollfd waiting = {.fd = fd, .events = POLLOUT};
            int ready = poll(&waiting, 1, timeout_ms);
            if (ready == 0)
                return -ETIMEDOUT;
            if (ready < 0 && errno != EINTR)
                return -errno;
            continue;
        }
        if (sent < 0)
            return -errno;
        while (first < count && (size_t)sent >= parts[first].iov_len)
            sent -= parts[first++].iov_len;
        if (first < count) {
            parts[first].iov_base = (uint8_t *)parts[first].iov_base + sent;
            parts[first].iov_len -= sent;
        }
    }
    return 0;
}

/* Sends n PDUs in order. 0, or -errno; -ETIMEDOUT where the peer took nothing for timeout_ms. */
static int tcp_send(int fd, const tcp_piece *pieces, size_t n, int timeout_ms)
{
    uint8_t digests[PIECES_AT_ONCE][2 * DIGEST_BYTES];
    struct iovec parts[PIECES_AT_ONCE * VECTORS_PER_PIECE];
    for (size_t done = 0; done < n;) {
        int count = 0;
        for (size_t i = 0; i < PIECES_AT_ONCE && done < n; i++, done++)
            count += gather(&pieces[done], digests[i], parts + count);
        int result = send_all(fd, parts, count, timeout_ms);
        if (result)
            return result;
    }
    return 0;
}
