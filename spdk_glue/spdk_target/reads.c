/* The short way of a Read: mapped pages of a plain file, from flash to the host's buffer beside the reactor.
 *
 * A read is cut into runs: pages that are neighbours on flash and in memory. Each is one request to the kernel, by the
 * channel's own io_uring; a poller hands all that came together to the kernel at once, and looks at what has ended.
 * Where the file lies in memory there is nothing to overlap, and each run is read as it comes. What is read counts
 * once the map was looked at again and all checksums fit (ftl/direct_io/mapped_read.c); else the whole command goes
 * the long way, through the drive's threads, which can repair, and tell what is wrong.
 */
#define RING_DEPTH 256

typedef struct {
    request_t *request;
    dio_run run;
    int32_t slot;
    uint8_t *to;
} read_t;

typedef struct {
    int ring; /* or -1: the file lies in memory, or io_uring is refused */
    bool is_polling;
    void *sq_memory, *cq_memory;
    size_t sq_size, cq_size;
    unsigned *sq_tail, *sq_mask, *sq_array, *sq_flags, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    unsigned to_submit, in_kernel, num_free;
    read_t reads[RING_DEPTH];
    unsigned free_reads[RING_DEPTH];
    STAILQ_HEAD(, request) waiting; /* for room in the ring */
    STAILQ_HEAD(, request) done;    /* read as they came: SPDK completes cheaper from a poller than within a submit */
    struct spdk_poller *poller;
    struct spdk_interrupt *interrupt;
    int event;
} channel_t;

static const dio_map *map; /* NULL: all reads go the long way */
static bool lies_in_memory;

static void find_medium(void)
{
    struct statfs found;
    lies_in_memory = map && !fstatfs(map->fd, &found) && (found.f_type == 0x01021994 || found.f_type == 0x858458F6);
}

static void go_on(channel_t *channel, request_t *request);

static void count_short_read(void)
{
    __atomic_fetch_add(&counters.short_reads, 1, __ATOMIC_RELAXED);
}

/* A read of which nothing is under way any more. */
static void finish(channel_t *channel, request_t *request)
{
    if (channel->ring < 0 && channel->is_polling && !request->goes_long_way) {
        STAILQ_INSERT_TAIL(&channel->done, request, link);
        return;
    }
    if (request->goes_long_way) {
        set_host(request, request->io->internal.caller_ctx);
        hand_over(request, LANE_BLOCKS);
        return;
    }
    count_short_read();
    spdk_bdev_io_complete(request->io, SPDK_BDEV_IO_STATUS_SUCCESS);
}

static void queue_read(channel_t *channel, unsigned index)
{
    const read_t *read = &channel->reads[index];
    unsigned tail = *channel->sq_tail, at = tail & *channel->sq_mask;
    struct io_uring_sqe *sqe = &channel->sqes[at];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = IORING_OP_READ;
    sqe->fd = map->fd;
    sqe->off = map->data_start + read->run.page * map->page_size;
    sqe->addr = (uintptr_t)read->to;
    sqe->len = (unsigned)(read->run.num_pages * map->page_size);
    sqe->user_data = index;
    channel->sq_array[at] = at;
    __atomic_store_n(channel->sq_tail, tail + 1, __ATOMIC_RELEASE);
    channel->to_submit++;
}

/* Tell the kernel what is queued; in a reactor that sleeps nobody else would. */
static void submit_queued(channel_t *channel)
{
    while (channel->to_submit) {
        long taken = syscall(__NR_io_uring_enter, channel->ring, channel->to_submit, 0, 0, NULL, 0);
        if (taken < 0) {
            if (errno == EINTR || !channel->in_kernel)
                continue; /* no completion would bring us back */
            break; /* EAGAIN, EBUSY: again with the next of them */
        }
        channel->to_submit -= (unsigned)taken;
        channel->in_kernel += (unsigned)taken;
    }
}

/* As many runs of a read as there is room for. */
static void go_on(channel_t *channel, request_t *request)
{
    uint64_t first_lba = request->io->u.bdev.offset_blocks, num_pages = request->io->u.bdev.num_blocks;
    size_t page_size = map->page_size;
    while (!request->goes_long_way && request->next_page < num_pages) {
        const struct iovec *iov = &request->iovs[request->iov];
        uint64_t room = (iov->iov_len - request->iov_offset) / page_size, done = 1;
        uint64_t lba = first_lba + request->next_page;
        uint8_t *to = (uint8_t *)iov->iov_base + request->iov_offset;
        read_t read = {.request = request, .to = to};
        if (room > num_pages - request->next_page)
            room = num_pages - request->next_page;
        if (entry_of(map, lba) == 0) {
            memset(to, 0, page_size);
        } else if (!(done = dio_find_longest(map, lba, room, &read.run)) || (read.slot = slot_of(map, &read.run)) < 0) {
            request->goes_long_way = true;
            break;
        } else if (channel->ring < 0) {
            if (!dio_read_run(map, &read.run, to)) {
                request->goes_long_way = true;
                break;
            }
            __atomic_fetch_add(&counters.short_read_pages, done, __ATOMIC_RELAXED);
        } else if (!channel->num_free) {
            request->waits_for_room = true;
            STAILQ_INSERT_TAIL(&channel->waiting, request, link);
            return;
        } else {
            unsigned index = channel->free_reads[--channel->num_free];
            channel->reads[index] = read;
            queue_read(channel, index);
            request->pieces_under_way++;
        }
        request->next_page += done;
        request->iov_offset += done * page_size;
        if (request->iov_offset == iov->iov_len) {
            request->iov++;
            request->iov_offset = 0;
        }
    }
    if (!request->pieces_under_way)
        finish(channel, request);
}

static void start_read(channel_t *channel, request_t *request)
{
    request->next_page = request->iov_offset = 0;
    request->iov = 0;
    request->pieces_under_way = 0;
    request->waits_for_room = false;
    request->goes_long_way = !map || (channel->ring < 0 && !lies_in_memory) || !lies_in_pages(request, map->page_size);
    go_on(channel, request);
    if (!channel->is_polling)
        submit_queued(channel);
}

static int poll_reads(void *argument)
{
    channel_t *channel = argument;
    if (channel->to_submit)
        submit_queued(channel);
    if (__atomic_load_n(channel->sq_flags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN)
        syscall(__NR_io_uring_enter, channel->ring, 0, 0, IORING_ENTER_GETEVENTS, NULL, 0);
    unsigned head = *channel->cq_head, tail = __atomic_load_n(channel->cq_tail, __ATOMIC_ACQUIRE);
    if (head == tail)
        return SPDK_POLLER_IDLE;
    for (; head != tail; head++) {
        const struct io_uring_cqe *cqe = &channel->cqes[head & *channel->cq_mask];
        unsigned index = (unsigned)cqe->user_data;
        read_t *read = &channel->reads[index];
        request_t *request = read->request;
        if (cqe->res != (int)(read->run.num_pages * map->page_size) ||
            !dio_is_content(map, &read->run, read->slot, read->to))
            request->goes_long_way = true;
        else
            __atomic_fetch_add(&counters.short_read_pages, read->run.num_pages, __ATOMIC_RELAXED);
        channel->free_reads[channel->num_free++] = index;
        channel->in_kernel--;
        request->pieces_under_way--;
        if (!request->pieces_under_way && !request->waits_for_room)
            finish(channel, request);
    }
    __atomic_store_n(channel->cq_head, head, __ATOMIC_RELEASE);
    while (channel->num_free && !STAILQ_EMPTY(&channel->waiting)) {
        request_t *request = STAILQ_FIRST(&channel->waiting);
        STAILQ_REMOVE_HEAD(&channel->waiting, link);
        request->waits_for_room = false;
        go_on(channel, request);
    }
    if (channel->to_submit)
        submit_queued(channel);
    return SPDK_POLLER_BUSY;
}

static int complete_reads(void *argument)
{
    channel_t *channel = argument;
    if (STAILQ_EMPTY(&channel->done))
        return SPDK_POLLER_IDLE;
    while (!STAILQ_EMPTY(&channel->done)) {
        request_t *request = STAILQ_FIRST(&channel->done);
        STAILQ_REMOVE_HEAD(&channel->done, link);
        count_short_read();
        spdk_bdev_io_complete(request->io, SPDK_BDEV_IO_STATUS_SUCCESS);
    }
    return SPDK_POLLER_BUSY;
}

static int wake_for_reads(void *argument)
{
    channel_t *channel = argument;
    uint64_t count;
    if (read(channel->event, &count, sizeof count) < 0)
        return SPDK_POLLER_IDLE;
    return poll_reads(channel);
}

static void close_ring(channel_t *channel)
{
    if (channel->sqes)
        munmap(channel->sqes, RING_DEPTH * sizeof(struct io_uring_sqe));
    if (channel->cq_memory && channel->cq_memory != channel->sq_memory)
        munmap(channel->cq_memory, channel->cq_size);
    if (channel->sq_memory)
        munmap(channel->sq_memory, channel->sq_size);
    if (channel->ring >= 0)
        close(channel->ring);
    channel->ring = -1;
}

static bool open_ring(channel_t *channel)
{
    /* a reactor that polls comes by at once: it need not be interrupted for each completion */
    struct io_uring_params params = {0};
    if (channel->is_polling)
        params.flags = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SINGLE_ISSUER;
    channel->ring = (int)syscall(__NR_io_uring_setup, RING_DEPTH, &params);
    if (channel->ring < 0 && errno == EINVAL) { /* an older kernel */
        memset(&params, 0, sizeof params);
        channel->ring = (int)syscall(__NR_io_uring_setup, RING_DEPTH, &params);
    }
    if (channel->ring < 0)
        return false;
    channel->sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    channel->cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    if (params.features & IORING_FEAT_SINGLE_MMAP && channel->cq_size > channel->sq_size)
        channel->sq_size = channel->cq_size;
    int access = PROT_READ | PROT_WRITE, kind = MAP_SHARED | MAP_POPULATE;
    uint8_t *sq = mmap(NULL, channel->sq_size, access, kind, channel->ring, IORING_OFF_SQ_RING);
    channel->sq_memory = sq == MAP_FAILED ? NULL : sq;
    uint8_t *cq = sq;
    if (!(params.features & IORING_FEAT_SINGLE_MMAP))
        cq = mmap(NULL, channel->cq_size, access, kind, channel->ring, IORING_OFF_CQ_RING);
    channel->cq_memory = cq == MAP_FAILED ? NULL : cq;
    void *sqes = mmap(NULL, RING_DEPTH * sizeof(struct io_uring_sqe), access, kind, channel->ring, IORING_OFF_SQES);
    channel->sqes = sqes == MAP_FAILED ? NULL : sqes;
    if (!channel->sq_memory || !channel->cq_memory || !channel->sqes) {
        close_ring(channel);
        return false;
    }
    channel->sq_tail = (unsigned *)(sq + params.sq_off.tail);
    channel->sq_mask = (unsigned *)(sq + params.sq_off.ring_mask);
    channel->sq_array = (unsigned *)(sq + params.sq_off.array);
    channel->sq_flags = (unsigned *)(sq + params.sq_off.flags);
    channel->cq_head = (unsigned *)(cq + params.cq_off.head);
    channel->cq_tail = (unsigned *)(cq + params.cq_off.tail);
    channel->cq_mask = (unsigned *)(cq + params.cq_off.ring_mask);
    channel->cqes = (struct io_uring_cqe *)(cq + params.cq_off.cqes);
    return true;
}

static int create_channel(void *device, void *memory)
{
    (void)device;
    channel_t *channel = memory;
    channel->ring = channel->event = -1;
    channel->is_polling = !spdk_interrupt_mode_is_enabled();
    STAILQ_INIT(&channel->waiting);
    STAILQ_INIT(&channel->done);
    for (unsigned index = 0; index < RING_DEPTH; index++)
        channel->free_reads[channel->num_free++] = index;
    if (!map || lies_in_memory || !open_ring(channel)) {
        if (channel->is_polling)
            channel->poller = SPDK_POLLER_REGISTER(complete_reads, channel, 0);
        return 0;
    }
    if (!channel->is_polling) {
        channel->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        if (channel->event < 0 || syscall(__NR_io_uring_register, channel->ring, IORING_REGISTER_EVENTFD,
                                          &channel->event, 1)) {
            close_ring(channel);
            return 0;
        }
        channel->interrupt = SPDK_INTERRUPT_REGISTER(channel->event, wake_for_reads, channel);
    }
    channel->poller = SPDK_POLLER_REGISTER(poll_reads, channel, 0);
    if (!channel->is_polling)
        spdk_poller_register_interrupt(channel->poller, NULL, NULL);
    return 0;
}

static void destroy_channel(void *device, void *memory)
{
    (void)device;
    channel_t *channel = memory;
    spdk_interrupt_unregister(&channel->interrupt);
    spdk_poller_unregister(&channel->poller);
    close_ring(channel);
    if (channel->event >= 0)
        close(channel->event);
}
