/* What Python hands to C and gets back: for the compiler, and for cffi, which reads this as it is. */

/* A submission entry: see SUBMISSION_ENTRY in spdk_glue/command.py. */
typedef struct {
    uint32_t dwords[16];
} kvfs_entry;

/* A completion entry: see COMPLETION_ENTRY. */
typedef struct {
    uint32_t cdw0, cdw1;
    uint16_t sqhd, sqid, cid, status;
} kvfs_completion;

/* A command for the drive, whose data, if any, lie in one piece: see PIECE in commands.py. */
typedef struct {
    kvfs_entry entry;
    uint64_t address, length;
    uint32_t request;           /* which of the requests taken it is a part of */
    uint16_t controller, queue; /* whose it is; controller 0: the target's own reads and writes */
} kvfs_piece;

typedef struct {
    const char *name, *rpc_socket, *cpus;
    int memory_mb, hugepages, polling;
    const char *bdev_name;
    uint64_t num_blocks;
    uint32_t block_bytes;
    uint8_t uuid[16];
    const void *map; /* of the drive's pages, a dio_map, or NULL: see ftl/direct_io */
    const uint8_t *identity, *identity_mask; /* what Identify Controller says instead of SPDK's words, 4096 bytes each */
    uint32_t max_transfer_at; /* where it says, in 32 bits, how much a vendor command moves */
} kvfs_target_options;

typedef struct {
    uint64_t short_reads, short_read_pages; /* that were done beside the reactor, and the pages from flash */
    uint64_t handed_over;                   /* commands that Python has done */
} kvfs_target_counters;
