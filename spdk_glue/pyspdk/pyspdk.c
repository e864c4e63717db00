/* SPDK's NVMe driver for Python: batches of commands, one entry into C for each.
 *
 * Completions are gathered here, in arrays that Python reads when a call returns: a Python callback for each would
 * cost as much as a command. Every function that may wait is called without the interpreter's lock.
 *
 * A controller has a keeper: a thread that polls the admin queue, so that keep-alives go out however idle or busy
 * Python is, and that resets the controller after its connection was lost. Before that it frees SPDK's queue pairs,
 * whose identifiers a reset gives out anew; whoever uses one of ours next makes it another. Users of queue pairs hold
 * `gate` for reading, the keeper takes it for writing while it resets.
 *
 * Functions return 0 or more, or a negative errno; pyspdk_last_error() has SPDK's latest words in this thread.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#include <spdk/env.h>
#include <spdk/log.h>
#include <spdk/nvme.h>

#include "records.h"

_Static_assert(sizeof(pyspdk_entry) == sizeof(struct spdk_nvme_cmd), "submission entry");
_Static_assert(sizeof(pyspdk_completion) == sizeof(struct spdk_nvme_cpl), "completion entry");

#define KEEPER_INTERVAL_MS 100
#define SPIN_NS 20000  /* of polling without result, until the CPU is given to others */
#define SLEEP_NS 20000 /* a sleeper comes back before those that compute; who yields waits a whole time slice */
#define ABORT_MS 1000
/* Of one transfer over a socket. More than this leaves the processor's caches between the target's copy and ours: with
 * 8 commands of 128 KiB under way loopback moved 3.1 GB/s, with 128 of them 2.5. */
#define SOCKET_BYTES_UNDER_WAY (1 << 20)
#define DMA_ALIGNMENT 4096
#define PHASE 1 /* bit 0 of a status, of no meaning beyond the queue */

/* ---- errors ---- */

static __thread char last_error[512];

static void note_error(int level, const char *file, const int line, const char *func, const char *format, va_list args)
{
    (void)file, (void)line, (void)func;
    if (level > SPDK_LOG_WARN)
        return;
    vsnprintf(last_error, sizeof last_error, format, args);
    last_error[strcspn(last_error, "\n")] = 0;
}

static const char *pyspdk_last_error(void)
{
    return last_error;
}

static void pyspdk_clear_error(void)
{
    last_error[0] = 0;
}

static uint64_t now_ns(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000 + (uint64_t)at.tv_nsec;
}

static uint64_t now_ms(void)
{
    return now_ns() / 1000000;
}

/* One look more that found nothing, `idle_since` (0 at the first of them). */
static void pause_polling(uint64_t *idle_since)
{
    uint64_t now = now_ns();
    if (!*idle_since)
        *idle_since = now;
    if (now - *idle_since < SPIN_NS)
        return;
    static __thread bool is_punctual;
    if (!is_punctual) {
        prctl(PR_SET_TIMERSLACK, 1000UL); /* 50 us by default */
        is_punctual = true;
    }
    struct timespec shortly = {.tv_nsec = SLEEP_NS};
    nanosleep(&shortly, NULL);
}

/* ---- environment and memory ---- */

/* Once per process. DPDK pins the calling thread to one CPU, which threads made later would inherit. */
static int pyspdk_env_start(const pyspdk_env_options *options)
{
    cpu_set_t allowed;
    if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed))
        return -errno;
    int cpu = 0;
    while (cpu < CPU_SETSIZE - 1 && !CPU_ISSET(cpu, &allowed))
        cpu++;
    char cores[16];
    snprintf(cores, sizeof cores, "[%d]", cpu);
    spdk_log_open(note_error);
    struct spdk_env_opts env;
    memset(&env, 0, sizeof env);
    env.opts_size = sizeof env;
    spdk_env_opts_init(&env);
    env.name = options->name;
    env.core_mask = cores;
    env.shm_id = -1;
    env.mem_size = options->memory_mb;
    env.no_pci = !options->pci;
    env.no_huge = !options->hugepages;
    env.hugepage_single_segments = options->hugepages; /* vfio-user hands them to its target */
    /* huge pages without files, which a killed process would leave behind */
    env.env_context = (void *)(options->hugepages ? "--log-level=lib.*:error --in-memory" : "--log-level=lib.*:error");
    int result = spdk_env_init(&env);
    pthread_setaffinity_np(pthread_self(), sizeof allowed, &allowed);
    return result;
}

static void *pyspdk_allocate(size_t size, size_t alignment)
{
    return spdk_zmalloc(size, alignment, NULL, SPDK_ENV_NUMA_ID_ANY, SPDK_MALLOC_DMA | SPDK_MALLOC_SHARE);
}

static void pyspdk_free(void *memory)
{
    spdk_free(memory);
}

/* ---- controllers ---- */

typedef struct pyspdk_controller {
    struct spdk_nvme_ctrlr *spdk;
    bool moves_by_dma;      /* whether data must lie in memory that SPDK knows: PCIe and vfio-user */
    bool has_volatile_cache;
    uint32_t max_transfer_bytes;
    pthread_t keeper;
    pthread_rwlock_t gate;
    pthread_mutex_t admin; /* the admin queue's users, and the state below */
    pthread_cond_t changed;
    struct pyspdk_queue_pair *queue_pairs; /* a list */
    bool stopping;
    atomic_bool lost;
    atomic_ulong writes;        /* that completed; and of those the ones that a flush has made durable */
    unsigned long flushed_writes;
    atomic_bool cache_lost;     /* the connection went with writes that no flush had made durable */
} pyspdk_controller;

static void free_queue_pairs(pyspdk_controller *controller);

static void lose(pyspdk_controller *controller)
{
    atomic_store(&controller->lost, true);
    pthread_mutex_lock(&controller->admin);
    pthread_cond_broadcast(&controller->changed);
    pthread_mutex_unlock(&controller->admin);
}

/* Look, rather than wait for the keeper's next look. */
static bool is_lost(pyspdk_controller *controller)
{
    pthread_mutex_lock(&controller->admin);
    if (!atomic_load(&controller->lost) && spdk_nvme_ctrlr_process_admin_completions(controller->spdk) < 0) {
        atomic_store(&controller->lost, true);
        pthread_cond_broadcast(&controller->changed);
    }
    pthread_mutex_unlock(&controller->admin);
    return atomic_load(&controller->lost);
}

static struct timespec in_ms(uint64_t ms)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += (time_t)(ms / 1000);
    at.tv_nsec += (long)(ms % 1000) * 1000000;
    if (at.tv_nsec >= 1000000000) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000;
    }
    return at;
}

static void *keep(void *argument)
{
    pyspdk_controller *controller = argument;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL); /* signals are the interpreter's */
    pthread_mutex_lock(&controller->admin);
    while (!controller->stopping) {
        if (!atomic_load(&controller->lost) && spdk_nvme_ctrlr_process_admin_completions(controller->spdk) < 0)
            atomic_store(&controller->lost, true);
        if (atomic_load(&controller->lost)) {
            pthread_mutex_unlock(&controller->admin); /* users of queue pairs see `lost` and leave */
            pthread_rwlock_wrlock(&controller->gate);
            pthread_mutex_lock(&controller->admin);
            if (controller->has_volatile_cache && controller->flushed_writes != atomic_load(&controller->writes))
                atomic_store(&controller->cache_lost, true);
            free_queue_pairs(controller);
            if (spdk_nvme_ctrlr_reset(controller->spdk) == 0) {
                atomic_store(&controller->lost, false);
                pthread_cond_broadcast(&controller->changed);
            }
            pthread_rwlock_unlock(&controller->gate);
        }
        struct timespec until = in_ms(KEEPER_INTERVAL_MS);
        if (!controller->stopping)
            pthread_cond_timedwait(&controller->changed, &controller->admin, &until);
    }
    pthread_mutex_unlock(&controller->admin);
    return NULL;
}

/* The controller and its keeper, or NULL with *result set. */
static pyspdk_controller *pyspdk_connect(const char *transport_id, const pyspdk_controller_options *options,
                                         int *result)
{
    struct spdk_nvme_transport_id trid;
    memset(&trid, 0, sizeof trid);
    pyspdk_clear_error();
    *result = spdk_nvme_transport_id_parse(&trid, transport_id);
    if (*result)
        return NULL;
    struct spdk_nvme_ctrlr_opts opts;
    spdk_nvme_ctrlr_get_default_ctrlr_opts(&opts, sizeof opts);
    opts.keep_alive_timeout_ms = options->keep_alive_ms;
    opts.io_queue_size = options->io_queue_size;
    opts.io_queue_requests = 2 * options->io_queue_size;
    opts.header_digest = options->header_digest;
    opts.data_digest = options->data_digest;
    opts.disable_error_logging = true; /* a status is an answer, and the caller's business */
    if (options->hostnqn)
        snprintf(opts.hostnqn, sizeof opts.hostnqn, "%s", options->hostnqn);
    pyspdk_controller *controller = calloc(1, sizeof *controller);
    if (!controller) {
        *result = -ENOMEM;
        return NULL;
    }
    controller->spdk = spdk_nvme_connect(&trid, &opts, sizeof opts);
    if (!controller->spdk) {
        free(controller);
        *result = -ENXIO;
        return NULL;
    }
    controller->moves_by_dma =
        trid.trtype == SPDK_NVME_TRANSPORT_PCIE || trid.trtype == SPDK_NVME_TRANSPORT_VFIOUSER;
    controller->has_volatile_cache = spdk_nvme_ctrlr_get_data(controller->spdk)->vwc.present;
    controller->max_transfer_bytes = spdk_nvme_ctrlr_get_max_xfer_size(controller->spdk);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&controller->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&controller->admin, NULL);
    /* the keeper comes first: readers that come back at once must not keep it out */
    pthread_rwlockattr_t writer_first;
    pthread_rwlockattr_init(&writer_first);
    pthread_rwlockattr_setkind_np(&writer_first, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&controller->gate, &writer_first);
    pthread_rwlockattr_destroy(&writer_first);
    if (pthread_create(&controller->keeper, NULL, keep, controller)) {
        spdk_nvme_detach(controller->spdk);
        free(controller);
        *result = -EAGAIN;
        return NULL;
    }
    return controller;
}

/* Its queue pairs are gone by now. */
static void pyspdk_disconnect(pyspdk_controller *controller)
{
    pthread_mutex_lock(&controller->admin);
    controller->stopping = true;
    pthread_cond_broadcast(&controller->changed);
    pthread_mutex_unlock(&controller->admin);
    pthread_join(controller->keeper, NULL);
    spdk_nvme_detach(controller->spdk);
    pthread_rwlock_destroy(&controller->gate);
    pthread_mutex_destroy(&controller->admin);
    pthread_cond_destroy(&controller->changed);
    free(controller);
}

static uint32_t pyspdk_max_transfer_bytes(const pyspdk_controller *controller)
{
    return controller->max_transfer_bytes;
}

static int pyspdk_moves_by_dma(const pyspdk_controller *controller)
{
    return controller->moves_by_dma;
}

/* Bit 0: the connection is lost now; bit 1: it was, with writes that may be gone. */
static int pyspdk_state(pyspdk_controller *controller)
{
    return atomic_load(&controller->lost) | atomic_load(&controller->cache_lost) << 1;
}

static uint32_t pyspdk_next_namespace(pyspdk_controller *controller, uint32_t nsid)
{
    return nsid ? spdk_nvme_ctrlr_get_next_active_ns(controller->spdk, nsid)
                : spdk_nvme_ctrlr_get_first_active_ns(controller->spdk);
}

/* Bytes of a sector; 0 where there is no such namespace. */
static int pyspdk_namespace(pyspdk_controller *controller, uint32_t nsid, uint64_t *num_sectors)
{
    struct spdk_nvme_ns *ns = spdk_nvme_ctrlr_get_ns(controller->spdk, nsid);
    if (!ns || !spdk_nvme_ns_is_active(ns))
        return 0;
    *num_sectors = spdk_nvme_ns_get_num_sectors(ns);
    return (int)spdk_nvme_ns_get_sector_size(ns);
}

/* Wait up to timeout_ms until the connection is there: 0, or -ENXIO. */
static int pyspdk_wait_connected(pyspdk_controller *controller, uint64_t timeout_ms)
{
    struct timespec until = in_ms(timeout_ms);
    int waited = 0;
    pthread_mutex_lock(&controller->admin);
    while (atomic_load(&controller->lost) && !waited)
        waited = pthread_cond_timedwait(&controller->changed, &controller->admin, &until);
    pthread_mutex_unlock(&controller->admin);
    return atomic_load(&controller->lost) ? -ENXIO : 0;
}

/* ---- admin commands ---- */

typedef struct {
    pyspdk_completion completion;
    bool done, abandoned;
    void *memory;
} admin_command;

static void admin_done(void *argument, const struct spdk_nvme_cpl *completion)
{
    admin_command *command = argument;
    memcpy(&command->completion, completion, sizeof command->completion);
    command->done = true;
    if (command->abandoned) {
        spdk_free(command->memory);
        free(command);
    }
}

/* One admin command to its end. data: `length` bytes, or NULL. -ETIMEDOUT, -ENXIO (lost). */
static int pyspdk_admin(pyspdk_controller *controller, const pyspdk_entry *entry, uint8_t *data, uint32_t length,
                        uint64_t timeout_ms, pyspdk_completion *completion)
{
    if (length > controller->max_transfer_bytes)
        return -EMSGSIZE;
    admin_command *command = calloc(1, sizeof *command);
    if (!command)
        return -ENOMEM;
    /* memory of its own: it stays when the caller has given up waiting */
    if (length && !(command->memory = pyspdk_allocate(length, DMA_ALIGNMENT))) {
        free(command);
        return -ENOMEM;
    }
    int direction = entry->dwords[0] & 3;
    if (length && direction == 1)
        memcpy(command->memory, data, length);
    struct spdk_nvme_cmd cmd;
    memcpy(&cmd, entry, sizeof cmd);
    uint64_t give_up = now_ms() + timeout_ms, idle_since = 0;
    pthread_mutex_lock(&controller->admin);
    int result = atomic_load(&controller->lost) ? -ENXIO
                                                : spdk_nvme_ctrlr_cmd_admin_raw(controller->spdk, &cmd, command->memory,
                                                                                length, admin_done, command);
    bool sent = result == 0;
    while (sent && !command->done) {
        if (spdk_nvme_ctrlr_process_admin_completions(controller->spdk) < 0) {
            atomic_store(&controller->lost, true);
            pthread_cond_broadcast(&controller->changed);
            result = -ENXIO;
            break;
        }
        if (!command->done && now_ms() > give_up) {
            result = -ETIMEDOUT;
            break;
        }
        if (!command->done) {
            pthread_mutex_unlock(&controller->admin);
            pause_polling(&idle_since);
            pthread_mutex_lock(&controller->admin);
        }
    }
    bool keep_for_later = sent && !command->done;
    command->abandoned = keep_for_later;
    pthread_mutex_unlock(&controller->admin);
    if (keep_for_later)
        return result;
    if (sent) {
        result = 0;
        *completion = command->completion;
        completion->status &= (uint16_t)~PHASE;
        if (length && direction == 2 && !completion->status)
            memcpy(data, command->memory, length);
    }
    spdk_free(command->memory);
    free(command);
    return result;
}

/* ---- queue pairs ---- */

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
    uint64_t most_bytes = queue_pair->controller->moves_by_dma ? UINT64_MAX : SOCKET_BYTES_UNDER_WAY;
    queue_pair->transferred = 0;
    queue_pair->bytes_under_way = 0;
    while (queue_pair->transferred < n && result >= 0) {
        result = 0;
        while (next < n && next - queue_pair->transferred < depth && queue_pair->num_free &&
               queue_pair->bytes_under_way < most_bytes && !result) {
            result = submit_one(queue_pair, &entries[next], addresses[next], lengths[next], &completions[next]);
            queue_pair->bytes_under_way += result ? 0 : lengths[next];
            next += !result;
        }
        if (result == -ENXIO)
            abort_all(queue_pair);
        else if (result && !outstanding(queue_pair))
            break; /* nothing will end that could make room */
        else
            result = reap_some(queue_pair, timeout_ms);
    }
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

/* ---- PCIe drives that SPDK can reach ---- */

typedef struct {
    char *text;
    size_t size, used;
} probe_list;

static bool note_address(void *context, const struct spdk_nvme_transport_id *trid, struct spdk_nvme_ctrlr_opts *opts)
{
    (void)opts;
    probe_list *list = context;
    int written = snprintf(list->text + list->used, list->size - list->used, "%s\n", trid->traddr);
    if (written > 0 && list->used + (size_t)written < list->size)
        list->used += (size_t)written;
    return false; /* found is enough */
}

static void never_attached(void *context, const struct spdk_nvme_transport_id *trid, struct spdk_nvme_ctrlr *ctrlr,
                           const struct spdk_nvme_ctrlr_opts *opts)
{
    (void)context, (void)trid, (void)ctrlr, (void)opts;
}

/* The addresses, one a line. */
static int pyspdk_probe(char *text, size_t size)
{
    struct spdk_nvme_transport_id trid;
    memset(&trid, 0, sizeof trid);
    spdk_nvme_trid_populate_transport(&trid, SPDK_NVME_TRANSPORT_PCIE);
    probe_list list = {.text = text, .size = size};
    text[0] = 0;
    return spdk_nvme_probe(&trid, &list, note_address, never_attached, NULL);
}
