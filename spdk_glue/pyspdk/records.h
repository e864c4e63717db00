/* What Python hands to C and gets back: for the compiler, and for cffi, which reads this as it is. */

/* A submission entry: see SUBMISSION_ENTRY in spdk_glue/command.py. */
typedef struct {
    uint32_t dwords[16];
} pyspdk_entry;

/* A completion entry: see COMPLETION_ENTRY. */
typedef struct {
    uint32_t cdw0, cdw1;
    uint16_t sqhd, sqid, cid, status;
} pyspdk_completion;

typedef struct {
    const char *name;
    int memory_mb, hugepages, pci;
} pyspdk_env_options;

typedef struct {
    uint32_t keep_alive_ms, io_queue_size;
    const char *hostnqn; /* or NULL */
    int header_digest, data_digest;
} pyspdk_controller_options;
