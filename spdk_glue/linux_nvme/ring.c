/* Commands through an io_uring, as the character device of a namespace takes them (Linux 5.19): raw system calls,
 * entries of 128 bytes that hold the command and completions of 32 that hold its result.
 *
 * A slot is a command under way. Those of a transfer write their completions where they belong; those submitted
 * leave theirs in `arrived` for the next poll, so that both may be under way at once. One thread at a time. */
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define SETUP_SQE128 (1U << 10)
#define SETUP_CQE32 (1U << 11)
#define OP_URING_CMD 46

typedef struct {
    uint8_t opcode, flags;
    uint16_t priority;
    int32_t fd;
    uint32_t command_op, reserved0;
    uint64_t unused;
    uint32_t length, command_flags;
    uint64_t user_data;
    uint64_t reserved1;
    uint8_t command[80];
} ring_entry;

typedef struct {
    uint64_t user_data;
    int32_t result;
    uint32_t flags;
    uint64_t value, reserved;
} ring_completion;

_Static_assert(sizeof(ring_entry) == 128 && offsetof(ring_entry, command) == 48, "io_uring's large entry");
_Static_assert(sizeof(ring_completion) == 32, "io_uring's large completion");

typedef struct {
    nvme_completion *completions; /* NULL for submitted commands: see `arrived` */
    unsigned in_flight;
    int result;
    size_t failed_at;
} transfer_job;

typedef struct {
    linux_command command;
    transfer_job *job; /* NULL for a submitted command */
    size_t at;         /* the command's place in the job */
    uint16_t cid;
    double deadline;
} ring_slot;

typedef struct nvme_ring {
    nvme_device device;
    int fd;
    unsigned depth, to_submit, num_free, num_repeated, num_arrived, num_submitted;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    ring_entry *entries;
    ring_completion *completions;
    void *sq_map, *cq_map;
    size_t sq_map_size, cq_map_size, entries_size;
    ring_slot *slots;
    unsigned *free_slots, *repeated;
    nvme_completion *arrived;
    int failure; /* of a submitted command, for the next poll */
} nvme_ring;

static void release(nvme_ring *ring)
{
    if (ring->entries)
        munmap(ring->entries, ring->entries_size);
    if (ring->cq_map && ring->cq_map != ring->sq_map)
        munmap(ring->cq_map, ring->cq_map_size);
    if (ring->sq_map)
        munmap(ring->sq_map, ring->sq_map_size);
    close(ring->fd);
    free(ring->slots);
    free(ring->free_slots);
    free(ring->repeated);
    free(ring->arrived);
    free(ring);
}

static void *map_part(int fd, size_t size, uint64_t part)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)part);
    return at == MAP_FAILED ? NULL : at;
}

/* NULL where the kernel refuses such a ring: too old, or forbidden by policy. */
static nvme_ring *nvme_ring_create(const nvme_device *device, unsigned depth)
{
    struct io_uring_params params = {.flags = SETUP_SQE128 | SETUP_CQE32};
    int fd = (int)syscall(__NR_io_uring_setup, depth, &params);
    if (fd < 0)
        return NULL;
    nvme_ring *ring = calloc(1, sizeof *ring);
    if (!ring) {
        close(fd);
        return NULL;
    }
    ring->device = *device;
    ring->fd = fd;
    ring->depth = depth;
    ring->sq_map_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    ring->cq_map_size = params.cq_off.cqes + params.cq_entries * sizeof(ring_completion);
    ring->entries_size = params.sq_entries * sizeof(ring_entry);
    int single = params.features & IORING_FEAT_SINGLE_MMAP;
    if (single && ring->cq_map_size > ring->sq_map_size)
        ring->sq_map_size = ring->cq_map_size;
    ring->sq_map = map_part(fd, ring->sq_map_size, IORING_OFF_SQ_RING);
    ring->cq_map = single ? ring->sq_map : map_part(fd, ring->cq_map_size, IORING_OFF_CQ_RING);
    ring->entries = map_part(fd, ring->entries_size, IORING_OFF_SQES);
    ring->slots = malloc(depth * sizeof *ring->slots);
    ring->free_slots = malloc(depth * sizeof *ring->free_slots);
    ring->repeated = malloc(depth * sizeof *ring->repeated);
    ring->arrived = malloc(depth * sizeof *ring->arrived);
    if (!ring->sq_map || !ring->cq_map || !ring->entries || !ring->slots || !ring->free_slots ||
        !ring->repeated || !ring->arrived) {
        release(ring);
        return NULL;
    }
    char *sq = ring->sq_map, *cq = ring->cq_map;
    ring->sq_tail = (unsigned *)(sq + params.sq_off.tail);
    ring->sq_mask = (unsigned *)(sq + params.sq_off.ring_mask);
    ring->sq_array = (unsigned *)(sq + params.sq_off.array);
    ring->cq_head = (unsigned *)(cq + params.cq_off.head);
    ring->cq_tail = (unsigned *)(cq + params.cq_off.tail);
    ring->cq_mask = (unsigned *)(cq + params.cq_off.ring_mask);
    ring->completions = (ring_completion *)(cq + params.cq_off.cqes);
    for (unsigned i = 0; i < depth; i++)
        ring->free_slots[ring->num_free++] = i;
    return ring;
}

static void queue_slot(nvme_ring *ring, unsigned index)
{
    unsigned tail = *ring->sq_tail, at = tail & *ring->sq_mask;
    ring_entry *entry = &ring->entries[at];
    *entry = (ring_entry){.opcode = OP_URING_CMD, .fd = ring->device.fd, .command_op = URING_IO,
                          .user_data = index};
    memcpy(entry->command, &ring->slots[index].command, SIZE_32);
    ring->sq_array[at] = at;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring->to_submit++;
}

static void start(nvme_ring *ring, const nvme_batch *batch, size_t at, transfer_job *job)
{
    unsigned index = ring->free_slots[--ring->num_free];
    const nvme_entry *entry = &batch->entries[at];
    ring->slots[index] = (ring_slot){.command = linux_form(entry, batch->addresses[at], batch->lengths[at]),
                                     .job = job, .at = at, .cid = entry->cid};
    queue_slot(ring, index);
}

static int has_arrivals(const nvme_ring *ring)
{
    return __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) != *ring->cq_head;
}

/* Hands queued commands to the kernel and, if `wait`, waits for a completion. */
static int enter(nvme_ring *ring, int wait)
{
    while (ring->to_submit || (wait && !has_arrivals(ring))) {
        long done = syscall(__NR_io_uring_enter, ring->fd, ring->to_submit, wait ? 1 : 0,
                            wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
        if (done >= 0)
            ring->to_submit -= (unsigned)done;
        else if (errno == EAGAIN || errno == EBUSY) {
            if (has_arrivals(ring))
                return 0; /* room comes with the completions that are there */
            usleep(PAUSE_US);
        } else if (errno != EINTR)
            return -errno;
    }
    return 0;
}

static void settle(nvme_ring *ring, unsigned index, int result, uint64_t value)
{
    ring_slot *slot = &ring->slots[index];
    transfer_job *job = slot->job;
    if (is_to_repeat(0, slot->command.opcode, result, &slot->deadline)) {
        ring->repeated[ring->num_repeated++] = index;
        return;
    }
    ring->free_slots[ring->num_free++] = index;
    if (job) {
        job->in_flight--;
        int failure = complete(result, value, slot->cid, &job->completions[slot->at]);
        if (failure && !job->result) {
            job->result = failure;
            job->failed_at = slot->at;
        }
    } else {
        ring->num_submitted--;
        int failure = complete(result, value, slot->cid, &ring->arrived[ring->num_arrived]);
        if (failure)
            ring->failure = failure;
        else
            ring->num_arrived++;
    }
}

/* Takes the completions that have arrived, and sends again what did not run. */
static void reap(nvme_ring *ring)
{
    unsigned head = *ring->cq_head, tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
    for (; head != tail; head++) {
        ring_completion *completion = &ring->completions[head & *ring->cq_mask];
        settle(ring, (unsigned)completion->user_data, completion->result, completion->value);
    }
    __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
    if (ring->num_repeated)
        usleep(PAUSE_US);
    while (ring->num_repeated)
        queue_slot(ring, ring->repeated[--ring->num_repeated]);
}

/* Runs a batch of any size to its end, at most `depth` commands under way, the queue always as full as that
 * allows; completions in the order of the commands. 0, LENGTH_REFUSED with nothing sent, or a negative errno, with
 * nothing left under way; then *failed_at is the command at fault. */
static int nvme_ring_transfer(nvme_ring *ring, const nvme_batch *batch, unsigned depth,
                              nvme_completion *completions, size_t *failed_at)
{
    transfer_job job = {.completions = completions};
    size_t next = 0;
    if (nvme_check_lengths(&ring->device, batch, failed_at))
        return LENGTH_REFUSED;
    for (;;) {
        while (!job.result && next < batch->num_commands && ring->num_free && job.in_flight < depth) {
            start(ring, batch, next++, &job);
            job.in_flight++;
        }
        if (!job.in_flight)
            break;
        int broken = enter(ring, 1);
        if (broken) { /* the ring itself: nothing may be freed under commands that the drive has */
            if (!job.result)
                job.result = broken;
            if (ring->to_submit >= job.in_flight)
                break;
            usleep(PAUSE_US);
        }
        reap(ring);
    }
    *failed_at = job.failed_at;
    return job.result;
}

/* Starts a batch that fits into the free slots. 0, LENGTH_REFUSED with nothing sent, or a negative errno. */
static int nvme_ring_submit(nvme_ring *ring, const nvme_batch *batch, size_t *failed_at)
{
    if (nvme_check_lengths(&ring->device, batch, failed_at))
        return LENGTH_REFUSED;
    if (batch->num_commands > ring->num_free)
        return -E2BIG;
    for (size_t i = 0; i < batch->num_commands; i++) {
        start(ring, batch, i, NULL);
        ring->num_submitted++;
    }
    *failed_at = 0;
    return enter(ring, 0);
}

/* Completions of submitted commands, at least one if `wait`: their number, or a negative errno (ENODATA where none
 * is under way). `completions` has room for `depth` of them. */
static int nvme_ring_poll(nvme_ring *ring, int wait, nvme_completion *completions)
{
    int broken = enter(ring, 0);
    reap(ring);
    while (!broken && wait && !ring->num_arrived && !ring->failure) {
        if (!ring->num_submitted)
            return -ENODATA;
        broken = enter(ring, 1);
        reap(ring);
    }
    if (!broken) {
        broken = ring->failure;
        ring->failure = 0;
    }
    if (broken)
        return broken;
    int count = (int)ring->num_arrived;
    memcpy(completions, ring->arrived, ring->num_arrived * sizeof *completions);
    ring->num_arrived = 0;
    return count;
}

/* Waits for what is under way, whose memory the drive may still use. */
static void nvme_ring_destroy(nvme_ring *ring)
{
    while (ring->num_submitted && !enter(ring, 1)) {
        ring->num_arrived = 0;
        reap(ring);
    }
    release(ring);
}
