/* The host's side of one NVMe/TCP queue, after ICReq and ICResp: its state, without I/O.
 *
 * Commands go in by host_start. host_output says which bytes go out next and host_sent how many went; host_input says
 * where the next bytes belong and host_received how many came. Completions appear where host_start was told, or in
 * `arrived`. Large data are received where the command wants them; what is small, and headers, comes through `staging`.
 *
 * A command is in a slot; HOST_NEXT has every transition of a slot. Whatever the target sends that is not in it, or
 * not as the records and ranges demand, is a fault: the connection is of no use any more, what was under way aborted.
 * A target thus reaches no memory but the data of a command that reads and was wholly sent, and each byte of it once.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

enum { PDU_H2C_TERMINATE = 2, PDU_C2H_TERMINATE, PDU_COMMAND, PDU_RESPONSE, PDU_H2C_DATA, PDU_C2H_DATA, PDU_R2T = 9 };
enum { FLAG_HEADER_DIGEST = 1, FLAG_DATA_DIGEST = 2, FLAG_LAST = 4, FLAG_SUCCESS = 8 };
enum { COMMAND_BYTES = 72, SHORT_BYTES = 24, MAX_TERMINATE_BYTES = 152 }; /* COMMON_, DIGEST_BYTES: receive.c */
enum { SGL_IN_CAPSULE = 0x01, SGL_TRANSPORT = 0x5a, PSDT_SGL = 0x40 };
enum { OPCODE_FLUSH, OPCODE_WRITE, OPCODE_READ, OPCODE_COMPARE = 5, OPCODE_VERIFY = 12, OPCODE_FABRICS = 127 };
enum { TO_TARGET = 1, TO_HOST = 2 };

#define STATUS_ABORTED (0x08 << 1) /* aborted: the queue is gone */
#define STAGING_BYTES (64 << 10)
#define STAGED_BEHIND 512         /* bytes asked for behind large data, so that the next large data are not staged */
#define LARGE_BYTES (16 << 10)
#define PDU_ROOM 128              /* header, digest, padding up to the largest alignment */
#define NO_SLOT 0xffff

enum slot_state { SLOT_FREE, SLOT_QUEUED, SLOT_SENT, SLOT_SENDING, SLOT_ANSWERED, SLOT_BROKEN };
enum slot_event { WAS_SENT, WAS_ANSWERED, CARRIES_DATA, IS_GRANTED };

static const uint8_t HOST_NEXT[5][4] = {
    [SLOT_FREE][WAS_SENT] = SLOT_BROKEN,
    [SLOT_FREE][WAS_ANSWERED] = SLOT_BROKEN,
    [SLOT_FREE][CARRIES_DATA] = SLOT_BROKEN,
    [SLOT_FREE][IS_GRANTED] = SLOT_BROKEN,
    /* its capsule is not wholly sent */
    [SLOT_QUEUED][WAS_SENT] = SLOT_SENT,
    [SLOT_QUEUED][WAS_ANSWERED] = SLOT_BROKEN,
    [SLOT_QUEUED][CARRIES_DATA] = SLOT_BROKEN,
    [SLOT_QUEUED][IS_GRANTED] = SLOT_BROKEN,
    /* the target has it */
    [SLOT_SENT][WAS_SENT] = SLOT_BROKEN,
    [SLOT_SENT][WAS_ANSWERED] = SLOT_FREE,
    [SLOT_SENT][CARRIES_DATA] = SLOT_SENT,
    [SLOT_SENT][IS_GRANTED] = SLOT_SENDING,
    /* an H2CData of it is not wholly sent; one R2T at a time */
    [SLOT_SENDING][WAS_SENT] = SLOT_SENT,
    [SLOT_SENDING][WAS_ANSWERED] = SLOT_ANSWERED,
    [SLOT_SENDING][CARRIES_DATA] = SLOT_BROKEN,
    [SLOT_SENDING][IS_GRANTED] = SLOT_BROKEN,
    /* it has failed, but for the H2CData on its way */
    [SLOT_ANSWERED][WAS_SENT] = SLOT_FREE,
    [SLOT_ANSWERED][WAS_ANSWERED] = SLOT_BROKEN,
    [SLOT_ANSWERED][CARRIES_DATA] = SLOT_BROKEN,
    [SLOT_ANSWERED][IS_GRANTED] = SLOT_BROKEN,
};

typedef struct {
    uint8_t state, direction, opcode;
    uint16_t cid, ttag;
    uint8_t *memory;
    uint32_t length;
    uint32_t moved;      /* of the data: received, or granted by R2Ts (in a capsule: all) */
    uint32_t next, stop; /* of what an R2T granted: not yet in a PDU */
    uint64_t flushes;    /* a Flush: the writes that were complete when it began */
    host_completion *to;  /* NULL: a submitted command */
    host_completion answer;
    /* its PDU in `out` */
    uint32_t head_bytes, data_bytes, tail_bytes;
    const uint8_t *data;
    uint8_t head[PDU_ROOM], tail[DIGEST_BYTES];
} host_slot;

enum receive_state { IN_COMMON, IN_HEADER, IN_PADDING, IN_DATA, IN_DIGEST };

typedef struct host_queue {
    host_options options;
    int fault;
    uint32_t fault_detail;
    host_slot *slots;
    uint16_t *free_slots, *out;
    uint32_t num_free, out_head, num_out, num_arrived, num_submitted, num_transferred;
    uint64_t bytes_under_way, last_wait_ns;
    size_t head_sent; /* of the first PDU in `out` */
    host_completion *arrived;
    /* the PDU that is being received */
    enum receive_state receiving;
    uint32_t have, want; /* of its header or digest, in `header` */
    uint8_t header[MAX_TERMINATE_BYTES];
    uint32_t padding, data_left, last_data_bytes;
    uint8_t *data_at;
    host_slot *data_of;
    uint16_t by_cid[1 << 16];
    uint8_t staging[STAGING_BYTES];
} host_queue;

static uint16_t get16(const uint8_t *at) { uint16_t value; memcpy(&value, at, 2); return value; }
static uint32_t get32(const uint8_t *at) { uint32_t value; memcpy(&value, at, 4); return value; }
static void put16(uint8_t *at, uint32_t value) { uint16_t word = (uint16_t)value; memcpy(at, &word, 2); }
static void put32(uint8_t *at, uint32_t value) { memcpy(at, &value, 4); }

static void host_destroy(host_queue *queue)
{
    if (queue) {
        free(queue->slots);
        free(queue->free_slots);
        free(queue->out);
        free(queue->arrived);
        free(queue);
    }
}

static host_queue *host_create(const host_options *options)
{
    host_queue *queue = calloc(1, sizeof *queue);
    if (!queue)
        return NULL;
    uint32_t depth = options->depth;
    queue->options = *options;
    queue->want = COMMON_BYTES;
    queue->slots = calloc(depth, sizeof *queue->slots);
    queue->free_slots = calloc(depth, sizeof *queue->free_slots);
    queue->out = calloc(depth, sizeof *queue->out);
    queue->arrived = calloc(depth, sizeof *queue->arrived);
    if (!queue->slots || !queue->free_slots || !queue->out || !queue->arrived) {
        host_destroy(queue);
        return NULL;
    }
    memset(queue->by_cid, 0xff, sizeof queue->by_cid);
    for (queue->num_free = 0; queue->num_free < depth; queue->num_free++)
        queue->free_slots[queue->num_free] = (uint16_t)(depth - 1 - queue->num_free);
    return queue;
}

/* ---- slots ---- */

static void host_count(uint64_t *counter, uint64_t count)
{
    __atomic_fetch_add(counter, count, __ATOMIC_RELAXED);
}

static int host_fail(host_queue *queue, int fault, uint32_t detail)
{
    if (!queue->fault) {
        queue->fault = fault;
        queue->fault_detail = detail;
    }
    return -1;
}

static int is_write(const host_slot *slot)
{
    return slot->opcode != OPCODE_FLUSH && slot->opcode != OPCODE_READ && slot->opcode != OPCODE_COMPARE &&
           slot->opcode != OPCODE_VERIFY && slot->opcode != OPCODE_FABRICS;
}

/* What a success means for the drive's volatile cache. */
static void note_durability(host_queue *queue, const host_slot *slot)
{
    host_account *account = queue->options.account;
    if (!account || !queue->options.queue_id || slot->answer.status)
        return;
    if (is_write(slot))
        __atomic_fetch_add(&account->written, 1, __ATOMIC_SEQ_CST);
    if (slot->opcode != OPCODE_FLUSH)
        return;
    uint64_t flushed = __atomic_load_n(&account->flushed, __ATOMIC_SEQ_CST);
    while (flushed < slot->flushes &&
           !__atomic_compare_exchange_n(&account->flushed, &flushed, slot->flushes, 0, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
        ;
}

static void host_complete(host_queue *queue, host_slot *slot)
{
    note_durability(queue, slot);
    slot->answer.cid = slot->cid;
    slot->answer.sqid = queue->options.queue_id;
    if (slot->to) {
        *slot->to = slot->answer;
        queue->num_transferred--;
    } else {
        queue->arrived[queue->num_arrived++] = slot->answer;
        queue->num_submitted--;
    }
    slot->state = SLOT_FREE;
    queue->bytes_under_way -= slot->length;
    queue->by_cid[slot->cid] = NO_SLOT;
    queue->free_slots[queue->num_free++] = (uint16_t)(slot - queue->slots);
}

/* Every command under way ends with STATUS_ABORTED: after a fault, when nothing is sent or received any more. */
static void host_abort(host_queue *queue)
{
    for (uint32_t i = 0; i < queue->options.depth; i++) {
        host_slot *slot = &queue->slots[i];
        if (slot->state == SLOT_FREE)
            continue;
        if (slot->state != SLOT_ANSWERED)
            slot->answer = (host_completion){.status = STATUS_ABORTED};
        host_complete(queue, slot);
    }
    queue->num_out = 0;
}

/* Puts a PDU of `slot` in the queue to be sent: its header is in slot->head, `header_bytes` of it. */
static void host_send_pdu(host_queue *queue, host_slot *slot, uint32_t header_bytes, const uint8_t *data,
                          uint32_t data_bytes)
{
    const host_options *options = &queue->options;
    uint32_t head = header_bytes;
    slot->head[1] |= options->header_digest ? FLAG_HEADER_DIGEST : 0;
    slot->head[2] = (uint8_t)header_bytes;
    head += options->header_digest ? DIGEST_BYTES : 0;
    uint32_t pdo = (head + options->data_alignment - 1) / options->data_alignment * options->data_alignment;
    slot->data = data;
    slot->data_bytes = data_bytes;
    slot->tail_bytes = data_bytes && options->data_digest ? DIGEST_BYTES : 0;
    slot->head_bytes = data_bytes ? pdo : head;
    if (data_bytes)
        slot->head[3] = (uint8_t)pdo;
    if (slot->tail_bytes) {
        slot->head[1] |= FLAG_DATA_DIGEST;
        put32(slot->tail, tcp_crc32c(data, data_bytes));
    }
    put32(slot->head + 4, slot->head_bytes + data_bytes + slot->tail_bytes);
    if (options->header_digest)
        put32(slot->head + header_bytes, tcp_crc32c(slot->head, header_bytes));
    queue->out[(queue->out_head + queue->num_out++) % options->depth] = (uint16_t)(slot - queue->slots);
}

static void send_granted(host_queue *queue, host_slot *slot)
{
    uint32_t left = slot->stop - slot->next, limit = queue->options.max_h2c_data_bytes;
    uint32_t size = left < limit ? left : limit;
    memset(slot->head, 0, sizeof slot->head);
    slot->head[0] = PDU_H2C_DATA;
    slot->head[1] = size == left ? FLAG_LAST : 0;
    put16(slot->head + 8, slot->cid);
    put16(slot->head + 10, slot->ttag);
    put32(slot->head + 12, slot->next);
    put32(slot->head + 16, size);
    const uint8_t *data = slot->memory + slot->next;
    slot->next += size;
    host_send_pdu(queue, slot, SHORT_BYTES, data, size);
}

/* One event of a slot. 0, or -1: a fault. */
static int host_step(host_queue *queue, host_slot *slot, enum slot_event event)
{
    uint8_t next = HOST_NEXT[slot->state][event];
    if (next == SLOT_BROKEN)
        return host_fail(queue, HOST_FAULT_OUT_OF_ORDER, slot->cid);
    if (slot->state == SLOT_SENDING && event == WAS_SENT && slot->next < slot->stop) {
        send_granted(queue, slot);
        return 0;
    }
    slot->state = next;
    if (next == SLOT_FREE)
        host_complete(queue, slot);
    return 0;
}

static int direction_of(const host_entry *entry)
{
    /* of a fabrics command the type decides, the first byte of its NSID field */
    return (entry->opcode == OPCODE_FABRICS ? entry->nsid : entry->opcode) & 3;
}

/* Whether a command's data are as long as it says, and not longer than the drive takes: 0, else -EINVAL, -EMSGSIZE,
 * -EPROTOTYPE (data with a command that moves none). */
static int check_length(const host_queue *queue, const host_entry *entry, uint64_t length)
{
    const host_options *options = &queue->options;
    if (length > options->max_transfer_bytes)
        return -EMSGSIZE;
    if (options->queue_id && options->block_bytes && entry->nsid == options->nsid &&
        (entry->opcode == OPCODE_READ || entry->opcode == OPCODE_WRITE || entry->opcode == OPCODE_COMPARE)) {
        uint64_t num_blocks = (entry->cdw12 & 0xffff) + 1;
        return length == num_blocks * options->block_bytes ? 0 : -EINVAL;
    }
    int direction = direction_of(entry);
    return length && direction != TO_TARGET && direction != TO_HOST ? -EPROTOTYPE : 0;
}

/* 0, or what check_length says, with the index of the command in *wrong. */
static int host_check(const host_queue *queue, const host_batch *batch, size_t *wrong)
{
    for (size_t i = 0; i < batch->num_commands; i++) {
        int result = check_length(queue, &batch->entries[i], batch->lengths[i]);
        if (result) {
            *wrong = i;
            return result;
        }
    }
    return 0;
}

/* Takes a checked command. `to`: where its completion goes, or NULL. -EBUSY: no slot, or its CID is under way. */
static int host_start(host_queue *queue, const host_entry *entry, uint64_t address, uint64_t length,
                      host_completion *to)
{
    if (!queue->num_free || queue->by_cid[entry->cid] != NO_SLOT)
        return -EBUSY;
    if (!to && queue->num_submitted + queue->num_arrived >= queue->options.depth)
        return -EBUSY;
    uint16_t index = queue->free_slots[--queue->num_free];
    host_slot *slot = &queue->slots[index];
    slot->state = SLOT_QUEUED;
    slot->direction = length ? (uint8_t)direction_of(entry) : 0;
    slot->opcode = entry->opcode;
    slot->cid = entry->cid;
    slot->memory = (uint8_t *)(uintptr_t)address;
    slot->length = (uint32_t)length;
    slot->moved = slot->next = slot->stop = 0;
    slot->to = to;
    if (slot->opcode == OPCODE_FLUSH && queue->options.account)
        slot->flushes = __atomic_load_n(&queue->options.account->written, __ATOMIC_SEQ_CST);
    if (queue->options.account)
        host_count(&queue->options.account->commands, 1);
    queue->by_cid[slot->cid] = index;
    queue->bytes_under_way += length;
    if (to)
        queue->num_transferred++;
    else
        queue->num_submitted++;

    int in_capsule = slot->direction == TO_TARGET && length <= queue->options.in_capsule_bytes;
    host_entry sent = *entry;
    sent.flags = (uint8_t)((sent.flags & 0x3f) | PSDT_SGL);
    sent.dptr[0] = 0; /* an address: the offset in the capsule */
    sent.dptr[1] = length | (uint64_t)(in_capsule ? SGL_IN_CAPSULE : SGL_TRANSPORT) << 56;
    memset(slot->head, 0, sizeof slot->head);
    slot->head[0] = PDU_COMMAND;
    memcpy(slot->head + COMMON_BYTES, &sent, sizeof sent);
    if (in_capsule)
        slot->moved = slot->length;
    host_send_pdu(queue, slot, COMMAND_BYTES, slot->memory, in_capsule ? slot->length : 0);
    return 0;
}

/* ---- what goes out ---- */

/* The next bytes to send, in up to `max_pieces` pieces of memory: how many of them. */
static int host_output(const host_queue *queue, struct iovec *pieces, int max_pieces)
{
    int count = 0;
    size_t skip = queue->head_sent;
    for (uint32_t i = 0; i < queue->num_out && count + 3 <= max_pieces; i++) {
        const host_slot *slot = &queue->slots[queue->out[(queue->out_head + i) % queue->options.depth]];
        const struct iovec parts[3] = {
            {(void *)(uintptr_t)slot->head, slot->head_bytes},
            {(void *)(uintptr_t)slot->data, slot->data_bytes},
            {(void *)(uintptr_t)slot->tail, slot->tail_bytes},
        };
        for (int k = 0; k < 3; k++) {
            size_t passed = skip < parts[k].iov_len ? skip : parts[k].iov_len;
            skip -= passed;
            if (parts[k].iov_len > passed)
                pieces[count++] = (struct iovec){(uint8_t *)parts[k].iov_base + passed, parts[k].iov_len - passed};
        }
    }
    return count;
}

static void host_sent(host_queue *queue, size_t size)
{
    if (queue->options.account)
        host_count(&queue->options.account->bytes_to_target, size);
    size += queue->head_sent;
    while (queue->num_out) {
        host_slot *slot = &queue->slots[queue->out[queue->out_head]];
        size_t whole = (size_t)slot->head_bytes + slot->data_bytes + slot->tail_bytes;
        if (size < whole)
            break;
        size -= whole;
        queue->out_head = (queue->out_head + 1) % queue->options.depth;
        queue->num_out--;
        host_step(queue, slot, WAS_SENT);
    }
    queue->head_sent = size;
}
