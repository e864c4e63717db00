/* Commands by ioctl, each of which sleeps until its command is done: for administration, and for I/O where the
 * kernel offers nothing better. Several threads keep several commands under way. */

#define MAX_THREADS 8

typedef struct {
    const nvme_device *device;
    const nvme_batch *batch;
    nvme_completion *completions;
    size_t next;      /* command to send */
    size_t failed_at;
    int result;
} ioctl_job;

static int issue(const nvme_device *device, linux_command *command)
{
    int result = ioctl(device->fd, device->is_admin ? ADMIN_64 : IO_64, command);
    if (result < 0 && errno == ENOTTY) { /* before Linux 5.5 */
        result = ioctl(device->fd, device->is_admin ? ADMIN_32 : IO_32, command);
        command->result64 = command->result32;
    }
    return result < 0 ? -errno : result;
}

static void *run_commands(void *argument)
{
    ioctl_job *job = argument;
    const nvme_batch *batch = job->batch;
    while (!__atomic_load_n(&job->result, __ATOMIC_RELAXED)) {
        size_t at = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (at >= batch->num_commands)
            break;
        const nvme_entry *entry = &batch->entries[at];
        linux_command command = linux_form(entry, batch->addresses[at], batch->lengths[at]);
        double deadline = 0;
        int result = issue(job->device, &command);
        while (is_to_repeat(job->device->is_admin, entry->opcode, result, &deadline)) {
            usleep(PAUSE_US);
            result = issue(job->device, &command);
        }
        int failure = complete(result, command.result64, entry->cid, &job->completions[at]);
        int none = 0;
        if (failure && __atomic_compare_exchange_n(&job->result, &none, failure, 0, __ATOMIC_RELAXED,
                                                   __ATOMIC_RELAXED))
            job->failed_at = at;
    }
    return NULL;
}

/* Runs a batch to its end, at most `depth` commands at a time; completions in the order of the commands.
 * 0, LENGTH_REFUSED with nothing sent, or a negative errno; then *failed_at is the command at fault. */
static int nvme_ioctl_transfer(const nvme_device *device, const nvme_batch *batch, unsigned depth,
                               nvme_completion *completions, size_t *failed_at)
{
    ioctl_job job = {.device = device, .batch = batch, .completions = completions};
    if (nvme_check_lengths(device, batch, failed_at))
        return LENGTH_REFUSED;
    size_t wanted = batch->num_commands < depth ? batch->num_commands : depth;
    pthread_t threads[MAX_THREADS - 1];
    size_t started = 0;
    sigset_t all, before; /* signals are for the threads that know of them */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started < MAX_THREADS - 1 && started + 1 < wanted &&
           !pthread_create(&threads[started], NULL, run_commands, &job))
        started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    run_commands(&job);
    while (started)
        pthread_join(threads[--started], NULL);
    *failed_at = job.failed_at;
    return job.result;
}
