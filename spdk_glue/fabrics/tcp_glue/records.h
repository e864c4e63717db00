/* What Python hands to C: for the compiler, and for cffi, which reads this as it is. */

/* RULE of spdk_glue/fabrics/pdu.py: a row for each type of PDU. */
typedef struct {
    uint8_t hlen, may_have_digests, data, from_host;
} tcp_rule;

/* Framing of spdk_glue/fabrics/pdu.py: what arrives here. */
typedef struct {
    uint8_t from_host, header_digest, data_digest, reserved;
    uint32_t max_data_bytes;
} tcp_framing;

/* FRAME of api.py: one PDU that arrived. */
typedef struct {
    uint8_t header[128];
    uint64_t data_at; /* in the stream's buffer */
    uint32_t data_length;
    uint32_t fei;
    uint8_t fes; /* not 0: the PDU breaks the rules, and nothing comes after it */
    uint8_t is_data_intact;
    uint8_t reserved[6];
} tcp_frame;

/* PIECE of api.py: one PDU to send. The header says how long it is and which digests follow. */
typedef struct {
    uint64_t header_address, data_address;
    uint64_t data_length;
} tcp_piece;

/* One connection's receiving side. buffer[start, end) has arrived; [start, taken) is in frames handed out. */
typedef struct {
    int fd, wake_fd;
    uint8_t *buffer;
    uint64_t capacity, start, taken, end;
    int64_t last_wait_us;
} tcp_stream;
