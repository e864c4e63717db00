/* SPDK's NVMe over fabrics target inside the process that has the drive open.
 *
 * The thread that calls kvfs_target_run becomes the first reactor and returns when the target has ended. It is set up
 * over JSON-RPC, by a socket that only this user reaches. Functions return 0 or more, or a negative errno.
 */
#include <errno.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <spdk/bdev_module.h>
#include <spdk/env.h>
#include <spdk/event.h>
#include <spdk/log.h>
#include <spdk/nvmf.h>
#include <spdk/nvmf_cmd.h>
#include <spdk/nvmf_transport.h>
#include <spdk/thread.h>
#include <spdk/util.h>

/* newer than some kernels' headers */
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#define IORING_SETUP_TASKRUN_FLAG (1U << 9)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SQ_TASKRUN
#define IORING_SQ_TASKRUN (1U << 2)
#endif

/* see spdk_glue/command.py */
enum {
    OPCODE_VERIFY = 0x0C,
    OPCODE_ATTENTION_FETCH = 0x82,
    OPCODE_SEAL_GROUPS = 0x85,
    OPCODE_FLASH_MAINTENANCE = 0xC0,
    FIRST_VENDOR_LOG = 0xC0,
};

#include "../../ftl/direct_io/records.h"
#include "../../ftl/direct_io/crc32c.c"
#include "../../ftl/direct_io/mapped_read.c"
#include "records.h"

_Static_assert(sizeof(kvfs_entry) == sizeof(struct spdk_nvme_cmd), "submission entry");
_Static_assert(sizeof(kvfs_completion) == sizeof(struct spdk_nvme_cpl), "completion entry");

#include "exchange.c"
#include "reads.c"
#include "block_device.c"
#include "admin.c"

#define MESSAGE_BYTES 512
#define MAX_MESSAGES 8

static pthread_mutex_t message_lock = PTHREAD_MUTEX_INITIALIZER;
static char messages[MAX_MESSAGES][MESSAGE_BYTES];
static unsigned num_messages;

static void note_error(int level, const char *file, const int line, const char *func, const char *format, va_list args)
{
    (void)file, (void)line, (void)func;
    if (level > SPDK_LOG_ERROR)
        return;
    pthread_mutex_lock(&message_lock);
    char *to = messages[num_messages++ % MAX_MESSAGES];
    vsnprintf(to, MESSAGE_BYTES, format, args);
    to[strcspn(to, "\n")] = 0;
    pthread_mutex_unlock(&message_lock);
}

/* The errors that SPDK has logged since the last call, the latest MAX_MESSAGES, one a line. */
static void kvfs_target_errors(char *text, size_t size)
{
    size_t used = 0;
    pthread_mutex_lock(&message_lock);
    unsigned first = num_messages > MAX_MESSAGES ? num_messages - MAX_MESSAGES : 0;
    for (unsigned i = first; i < num_messages && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s\n", messages[i % MAX_MESSAGES]);
    num_messages = 0;
    pthread_mutex_unlock(&message_lock);
}

static void started(void *argument)
{
    (void)argument;
}

/* Once in a process. Returns when kvfs_target_stop was called, or at once if it cannot start: 0, or not. */
static int kvfs_target_run(const kvfs_target_options *options)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL); /* signals are the interpreter's */
    map = options->map;
    find_medium();
    started_with = options;
    hook_admin_commands(options);
    spdk_log_open(note_error);
    struct spdk_app_opts opts;
    spdk_app_opts_init(&opts, sizeof opts);
    opts.name = options->name;
    opts.rpc_addr = options->rpc_socket;
    opts.reactor_mask = options->cpus;
    opts.mem_size = options->memory_mb;
    opts.no_pci = true;
    opts.no_huge = !options->hugepages;
    opts.hugepage_single_segments = options->hugepages;
    opts.num_entries = 0; /* no traces */
    opts.interrupt_mode = !options->polling;
    opts.delay_subsystem_init = true;
    opts.disable_signal_handlers = true;
    opts.disable_cpumask_locks = true;
    opts.print_level = SPDK_LOG_ERROR;
    opts.log = note_error;
    /* huge pages without files, which a killed process would leave behind */
    opts.env_context = (void *)(options->hugepages ? "--log-level=lib.*:error --in-memory" : "--log-level=lib.*:error");
    int result = spdk_app_start(&opts, started, NULL);
    atomic_store(&closing, true);
    for (int i = 0; i < NUM_LANES; i++)
        sem_post(&lanes[i].permits);
    return result;
}

static int kvfs_target_prepare(void)
{
    for (int i = 0; i < NUM_LANES; i++)
        if (sem_init(&lanes[i].permits, 0, 0))
            return -errno;
    return 0;
}

/* From any thread, once it runs. Commands that are under way end first. */
static void kvfs_target_stop(void)
{
    spdk_app_start_shutdown();
}

static void kvfs_target_count(kvfs_target_counters *to)
{
    *to = counters;
}
