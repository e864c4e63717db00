/* Batches of page transfers on one file, kept at a queue depth until all are done.
 *
 * A job is two arrays, physical pages and memory addresses. Consecutive pages become one request of up to
 * max_request_bytes, its memory described by as few iovecs as possible. Requests go through an io_uring (raw
 * system calls, one ring per job at a time) or, without one, through preadv/pwritev in a loop.
 *
 * Checksums are computed here because here is where the time is: while requests are in flight. A read
 * checksums each request as it lands; a program checksums the pages already submitted, completes their OOB
 * records, and submits the OOB in the same batch.
 *
 * Every transfer function returns 0 or a negative errno, the file offset of the failure in *failed_at.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/io_uring.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_IOVECS 256 /* 1 MiB of scattered 4 KiB pages */
#define CRC_STEP 64    /* pages checksummed between two looks at the completion queue */

/* Field positions of PAGE_OOB in ftl/layout.py; a unit test compares them. */
#define OOB_SIZE 64
#define OOB_CRC_OFFSET 4
#define OOB_PAYLOAD_CRC_OFFSET 8

typedef struct {
    struct iovec iovecs[MAX_IOVECS];
    unsigned num_iovecs, at;  /* iovecs, and the first one not finished */
    uint64_t offset;          /* of the rest still to transfer */
    size_t remaining;
    size_t first_page, num_pages; /* indices into the job; num_pages 0 for an extent */
} slot_t;

typedef struct dio_ring {
    int fd;
    unsigned depth;
    unsigned *sq_head, *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *sq_map, *cq_map;
    size_t sq_map_size, cq_map_size, sqes_size;
    unsigned to_submit;
    slot_t *slots;
    unsigned *free_slots;
    unsigned num_free;
} dio_ring;

typedef struct {
    int fd, write;
    size_t page_size, max_request_bytes;
    uint64_t data_start;
    const int64_t *pages;
    const uint64_t *addresses;
    size_t num_pages, next_page;
    const dio_extent *extents;
    size_t num_extents, next_extent;
    uint64_t extent_done; /* bytes of the current extent already handed out */
    uint32_t *crc;        /* read: where each page's checksum goes, or NULL */
    uint8_t *oob;         /* program: records to complete, or NULL */
    size_t crc_next;      /* program: pages checksummed so far */
} job_t;

static void dio_ring_destroy(dio_ring *ring)
{
    if (!ring)
        return;
    if (ring->sqes)
        munmap(ring->sqes, ring->sqes_size);
    if (ring->cq_map && ring->cq_map != ring->sq_map)
        munmap(ring->cq_map, ring->cq_map_size);
    if (ring->sq_map)
        munmap(ring->sq_map, ring->sq_map_size);
    if (ring->fd >= 0)
        close(ring->fd);
    free(ring->slots);
    free(ring->free_slots);
    free(ring);
}

static void *map_ring(int fd, size_t size, uint64_t what)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)what);
    return at == MAP_FAILED ? NULL : at;
}

/* NULL where the kernel refuses io_uring (old, or forbidden by policy): the caller then passes NULL on. */
static dio_ring *dio_ring_create(unsigned depth)
{
    struct io_uring_params params;
    memset(&params, 0, sizeof params);
    int fd = (int)syscall(__NR_io_uring_setup, depth, &params);
    if (fd < 0)
        return NULL;
    dio_ring *ring = calloc(1, sizeof *ring);
    if (!ring) {
        close(fd);
        return NULL;
    }
    ring->fd = fd;
    ring->depth = depth;
    ring->sq_map_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    ring->cq_map_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring->sqes_size = params.sq_entries * sizeof(struct io_uring_sqe);
    int single = params.features & IORING_FEAT_SINGLE_MMAP;
    if (single && ring->cq_map_size > ring->sq_map_size)
        ring->sq_map_size = ring->cq_map_size;
    ring->sq_map = map_ring(fd, ring->sq_map_size, IORING_OFF_SQ_RING);
    ring->cq_map = single ? ring->sq_map : map_ring(fd, ring->cq_map_size, IORING_OFF_CQ_RING);
    ring->sqes = map_ring(fd, ring->sqes_size, IORING_OFF_SQES);
    ring->slots = malloc(depth * sizeof(slot_t));
    ring->free_slots = malloc(depth * sizeof(unsigned));
    if (!ring->sq_map || !ring->cq_map || !ring->sqes || !ring->slots || !ring->free_slots) {
        dio_ring_destroy(ring);
        return NULL;
    }
    char *sq = ring->sq_map, *cq = ring->cq_map;
    ring->sq_head = (unsigned *)(sq + params.sq_off.head);
    ring->sq_tail = (unsigned *)(sq + params.sq_off.tail);
    ring->sq_mask = (unsigned *)(sq + params.sq_off.ring_mask);
    ring->sq_array = (unsigned *)(sq + params.sq_off.array);
    ring->cq_head = (unsigned *)(cq + params.cq_off.head);
    ring->cq_tail = (unsigned *)(cq + params.cq_off.tail);
    ring->cq_mask = (unsigned *)(cq + params.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(cq + params.cq_off.cqes);
    for (unsigned i = 0; i < depth; i++)
        ring->free_slots[ring->num_free++] = i;
    return ring;
}

static void add_memory(slot_t *slot, uint64_t address, size_t length)
{
    if (slot->num_iovecs) {
        struct iovec *last = &slot->iovecs[slot->num_iovecs - 1];
        if ((uint64_t)(uintptr_t)last->iov_base + last->iov_len == address) {
            last->iov_len += length;
            return;
        }
    }
    slot->iovecs[slot->num_iovecs].iov_base = (void *)(uintptr_t)address;
    slot->iovecs[slot->num_iovecs++].iov_len = length;
}

static void clear_slot(slot_t *slot)
{
    slot->num_iovecs = slot->at = 0;
    slot->remaining = slot->num_pages = slot->first_page = 0;
}

/* The next run of consecutive pages, as one request. */
static void next_page_request(job_t *job, slot_t *slot)
{
    clear_slot(slot);
    size_t first = job->next_page, limit = job->max_request_bytes / job->page_size, i = first;
    if (!limit)
        limit = 1;
    int64_t page = job->pages[first];
    while (i < job->num_pages && i - first < limit && job->pages[i] == page + (int64_t)(i - first)) {
        if (slot->num_iovecs == MAX_IOVECS)
            break;
        add_memory(slot, job->addresses[i++], job->page_size);
    }
    slot->first_page = first;
    slot->num_pages = i - first;
    slot->offset = job->data_start + (uint64_t)page * job->page_size;
    slot->remaining = slot->num_pages * job->page_size;
    job->next_page = i;
}

static void next_extent_request(job_t *job, slot_t *slot)
{
    clear_slot(slot);
    const dio_extent *extent = &job->extents[job->next_extent];
    size_t length = extent->length - job->extent_done;
    if (length > job->max_request_bytes)
        length = job->max_request_bytes;
    add_memory(slot, extent->address + job->extent_done, length);
    slot->offset = extent->offset + job->extent_done;
    slot->remaining = length;
    job->extent_done += length;
    if (job->extent_done == extent->length) {
        job->next_extent++;
        job->extent_done = 0;
    }
}

/* Checksums up to `limit` pages that have been handed out and completes their OOB records. */
static void checksum_programmed(job_t *job, size_t limit)
{
    size_t n = job->next_page - job->crc_next;
    if (n > limit)
        n = limit;
    uint8_t *record = job->oob + job->crc_next * OOB_SIZE;
    crc32c_strided(job->addresses + job->crc_next, n, job->page_size, record + OOB_PAYLOAD_CRC_OFFSET, OOB_SIZE);
    for (size_t i = 0; i < n; i++, record += OOB_SIZE) {
        uint32_t crc = crc32c_record(record, OOB_SIZE);
        memcpy(record + OOB_CRC_OFFSET, &crc, 4);
    }
    job->crc_next += n;
}

static void copy_oob(const job_t *job, const dio_oob_piece *pieces, size_t num_pieces)
{
    for (size_t i = 0; i < num_pieces; i++)
        memcpy((void *)(uintptr_t)pieces[i].image_address, job->oob + pieces[i].first * OOB_SIZE,
               pieces[i].num_pages * OOB_SIZE);
}

static void advance(slot_t *slot, size_t done)
{
    slot->offset += done;
    slot->remaining -= done;
    while (done) {
        struct iovec *iovec = &slot->iovecs[slot->at];
        if (done < iovec->iov_len) {
            iovec->iov_base = (char *)iovec->iov_base + done;
            iovec->iov_len -= done;
            return;
        }
        done -= iovec->iov_len;
        slot->at++;
    }
}

static int run_plain(job_t *job, const dio_oob_piece *pieces, size_t num_pieces, uint64_t *failed_at)
{
    slot_t *slot = malloc(sizeof *slot);
    if (!slot)
        return -ENOMEM;
    int result = 0, copied = 0;
    while (!result && (job->next_page < job->num_pages || job->next_extent < job->num_extents)) {
        if (job->next_page < job->num_pages) {
            next_page_request(job, slot);
            if (job->oob)
                checksum_programmed(job, slot->num_pages);
        } else {
            if (!copied)
                copy_oob(job, pieces, num_pieces);
            copied = 1;
            next_extent_request(job, slot);
        }
        while (slot->remaining) {
            struct iovec *at = slot->iovecs + slot->at;
            int count = (int)(slot->num_iovecs - slot->at);
            ssize_t done = job->write ? pwritev(job->fd, at, count, (off_t)slot->offset)
                                      : preadv(job->fd, at, count, (off_t)slot->offset);
            if (done < 0 && (errno == EINTR || errno == EAGAIN))
                continue;
            if (done <= 0) {
                result = done < 0 ? -errno : -ENODATA;
                *failed_at = slot->offset;
                break;
            }
            advance(slot, (size_t)done);
        }
        if (!result && job->crc && slot->num_pages)
            dio_crc32c_pages(job->addresses + slot->first_page, slot->num_pages, job->page_size,
                             job->crc + slot->first_page);
    }
    free(slot);
    return result;
}

static void queue_slot(dio_ring *ring, const job_t *job, unsigned index)
{
    slot_t *slot = &ring->slots[index];
    unsigned tail = *ring->sq_tail, at = tail & *ring->sq_mask;
    struct io_uring_sqe *sqe = &ring->sqes[at];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = job->write ? IORING_OP_WRITEV : IORING_OP_READV;
    sqe->fd = job->fd;
    sqe->off = slot->offset;
    sqe->addr = (uint64_t)(uintptr_t)(slot->iovecs + slot->at);
    sqe->len = slot->num_iovecs - slot->at;
    sqe->user_data = index;
    ring->sq_array[at] = at;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring->to_submit++;
}

/* Hands queued requests to the kernel and waits for `wait` completions. */
static int enter(dio_ring *ring, unsigned wait)
{
    while (ring->to_submit || wait) {
        long done = syscall(__NR_io_uring_enter, ring->fd, ring->to_submit, wait,
                            wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
        if (done >= 0) {
            ring->to_submit -= (unsigned)done;
            if (!ring->to_submit || wait)
                return 0;
        } else if (errno == EAGAIN || errno == EBUSY) {
            if (__atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) != *ring->cq_head)
                return 0; /* room comes with the completions that are there */
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

static int run_ring(dio_ring *ring, job_t *job, const dio_oob_piece *pieces, size_t num_pieces,
                    uint64_t *failed_at)
{
    int result = 0, copied = num_pieces == 0;
    unsigned in_flight = 0;
    struct landed { size_t first, count; } *landed = NULL; /* read and not checksummed yet */
    size_t num_landed = 0;
    if (job->crc) {
        landed = malloc(2 * ring->depth * sizeof *landed);
        if (!landed)
            return -ENOMEM;
    }
    for (;;) {
        while (!result && ring->num_free && job->next_page < job->num_pages) {
            unsigned index = ring->free_slots[--ring->num_free];
            next_page_request(job, &ring->slots[index]);
            queue_slot(ring, job, index);
            in_flight++;
        }
        if (job->next_page == job->num_pages && !result) {
            if (!copied && job->crc_next == job->num_pages) {
                copy_oob(job, pieces, num_pieces);
                copied = 1;
            }
            while (copied && ring->num_free && job->next_extent < job->num_extents) {
                unsigned index = ring->free_slots[--ring->num_free];
                next_extent_request(job, &ring->slots[index]);
                queue_slot(ring, job, index);
                in_flight++;
            }
        }
        /* Work for this processor goes before waiting, and only after everything possible is submitted. */
        int busy = num_landed > 0 || (job->oob && !result && job->crc_next < job->next_page);
        int failed = enter(ring, !busy && in_flight ? 1 : 0);
        if (failed) {
            /* The ring itself broke: nothing may be freed under requests in flight. */
            if (!result)
                result = failed;
            if (ring->to_submit == in_flight)
                break;
        }
        if (num_landed) {
            struct landed *last = &landed[--num_landed];
            dio_crc32c_pages(job->addresses + last->first, last->count, job->page_size, job->crc + last->first);
        } else if (busy) {
            checksum_programmed(job, CRC_STEP);
        } else if (!in_flight) {
            break;
        }
        unsigned head = *ring->cq_head;
        unsigned tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
        /* Leave completions where they are while the list of landed requests is full. */
        while (head != tail && (!landed || num_landed < 2 * ring->depth)) {
            struct io_uring_cqe *cqe = &ring->cqes[head & *ring->cq_mask];
            unsigned index = (unsigned)cqe->user_data;
            slot_t *slot = &ring->slots[index];
            int done = cqe->res;
            head++;
            if (done > 0)
                advance(slot, (size_t)done);
            if (done == -EAGAIN || done == -EINTR || (done > 0 && slot->remaining)) {
                if (!result) {
                    queue_slot(ring, job, index);
                    continue;
                }
            } else if (done <= 0) {
                if (!result) {
                    result = done ? done : -ENODATA;
                    *failed_at = slot->offset;
                }
            } else if (landed && slot->num_pages) {
                landed[num_landed].first = slot->first_page;
                landed[num_landed++].count = slot->num_pages;
            }
            ring->free_slots[ring->num_free++] = index;
            in_flight--;
        }
        __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
    }
    free(landed);
    return result;
}

/* Whether a job is a read of one run of pages: a system call of its own is faster, there is nothing to overlap. */
static int is_one_read(const job_t *job)
{
    if (job->write || job->num_extents || job->num_pages > MAX_IOVECS ||
        job->num_pages * job->page_size > job->max_request_bytes)
        return 0;
    for (size_t i = 1; i < job->num_pages; i++)
        if (job->pages[i] != job->pages[0] + (int64_t)i)
            return 0;
    return 1;
}

static int run(dio_ring *ring, job_t *job, const dio_oob_piece *pieces, size_t num_pieces, uint64_t *failed_at)
{
    *failed_at = 0;
    return ring && !is_one_read(job) ? run_ring(ring, job, pieces, num_pieces, failed_at)
                                     : run_plain(job, pieces, num_pieces, failed_at);
}

/* Reads n pages to n addresses; crc may be NULL. */
static int dio_read_pages(dio_ring *ring, int fd, const int64_t *pages, const uint64_t *addresses, size_t n,
                          size_t page_size, uint64_t data_start, size_t max_request_bytes, uint32_t *crc,
                          uint64_t *failed_at)
{
    job_t job = {.fd = fd, .page_size = page_size, .max_request_bytes = max_request_bytes,
                 .data_start = data_start, .pages = pages, .addresses = addresses, .num_pages = n, .crc = crc};
    return run(ring, &job, NULL, 0, failed_at);
}

/* Writes n pages, completes their OOB records, copies those into the images and writes the extents. */
static int dio_program_pages(dio_ring *ring, int fd, const int64_t *pages, const uint64_t *addresses, size_t n,
                             size_t page_size, uint64_t data_start, size_t max_request_bytes, uint8_t *oob,
                             const dio_oob_piece *pieces, size_t num_pieces, const dio_extent *extents,
                             size_t num_extents, uint64_t *failed_at)
{
    job_t job = {.fd = fd, .write = 1, .page_size = page_size, .max_request_bytes = max_request_bytes,
                 .data_start = data_start, .pages = pages, .addresses = addresses, .num_pages = n,
                 .extents = extents, .num_extents = num_extents, .oob = oob};
    return run(ring, &job, pieces, num_pieces, failed_at);
}

/* Transfers plain pieces of the file. */
static int dio_transfer_extents(dio_ring *ring, int fd, int write, const dio_extent *extents, size_t n,
                                size_t max_request_bytes, uint64_t *failed_at)
{
    job_t job = {.fd = fd, .write = write, .page_size = 4096, .max_request_bytes = max_request_bytes,
                 .extents = extents, .num_extents = n};
    return run(ring, &job, NULL, 0, failed_at);
}

/* The checksums that dio_program_pages computes, for media that are not files. */
static void dio_complete_oob(const uint64_t *addresses, size_t n, size_t page_size, uint8_t *oob)
{
    job_t job = {.page_size = page_size, .addresses = addresses, .num_pages = n, .next_page = n, .oob = oob};
    checksum_programmed(&job, n);
}

/* Makes a range of the file read as zeros and gives its blocks back. */
static int dio_punch_hole(int fd, uint64_t offset, uint64_t length)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    while (fallocate(fd, mode, (off_t)offset, (off_t)length))
        if (errno != EINTR)
            return -errno;
    return 0;
}

static void dio_copy_pages(const uint64_t *to, const uint64_t *from, size_t n, size_t page_size)
{
    for (size_t i = 0; i < n; i++)
        memcpy((void *)(uintptr_t)to[i], (const void *)(uintptr_t)from[i], page_size);
}

static void dio_zero_pages(const uint64_t *addresses, size_t n, size_t page_size)
{
    for (size_t i = 0; i < n; i++)
        memset((void *)(uintptr_t)addresses[i], 0, page_size);
}

static void dio_xor_pages(const uint64_t *to, const uint64_t *from, size_t n, size_t page_size)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t *target = (uint64_t *)(uintptr_t)to[i];
        const uint64_t *source = (const uint64_t *)(uintptr_t)from[i];
        for (size_t word = 0; word < page_size / 8; word++)
            target[word] ^= source[word];
    }
}
