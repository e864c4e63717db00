/* What Python hands to C: for the compiler, and for cffi, which reads this as it is. */

/* SUBMISSION_ENTRY of spdk_glue/command.py. The data pointers are not looked at: Linux fills them. */
typedef struct {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid, cdw2, cdw3;
    uint64_t mptr, dptr[2];
    uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
} nvme_entry;

/* COMPLETION_ENTRY of spdk_glue/command.py. */
typedef struct {
    uint32_t cdw0, cdw1;
    uint16_t sqhd, sqid, cid, status;
} nvme_completion;

/* One namespace, as opened. */
typedef struct {
    int fd;
    int is_admin;                /* of the commands sent here */
    uint32_t block_bytes;
    uint64_t max_transfer_bytes; /* of one command */
} nvme_device;

/* Commands with memory for each. */
typedef struct {
    const nvme_entry *entries;
    const uint64_t *addresses, *lengths;
    size_t num_commands;
} nvme_batch;
