/* Controllers: the connection, its keeper, and admin commands. */
#define KEEPER_INTERVAL_MS 100
#define ABORT_MS 1000
#define PHASE 1 /* bit 0 of a status, of no meaning beyond the queue */

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
