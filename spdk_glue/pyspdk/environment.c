/* What all of it needs: SPDK's words for an error, clocks, its environment and memory. */
#define SPIN_NS 20000  /* of polling without result, until the CPU is given to others */
#define SLEEP_NS 20000 /* a sleeper comes back before those that compute; who yields waits a whole time slice */
#define DMA_ALIGNMENT 4096

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
