/* What comes to a host's queue, see host_queue.c: PDUs taken byte by byte, and data where they belong. */

static host_slot *slot_of(host_queue *queue, uint16_t cid)
{
    uint16_t index = queue->by_cid[cid];
    if (index == NO_SLOT) {
        host_fail(queue, HOST_FAULT_NO_SUCH_COMMAND, cid);
        return NULL;
    }
    return &queue->slots[index];
}

/* The rules of pdu.py for the PDUs that a host receives. */
static int check_common(host_queue *queue)
{
    const uint8_t *header = queue->header;
    uint8_t type = header[0], flags = header[1], hlen = header[2], pdo = header[3];
    uint32_t plen = get32(header + 4);
    if (type != PDU_C2H_TERMINATE && type != PDU_RESPONSE && type != PDU_C2H_DATA && type != PDU_R2T)
        return host_fail(queue, HOST_FAULT_TYPE, type);
    if (hlen != SHORT_BYTES)
        return host_fail(queue, HOST_FAULT_HEADER_LENGTH, type);
    int has_digest = type != PDU_C2H_TERMINATE && queue->options.header_digest;
    if (!!(flags & FLAG_HEADER_DIGEST) != has_digest)
        return host_fail(queue, HOST_FAULT_FLAGS, type);
    queue->want = hlen + (has_digest ? DIGEST_BYTES : 0);
    if (type == PDU_C2H_TERMINATE) {
        if (plen < hlen || plen > MAX_TERMINATE_BYTES)
            return host_fail(queue, HOST_FAULT_LENGTH, type);
        queue->want = plen;
    } else if (type == PDU_C2H_DATA) {
        uint32_t tail = queue->options.data_digest ? DIGEST_BYTES : 0;
        if (!!(flags & FLAG_DATA_DIGEST) != !!tail || (flags & (FLAG_LAST | FLAG_SUCCESS)) == FLAG_SUCCESS)
            return host_fail(queue, HOST_FAULT_FLAGS, type);
        if (pdo < queue->want || pdo % 4)
            return host_fail(queue, HOST_FAULT_DATA_OFFSET, type);
        if (plen <= pdo + tail)
            return host_fail(queue, HOST_FAULT_LENGTH, type);
    } else if (plen != queue->want) {
        return host_fail(queue, HOST_FAULT_LENGTH, type);
    }
    return 0;
}

/* Whether a command that succeeded has all its data. A message of authentication may be shorter than the room for it. */
static int has_all_data(const host_slot *slot)
{
    return !slot->direction || slot->moved == slot->length ||
           (slot->opcode == OPCODE_FABRICS && slot->direction == TO_HOST);
}

static int take_response(host_queue *queue)
{
    host_completion answer;
    memcpy(&answer, queue->header + COMMON_BYTES, sizeof answer);
    answer.status &= 0xfffe; /* of a queue in memory: the phase */
    host_slot *slot = slot_of(queue, answer.cid);
    if (!slot)
        return -1;
    if (!answer.status && slot->state == SLOT_SENDING) /* it cannot have done what it has not got */
        return host_fail(queue, HOST_FAULT_OUT_OF_ORDER, slot->cid);
    if (!answer.status && !has_all_data(slot))
        return host_fail(queue, HOST_FAULT_INCOMPLETE, slot->cid);
    slot->answer = answer;
    return host_step(queue, slot, WAS_ANSWERED);
}

static int take_grant(host_queue *queue)
{
    host_slot *slot = slot_of(queue, get16(queue->header + 8));
    if (!slot)
        return -1;
    uint32_t offset = get32(queue->header + 12), length = get32(queue->header + 16);
    if (slot->direction != TO_TARGET || !length || offset != slot->moved || length > slot->length - slot->moved)
        return host_fail(queue, HOST_FAULT_GRANT_RANGE, slot->cid);
    if (host_step(queue, slot, IS_GRANTED))
        return -1;
    slot->ttag = get16(queue->header + 10);
    slot->next = slot->moved;
    slot->stop = slot->moved = offset + length;
    send_granted(queue, slot);
    return 0;
}

static int begin_data(host_queue *queue)
{
    const uint8_t *header = queue->header;
    uint32_t offset = get32(header + 12), length = get32(header + 16), plen = get32(header + 4);
    host_slot *slot = slot_of(queue, get16(header + 8));
    if (!slot)
        return -1;
    if (length != plen - header[3] - (queue->options.data_digest ? DIGEST_BYTES : 0))
        return host_fail(queue, HOST_FAULT_LENGTH, PDU_C2H_DATA);
    if (slot->direction != TO_HOST || offset != slot->moved || length > slot->length - slot->moved)
        return host_fail(queue, HOST_FAULT_DATA_RANGE, slot->cid);
    if (host_step(queue, slot, CARRIES_DATA))
        return -1;
    queue->data_of = slot;
    queue->data_at = slot->memory + offset;
    queue->data_left = queue->last_data_bytes = length;
    queue->padding = header[3] - queue->want;
    queue->receiving = queue->padding ? IN_PADDING : IN_DATA;
    return 0;
}

static void expect_pdu(host_queue *queue)
{
    queue->receiving = IN_COMMON;
    queue->have = 0;
    queue->want = COMMON_BYTES;
}

static int end_data(host_queue *queue)
{
    host_slot *slot = queue->data_of;
    uint32_t length = get32(queue->header + 16);
    if (queue->options.data_digest &&
        get32(queue->header + SHORT_BYTES) != tcp_crc32c(slot->memory + slot->moved, length))
        return host_fail(queue, HOST_FAULT_DATA_DIGEST, slot->cid);
    slot->moved += length;
    expect_pdu(queue);
    if (!(queue->header[1] & FLAG_SUCCESS))
        return 0;
    if (!has_all_data(slot))
        return host_fail(queue, HOST_FAULT_INCOMPLETE, slot->cid);
    memset(&slot->answer, 0, sizeof slot->answer);
    return host_step(queue, slot, WAS_ANSWERED);
}

/* The data of a PDU are all there. */
static int data_received(host_queue *queue)
{
    if (!queue->options.data_digest)
        return end_data(queue);
    queue->receiving = IN_DIGEST; /* behind the header's bytes, whose digest was checked */
    queue->have = SHORT_BYTES;
    queue->want = SHORT_BYTES + DIGEST_BYTES;
    return 0;
}

/* A whole header, or digest, or terminate request is there. */
static int header_received(host_queue *queue)
{
    const uint8_t *header = queue->header;
    if (queue->receiving == IN_DIGEST)
        return end_data(queue);
    if (queue->receiving == IN_COMMON) {
        queue->receiving = IN_HEADER;
        return check_common(queue);
    }
    if (header[0] == PDU_C2H_TERMINATE)
        return host_fail(queue, HOST_FAULT_TERMINATED, get16(header + 8));
    if (queue->options.header_digest && get32(header + SHORT_BYTES) != tcp_crc32c(header, SHORT_BYTES))
        return host_fail(queue, HOST_FAULT_HEADER_DIGEST, header[0]);
    if (header[0] == PDU_C2H_DATA)
        return begin_data(queue);
    expect_pdu(queue);
    return header[0] == PDU_RESPONSE ? take_response(queue) : take_grant(queue);
}

static int host_take_bytes(host_queue *queue, const uint8_t *bytes, size_t size)
{
    while (size) {
        size_t part;
        if (queue->receiving == IN_PADDING) {
            part = size < queue->padding ? size : queue->padding;
            queue->padding -= (uint32_t)part;
            if (!queue->padding)
                queue->receiving = IN_DATA;
        } else if (queue->receiving == IN_DATA) {
            part = size < queue->data_left ? size : queue->data_left;
            memcpy(queue->data_at, bytes, part);
            queue->data_at += part;
            queue->data_left -= (uint32_t)part;
            if (!queue->data_left && data_received(queue))
                return -1;
        } else {
            part = size < queue->want - queue->have ? size : queue->want - queue->have;
            memcpy(queue->header + queue->have, bytes, part);
            queue->have += (uint32_t)part;
            if (queue->have == queue->want && header_received(queue))
                return -1;
        }
        bytes += part;
        size -= part;
    }
    return 0;
}

/* Where the next bytes belong: one or two pieces of memory. */
static int host_input(host_queue *queue, struct iovec pieces[2])
{
    int count = 0;
    if (queue->receiving == IN_DATA)
        pieces[count++] = (struct iovec){queue->data_at, queue->data_left};
    int is_large = queue->last_data_bytes >= LARGE_BYTES;
    pieces[count++] = (struct iovec){queue->staging, is_large ? STAGED_BEHIND : STAGING_BYTES};
    return count;
}

/* So many bytes came, into the pieces of host_input in their order. 0, or -1: a fault. */
static int host_received(host_queue *queue, size_t size)
{
    if (queue->options.account)
        host_count(&queue->options.account->bytes_from_target, size);
    if (queue->receiving == IN_DATA) {
        size_t direct = size < queue->data_left ? size : queue->data_left;
        queue->data_at += direct;
        queue->data_left -= (uint32_t)direct;
        size -= direct;
        if (!queue->data_left && data_received(queue))
            return -1;
    }
    return host_take_bytes(queue, queue->staging, size);
}

/* For who has no socket: the next bytes to send, at most `size`, as if they had been sent; and bytes as if they had
 * been received. */
static size_t host_take_output(host_queue *queue, uint8_t *bytes, size_t size)
{
    struct iovec pieces[3];
    size_t taken = 0;
    int count = host_output(queue, pieces, 3);
    for (int i = 0; i < count && taken < size; i++) {
        size_t part = pieces[i].iov_len < size - taken ? pieces[i].iov_len : size - taken;
        memcpy(bytes + taken, pieces[i].iov_base, part);
        taken += part;
    }
    host_sent(queue, taken);
    return taken;
}

static int host_feed(host_queue *queue, const uint8_t *bytes, size_t size)
{
    while (size && !queue->fault) {
        struct iovec pieces[2];
        int count = host_input(queue, pieces);
        size_t fed = 0;
        for (int i = 0; i < count && fed < size; i++) {
            size_t part = pieces[i].iov_len < size - fed ? pieces[i].iov_len : size - fed;
            memcpy(pieces[i].iov_base, bytes + fed, part);
            fed += part;
        }
        bytes += fed;
        size -= fed;
        host_received(queue, fed);
    }
    return queue->fault ? -1 : 0;
}

static int host_fault_of(const host_queue *queue, uint32_t *detail)
{
    *detail = queue->fault_detail;
    return queue->fault;
}

/* Takes up to `max` completions of submitted commands. */
static size_t host_take_arrived(host_queue *queue, host_completion *completions, size_t max)
{
    size_t count = queue->num_arrived < max ? queue->num_arrived : max;
    memcpy(completions, queue->arrived, count * sizeof *completions);
    queue->num_arrived -= (uint32_t)count;
    memmove(queue->arrived, queue->arrived + count, queue->num_arrived * sizeof *completions);
    return count;
}
