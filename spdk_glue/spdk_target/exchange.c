/* Commands on their way to the drive's threads, and back.
 *
 * A reactor puts requests into a lane and never waits. The drive's threads take whole batches from it, and hand the
 * answers back as one message to the SPDK thread that each request came from. A lane is a lock-free ring beside a
 * semaphore with as many permits as there are requests, so threads sleep while there are none.
 */
#define LANE_REQUESTS 16384
#define MAX_PIECES_OF_REQUEST 256 /* of a transfer of 1 MiB, the most that the target allows */
#define STAGING_ALIGNMENT 4096

typedef struct {
    struct spdk_ring *ring;
    sem_t permits;
} lane_t;

enum { LANE_BLOCKS, LANE_FLUSH, LANE_ATTENTION, LANE_ADMIN, NUM_LANES };

/* Lies in the bdev_io's space for drivers, or on the heap for an admin command. */
typedef struct request {
    struct request *next;
    struct spdk_thread *thread;
    struct spdk_bdev_io *io;           /* or NULL: an admin command */
    struct spdk_nvmf_request *command; /* of a host, where it is known */
    kvfs_entry entry;
    struct iovec *iovs;
    int iovcnt;
    uint64_t length; /* bytes of data */
    uint8_t *staging;
    uint16_t controller, queue;
    kvfs_completion answer;
    /* a read on its short way */
    uint64_t next_page, iov_offset;
    int iov;
    unsigned pieces_under_way;
    bool goes_long_way, waits_for_room;
    bool moves_blocks; /* a read or write: its data may be cut at page ends */
    STAILQ_ENTRY(request) link;
    struct spdk_nvme_dsm_range range; /* of a deallocation: its data */
    struct iovec own_iov;
} request_t;

static uint64_t alive_at_ms[UINT16_MAX + 1]; /* by controller: when its host was heard last, 0 for never */

static uint64_t now_ms(void)
{
    return spdk_get_ticks() / (spdk_get_ticks_hz() / 1000);
}

/* Since a controller's host was heard: a command that reached the drive's threads, or a Keep Alive. */
static uint64_t kvfs_target_silent_ms(uint16_t controller)
{
    return now_ms() - alive_at_ms[controller];
}

static lane_t lanes[NUM_LANES];
static atomic_bool closing;
static kvfs_target_counters counters;

static int create_lanes(void)
{
    for (int i = 0; i < NUM_LANES; i++) {
        lanes[i].ring = spdk_ring_create(SPDK_RING_TYPE_MP_MC, LANE_REQUESTS, SPDK_ENV_NUMA_ID_ANY);
        if (!lanes[i].ring)
            return -ENOMEM;
    }
    return 0;
}

/* Which host's it is. */
static void set_host(request_t *request, struct spdk_nvmf_request *command)
{
    request->command = command;
    request->controller = spdk_nvmf_ctrlr_get_id(spdk_nvmf_request_get_ctrlr(command));
    request->queue = command->qpair->qid;
    alive_at_ms[request->controller] = now_ms();
}

static unsigned direction(const request_t *request)
{
    return request->entry.dwords[0] & 3;
}

/* Whether all of a request's data lie so that they can be given to the drive as they are, cut at page ends. */
static bool lies_in_pages(const request_t *request, size_t page_size)
{
    for (int i = 0; i < request->iovcnt; i++)
        if (request->iovs[i].iov_len % page_size || (uintptr_t)request->iovs[i].iov_base % STAGING_ALIGNMENT)
            return false;
    return true;
}

/* Memory in one piece for the data of a command; false where there is none. */
static bool stage(request_t *request)
{
    size_t size = (request->length + STAGING_ALIGNMENT - 1) / STAGING_ALIGNMENT * STAGING_ALIGNMENT;
    request->staging = aligned_alloc(STAGING_ALIGNMENT, size);
    if (!request->staging)
        return false;
    if (direction(request) == SPDK_NVME_DATA_HOST_TO_CONTROLLER)
        spdk_copy_iovs_to_buf(request->staging, request->length, request->iovs, request->iovcnt);
    else
        memset(request->staging, 0, request->length); /* never a byte of an earlier command's */
    return true;
}

static void complete(request_t *request)
{
    const kvfs_completion *answer = &request->answer;
    unsigned status = answer->status >> 1;
    bool failed = status & 0x7FF;
    if (request->staging) {
        if (!failed && direction(request) == SPDK_NVME_DATA_CONTROLLER_TO_HOST)
            spdk_copy_buf_to_iovs(request->iovs, request->iovcnt, request->staging, request->length);
        free(request->staging);
        request->staging = NULL;
    }
    if (request->command) {
        /* what SPDK's block devices have no words for: that the error log tells more, that a retry is of no use */
        struct spdk_nvme_status *to = &spdk_nvmf_request_get_response(request->command)->status;
        to->m = status >> 13 & 1;
        to->dnr = status >> 14 & 1;
    }
    if (request->io) {
        spdk_bdev_io_complete_nvme_status(request->io, answer->cdw0, status >> 8 & 7, status & 0xFF);
        return;
    }
    struct spdk_nvme_cpl *to = spdk_nvmf_request_get_response(request->command);
    to->cdw0 = answer->cdw0;
    to->status.sct = status >> 8 & 7;
    to->status.sc = status & 0xFF;
    spdk_nvmf_request_complete(request->command);
    free(request);
}

static void complete_all(void *argument)
{
    for (request_t *request = argument, *next; request; request = next) {
        next = request->next;
        complete(request);
    }
}

static void fail(request_t *request, unsigned status_code)
{
    request->answer = (kvfs_completion){.status = (uint16_t)(status_code << 1)};
    complete(request);
}

/* From a reactor to the drive's threads. */
static void hand_over(request_t *request, int lane)
{
    void *pointer = request;
    request->thread = spdk_get_thread();
    if (spdk_ring_enqueue(lanes[lane].ring, &pointer, 1, NULL) == 1)
        sem_post(&lanes[lane].permits);
    else if (request->io)
        spdk_bdev_io_complete(request->io, SPDK_BDEV_IO_STATUS_NOMEM); /* it comes again */
    else
        fail(request, SPDK_NVME_SC_INTERNAL_DEVICE_ERROR);
}

/* A request's commands for the drive: reads and writes one for each piece of memory, others one. */
static unsigned cut(request_t *request, uint32_t index, size_t page_size, kvfs_piece *pieces)
{
    kvfs_piece piece = {.entry = request->entry, .request = index, .controller = request->controller,
                        .queue = request->queue, .length = request->length};
    if (request->moves_blocks && lies_in_pages(request, page_size)) {
        uint64_t lba = request->entry.dwords[10] | (uint64_t)request->entry.dwords[11] << 32;
        unsigned count = 0;
        for (int i = 0; i < request->iovcnt; i++) {
            uint64_t num_pages = request->iovs[i].iov_len / page_size;
            piece.address = (uintptr_t)request->iovs[i].iov_base;
            piece.length = request->iovs[i].iov_len;
            piece.entry.dwords[10] = (uint32_t)lba;
            piece.entry.dwords[11] = (uint32_t)(lba >> 32);
            piece.entry.dwords[12] = (request->entry.dwords[12] & 0xFFFF0000u) | (uint32_t)(num_pages - 1);
            pieces[count++] = piece;
            lba += num_pages;
        }
        return count;
    }
    if (!request->length) {
        pieces[0] = piece;
        return 1;
    }
    if (!stage(request))
        return 0;
    piece.address = (uintptr_t)request->staging;
    pieces[0] = piece;
    return 1;
}

/* Requests of a lane, at most max_requests, and at least one, as commands for the drive: how many of these, with
 * *num_requests set. -1 once the target has ended. `pieces` has room for so many as max_pieces says. */
static int kvfs_target_take(int lane, uint32_t block_bytes, unsigned max_requests, unsigned max_pieces,
                            uint64_t *requests, unsigned *num_requests, kvfs_piece *pieces)
{
    unsigned num_pieces = 0;
    *num_requests = 0;
    while (*num_requests < max_requests && num_pieces + MAX_PIECES_OF_REQUEST <= max_pieces) {
        if (num_pieces ? sem_trywait(&lanes[lane].permits) : sem_wait(&lanes[lane].permits)) {
            if (errno == EINTR)
                continue;
            break;
        }
        void *pointer;
        if (!lanes[lane].ring || spdk_ring_dequeue(lanes[lane].ring, &pointer, 1) != 1) {
            if (!atomic_load(&closing))
                continue;
            if (!num_pieces) {
                sem_post(&lanes[lane].permits); /* for the next thread */
                return -1;
            }
            sem_post(&lanes[lane].permits);
            break;
        }
        request_t *request = pointer;
        unsigned count = cut(request, *num_requests, block_bytes, pieces + num_pieces);
        if (!count) {
            request->answer = (kvfs_completion){.status = SPDK_NVME_SC_INTERNAL_DEVICE_ERROR << 1};
            request->next = NULL;
            spdk_thread_send_msg(request->thread, complete_all, request);
            continue;
        }
        requests[(*num_requests)++] = (uintptr_t)request;
        num_pieces += count;
    }
    __atomic_fetch_add(&counters.handed_over, *num_requests, __ATOMIC_RELAXED);
    return (int)num_pieces;
}

static void send_back(struct spdk_thread *thread, request_t *first)
{
    while (spdk_thread_send_msg(thread, complete_all, first))
        usleep(100); /* no message is free: the thread is about to take some */
}

/* The answers to all pieces of what was taken at once. Of several failures of one request the first counts. */
static void kvfs_target_answer(const uint64_t *requests, unsigned num_requests, const kvfs_piece *pieces,
                               const kvfs_completion *completions, unsigned num_pieces)
{
    for (unsigned i = 0; i < num_requests; i++)
        ((request_t *)(uintptr_t)requests[i])->answer.status = 0;
    for (unsigned i = 0; i < num_pieces; i++) {
        kvfs_completion *answer = &((request_t *)(uintptr_t)requests[pieces[i].request])->answer;
        if (!(answer->status >> 1))
            *answer = completions[i];
    }
    request_t *first = NULL;
    for (unsigned i = num_requests; i-- > 0;) {
        request_t *request = (request_t *)(uintptr_t)requests[i];
        if (first && first->thread != request->thread) {
            send_back(first->thread, first);
            first = NULL;
        }
        request->next = first;
        first = request;
    }
    if (first)
        send_back(first->thread, first);
}
