/* Queue pairs: I/O commands in batches, by one thread at a time.
 *
 * Over a socket, how much may be under way of one transfer depends on what is behind it. Of a drive in memory, more
 * than a megabyte leaves the processor's caches between the target's copy and ours (loopback: 3.1 GB/s with 8 commands
 * of 128 KiB, 2.5 with 128 of them). A disk wants as many requests as it can get. So a queue pair remembers what a byte
 * cost with each bound, takes the better one, and now and then looks at the other. */
static const uint64_t SOCKET_BYTES_UNDER_WAY[] = {1 << 20, 16 << 20};
#define NUM_BOUNDS 2
#define LOOK_EVERY 16       /* transfers */
#define JUDGED_BYTES (4 << 20) /* a shorter transfer tells nothing */

typedef struct {
    struct pyspdk_queue_pair *queue_pair;
    pyspdk_completion *result; /* of a command of a transfer; NULL: its completion goes to the ring */
    uint16_t cid; /* the caller's; SPDK gives its own */
    uint8_t opcode;
    void *bounce, *data; /* memory that SPDK knows in place of the caller's */
    uint32_t length;
    unsigned long writes_before;
} slot_t;

typedef struct pyspdk_queue_pair {
    pyspdk_controller *controller;
    struct pyspdk_queue_pair *next, **link; /* in the controller's list */
    struct spdk_nvme_qpair *spdk;           /* NULL after a loss, until it is used again */
    struct spdk_nvme_io_qpair_opts options;
    unsigned depth;
    uint32_t nsid, block_bytes; /* of the namespace whose Reads and Writes are checked; 0 for none */
    atomic_flag busy;
    slot_t *slots;
    unsigned *free_slots, num_free;
    pyspdk_completion *ring;       /* of `depth` completions of submitted commands */
    unsigned ring_head, ring_count; /* those that nobody has polled yet */
    unsigned ring_reserved;         /* the same and those still under way */
    size_t transferred;             /* commands of the current transfer that have ended */
    uint64_t bytes_under_way;       /* of its others */
    unsigned transfers;             /* that were judged */
    double byte_ns[NUM_BOUNDS];     /* what a byte took with each bound, the newest counting most; 0: not known */
} pyspdk_queue_pair;

enum { OPCODE_FLUSH = 0, OPCODE_WRITE = 1, OPCODE_READ = 2, OPCODE_COMPARE = 5 };

static void io_done(void *argument, const struct spdk_nvme_cpl *found)
{
    slot_t *slot = argument;
    pyspdk_queue_pair *queue_pair = slot->queue_pair;
    pyspdk_controller *controller = queue_pair->controller;
    pyspdk_completion completion;
    memcpy(&completion, found, sizeof completion);
    completion.cid = slot->cid;
    completion.status &= (uint16_t)~PHASE;
    if (!completion.status) {
        if (slot->bounce && (slot->opcode & 3) == 2)
            memcpy(slot->data, slot->bounce, slot->length);
        if (slot->opcode == OPCODE_FLUSH) {
            /* what completed while the flush ran may not be in it */
            pthread_mutex_lock(&controller->admin);
            if (slot->writes_before > controller->flushed_writes)
                controller->flushed_writes = slot->writes_before;
            pthread_mutex_unlock(&controller->admin);
        } else if ((slot->opcode & 3) != OPCODE_READ) {
            atomic_fetch_add(&controller->writes, 1);
        }
    }
    spdk_free(slot->bounce);
    slot->bounce = NULL;
    if (slot->result) {
        *slot->result = completion;
        queue_pair->transferred++;
        queue_pair->bytes_under_way -= slot->length;
    } else {
        queue_pair->ring[(queue_pair->ring_head + queue_pair->ring_count++) % queue_pair->depth] = completion;
    }
    queue_pair->free_slots[queue_pair->num_free++] = (unsigned)(slot - queue_pair->slots);
}

static int submit_one(pyspdk_queue_pair *queue_pair, const pyspdk_entry *entry, uint64_t address, uint64_t length,
                      pyspdk_completion *completion)
{
    pyspdk_controller *controller = queue_pair->controller;
    slot_t *slot = &queue_pair->slots[queue_pair->free_slots[queue_pair->num_free - 1]];
    struct spdk_nvme_cmd cmd;
    memcpy(&cmd, entry, sizeof cmd);
    slot->result = completion;
    slot->cid = cmd.cid;
    slot->opcode = (uint8_t)cmd.opc;
    slot->data = (void *)address;
    slot->length = (uint32_t)length;
    slot->writes_before = atomic_load(&controller->writes);
    void *data = length ? slot->data : NULL;
    uint64_t contiguous = length;
    if (data && controller->moves_by_dma && spdk_vtophys(data, &contiguous) == SPDK_VTOPHYS_ERROR) {
        slot->bounce = pyspdk_allocate(length, DMA_ALIGNMENT);
        if (!slot->bounce)
            return -ENOMEM;
        if ((slot->opcode & 3) == 1)
            memcpy(slot->bounce, data, length);
        data = slot->bounce;
    }
    int result =
        spdk_nvme_ctrlr_cmd_io_raw(controller->spdk, queue_pair->spdk, &cmd, data, (uint32_t)length, io_done, slot);
    if (result) {
        spdk_free(slot->bounce);
        slot->bounce = NULL;
        return result;
    }
    queue_pair->num_free--;
    return 0;
}

/* What a raw command has wrong would cost the connection. 0; -EMSGSIZE: more than one command moves; -EINVAL: not
 * as many bytes as blocks; -EPROTOTYPE: data, and an opcode that moves none. *wrong is the command's index. */
static int check_lengths(const pyspdk_queue_pair *queue_pair, const pyspdk_entry *entries, const uint64_t *lengths,
                         size_t n, size_t *wrong)
{
    for (*wrong = 0; *wrong < n; ++*wrong) {
        const uint32_t *dwords = entries[*wrong].dwords;
        uint64_t length = lengths[*wrong];
        uint8_t opcode = (uint8_t)dwords[0];
        if (length > queue_pair->controller->max_transfer_bytes)
            return -EMSGSIZE;
        bool moves_blocks = opcode == OPCODE_WRITE || opcode == OPCODE_READ || opcode == OPCODE_COMPARE;
        if (moves_blocks && queue_pair->block_bytes && dwords[1] == queue_pair->nsid &&
            length != ((uint64_t)(dwords[12] & 0xFFFF) + 1) * queue_pair->block_bytes)
            return -EINVAL;
        if (length && !(opcode & 3))
            return -EPROTOTYPE;
    }
    return 0;
}

static unsigned outstanding(const pyspdk_queue_pair *queue_pair)
{
    return queue_pair->depth - queue_pair->num_free;
}

/* Under the gate: 0, -ENXIO (the connection is lost), -ENOSPC (no more of them). */
static int connect_queue_pair(pyspdk_queue_pair *queue_pair)
{
    pyspdk_controller *controller = queue_pair->controller;
    queue_pair->spdk =
        spdk_nvme_ctrlr_alloc_io_qpair(controller->spdk, &queue_pair->options, sizeof queue_pair->options);
    if (queue_pair->spdk)
        return 0;
    /* no more of them, or the beginning of a loss: the admin queue's end may come a little later */
    uint64_t idle_since = 0, give_up = now_ms() + ABORT_MS;
    while (!is_lost(controller) && now_ms() < give_up)
        pause_polling(&idle_since);
    return atomic_load(&controller->lost) ? -ENXIO : -ENOSPC;
}

/* What is outstanding completes as aborted. */
static void disconnect_queue_pair(pyspdk_queue_pair *queue_pair)
{
    if (queue_pair->spdk)
        spdk_nvme_ctrlr_free_io_qpair(queue_pair->spdk);
    queue_pair->spdk = NULL;
}

static void free_queue_pairs(pyspdk_controller *controller)
{
    for (pyspdk_queue_pair *queue_pair = controller->queue_pairs; queue_pair; queue_pair = queue_pair->next)
        disconnect_queue_pair(queue_pair);
}

static pyspdk_queue_pair *pyspdk_create_queue_pair(pyspdk_controller *controller, unsigned depth, uint32_t nsid,
                                                   uint32_t block_bytes, int *result)
{
    pyspdk_clear_error();
    pyspdk_queue_pair *queue_pair = calloc(1, sizeof *queue_pair);
    if (!queue_pair || !(queue_pair->slots = calloc(depth, sizeof(slot_t))) ||
        !(queue_pair->free_slots = calloc(depth, sizeof(unsigned))) ||
        !(queue_pair->ring = calloc(depth, sizeof(pyspdk_completion)))) {
        *result = -ENOMEM;
        goto failed;
    }
    struct spdk_nvme_io_qpair_opts *opts = &queue_pair->options;
    spdk_nvme_ctrlr_get_default_io_qpair_opts(controller->spdk, opts, sizeof *opts);
    /* A queue of n entries holds n - 1 commands; more requests than that would wait inside SPDK. */
    opts->io_queue_size = depth + 1 < opts->io_queue_size ? depth + 1 : opts->io_queue_size;
    opts->io_queue_requests = 2 * opts->io_queue_size;
    opts->delay_cmd_submit = true; /* one doorbell, or one write to the socket, for a batch */
    queue_pair->controller = controller;
    queue_pair->nsid = nsid;
    queue_pair->block_bytes = block_bytes;
    queue_pair->depth = depth < opts->io_queue_size ? depth : opts->io_queue_size - 1;
    for (unsigned index = 0; index < queue_pair->depth; index++) {
        queue_pair->slots[index].queue_pair = queue_pair;
        queue_pair->free_slots[queue_pair->num_free++] = index;
    }
    pthread_rwlock_rdlock(&controller->gate);
    *result = connect_queue_pair(queue_pair);
    if (!*result) {
        pthread_mutex_lock(&controller->admin);
        queue_pair->next = controller->queue_pairs;
        queue_pair->link = &controller->queue_pairs;
        if (queue_pair->next)
            queue_pair->next->link = &queue_pair->next;
        controller->queue_pairs = queue_pair;
        pthread_mutex_unlock(&controller->admin);
    }
    pthread_rwlock_unlock(&controller->gate);
    if (!*result)
        return queue_pair;
failed:
    if (queue_pair) {
        free(queue_pair->slots);
        free(queue_pair->free_slots);
        free(queue_pair->ring);
    }
    free(queue_pair);
    return NULL;
}

static unsigned pyspdk_depth(const pyspdk_queue_pair *queue_pair)
{
    return queue_pair->depth;
}

/* Take a queue pair for this thread, connected: 0, -EBUSY (another thread has it), -ENXIO (no connection), -ENOSPC. */
static int enter(pyspdk_queue_pair *queue_pair)
{
    pyspdk_controller *controller = queue_pair->controller;
    if (atomic_flag_test_and_set(&queue_pair->busy))
        return -EBUSY;
    pthread_rwlock_rdlock(&controller->gate);
    int result = atomic_load(&controller->lost) ? -ENXIO : 0;
    if (!result && !queue_pair->spdk)
        result = connect_queue_pair(queue_pair);
    if (result) {
        pthread_rwlock_unlock(&controller->gate);
        atomic_flag_clear(&queue_pair->busy);
    }
    return result;
}

static void leave(pyspdk_queue_pair *queue_pair)
{
    pthread_rwlock_unlock(&queue_pair->controller->gate);
    atomic_flag_clear(&queue_pair->busy);
}

/* What is outstanding completes as aborted; returns -ENXIO. */
static int abort_all(pyspdk_queue_pair *queue_pair)
{
    disconnect_queue_pair(queue_pair);
    lose(queue_pair->controller);
    return -ENXIO;
}

/* Completions since the last look, or -ENXIO where the connection is gone and everything was aborted. */
static int reap(pyspdk_queue_pair *queue_pair)
{
    int result = spdk_nvme_qpair_process_completions(queue_pair->spdk, 0);
    if (result < 0 || atomic_load(&queue_pair->controller->lost))
        return abort_all(queue_pair);
    return result;
}

/* reap, until something came; it gives the CPU away while nothing does. */
static int reap_some(pyspdk_queue_pair *queue_pair, uint64_t timeout_ms)
{
    uint64_t idle_since = 0;
    for (;;) {
        unsigned before = queue_pair->num_free;
        int result = reap(queue_pair);
        if (result < 0 || queue_pair->num_free != before)
            return result < 0 ? result : 1;
        pause_polling(&idle_since);
        if (now_ns() - idle_since > timeout_ms * 1000000)
            return abort_all(queue_pair);
    }
}

/* Start a batch: as many were started as it returns, or -EBUSY, -ENXIO. The data stay where they are until then. */
static int pyspdk_submit(pyspdk_queue_pair *queue_pair, const pyspdk_entry *entries, const uint64_t *addresses,
                         const uint64_t *lengths, size_t n, size_t *wrong)
{
    int result = check_lengths(queue_pair, entries, lengths, n, wrong);
    if (!result)
        result = enter(queue_pair);
    if (result)
        return result;
    size_t started = 0;
    while (started < n && queue_pair->num_free && queue_pair->ring_reserved < queue_pair->depth && !result) {
        result = submit_one(queue_pair, &entries[started], addresses[started], lengths[started], NULL);
        started += !result;
        queue_pair->ring_reserved += !result;
    }
    if (result != -ENXIO)
        result = spdk_nvme_qpair_process_completions(queue_pair->spdk, 0); /* rings the doorbell */
    if (result == -ENXIO)
        result = abort_all(queue_pair);
    leave(queue_pair);
    return started || result > 0 ? (int)started : result;
}

/* Completions that have come, at most `max`; at least one if `wait` and any command is outstanding. */
static int pyspdk_poll(pyspdk_queue_pair *queue_pair, pyspdk_completion *completions, unsigned max, int wait,
                       uint64_t timeout_ms)
{
    int result = 0;
    if (!queue_pair->ring_count && outstanding(queue_pair)) {
        result = enter(queue_pair);
        if (result == -ENXIO && !atomic_flag_test_and_set(&queue_pair->busy)) {
            pthread_rwlock_rdlock(&queue_pair->controller->gate);
            disconnect_queue_pair(queue_pair);
            leave(queue_pair);
        } else if (result) {
            return result;
        } else {
            result = wait ? reap_some(queue_pair, timeout_ms) : reap(queue_pair);
            leave(queue_pair);
        }
    }
    unsigned found = 0;
    while (queue_pair->ring_count && found < max) {
        completions[found++] = queue_pair->ring[queue_pair->ring_head];
        queue_pair->ring_head = (queue_pair->ring_head + 1) % queue_pair->depth;
        queue_pair->ring_count--;
        queue_pair->ring_reserved--;
    }
    return found || result > 0 ? (int)found : result;
}

/* The bound to take for a transfer over a socket. */
static unsigned choose_bound(const pyspdk_queue_pair *queue_pair)
{
    const double *byte_ns = queue_pair->byte_ns;
    if (!byte_ns[0] || !byte_ns[1])
        return byte_ns[0] != 0;
    unsigned better = byte_ns[1] < byte_ns[0];
    return queue_pair->transfers % LOOK_EVERY ? better : !better;
}

static void judge_bound(pyspdk_queue_pair *queue_pair, unsigned bound, uint64_t bytes, uint64_t ns)
{
    double byte_ns = (double)ns / (double)bytes, *known = &queue_pair->byte_ns[bound];
    *known = *known ? 0.75 * *known + 0.25 * byte_ns : byte_ns;
    queue_pair->transfers++;
}

/* All of a batch, however long, `depth` commands at a time. Completions are by index; those that the loss of the
 * connection (-ENXIO) aborted or never let begin are marked as aborted (status code 08h). */
static int pyspdk_transfer(pyspdk_queue_pair *queue_pair, const pyspdk_entry *entries, const uint64_t *addresses,
                           const uint64_t *lengths, size_t n, unsigned depth, pyspdk_completion *completions,
                           uint64_t timeout_ms, size_t *wrong)
{
    for (size_t index = 0; index < n; index++)
        completions[index] = (pyspdk_completion){.status = SPDK_NVME_SC_ABORTED_SQ_DELETION << 1};
    int result = check_lengths(queue_pair, entries, lengths, n, wrong);
    if (!result)
        result = enter(queue_pair);
    if (result)
        return result;
    size_t next = 0;
    unsigned bound = choose_bound(queue_pair);
    uint64_t most_bytes = queue_pair->controller->moves_by_dma ? UINT64_MAX : SOCKET_BYTES_UNDER_WAY[bound];
    uint64_t started = now_ns(), bytes = 0;
    queue_pair->transferred = 0;
    queue_pair->bytes_under_way = 0;
    while (queue_pair->transferred < n && result >= 0) {
        result = 0;
        while (next < n && next - queue_pair->transferred < depth && queue_pair->num_free &&
               queue_pair->bytes_under_way < most_bytes && !result) {
            result = submit_one(queue_pair, &entries[next], addresses[next], lengths[next], &completions[next]);
            queue_pair->bytes_under_way += result ? 0 : lengths[next];
            bytes += result ? 0 : lengths[next];
            next += !result;
        }
        if (result == -ENXIO)
            abort_all(queue_pair);
        else if (result && !outstanding(queue_pair))
            break; /* nothing will end that could make room */
        else
            result = reap_some(queue_pair, timeout_ms);
    }
    if (result >= 0 && bytes >= JUDGED_BYTES)
        judge_bound(queue_pair, bound, bytes, now_ns() - started);
    leave(queue_pair);
    return result < 0 ? result : 0;
}

static int pyspdk_destroy_queue_pair(pyspdk_queue_pair *queue_pair)
{
    if (atomic_flag_test_and_set(&queue_pair->busy))
        return -EBUSY;
    pyspdk_controller *controller = queue_pair->controller;
    pthread_rwlock_rdlock(&controller->gate);
    disconnect_queue_pair(queue_pair);
    pthread_mutex_lock(&controller->admin);
    *queue_pair->link = queue_pair->next;
    if (queue_pair->next)
        queue_pair->next->link = queue_pair->link;
    pthread_mutex_unlock(&controller->admin);
    pthread_rwlock_unlock(&controller->gate);
    free(queue_pair->slots);
    free(queue_pair->free_slots);
    free(queue_pair->ring);
    free(queue_pair);
    return 0;
}
